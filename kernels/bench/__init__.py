"""Measurements of the attention kernels: run `python -m kernels.bench.run`, `.accuracy` and `.table` from the root."""
