"""Measurements of the attention kernels: run `python -m kernels.bench.run`, `.accuracy` and `.table` from the root."""

from elsa_serve import results_file

__all__ = ["results_file"]
