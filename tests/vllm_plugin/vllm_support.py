"""What the plugin's tests share. `needs_vllm` skips where vLLM is absent; `make test-vllm` makes a place with it."""

import importlib.util
import os
import threading
from pathlib import Path

import pytest
import torch

# Before vLLM is imported: engines in the test's own process, a small cache, no telemetry, quiet.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# vLLM's own code and what it starts warn about this and that; ours may not.
others_may_warn = pytest.mark.filterwarnings("ignore", "error:::elsa_.*")

DEMO_MODEL = Path(__file__).parents[2] / "configs" / "demo_model"

needs_vllm = pytest.mark.skipif(
    getattr(importlib.util.find_spec("vllm"), "origin", None) is None,
    reason="vLLM is not installed here: run make test-vllm",
)


class ThreadGroup:
    """Ranks as threads: what vLLM's GroupCoordinator does, over shared memory."""

    device_communicator = None

    def __init__(self, size):
        self.world_size = size
        self.rank = threading.local()
        self.slots = [None] * size
        self.barrier = threading.Barrier(size)

    @property
    def rank_in_group(self):
        return self.rank.value

    def exchange(self, x):
        self.slots[self.rank_in_group] = x
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone

    def all_gather(self, input_, dim=-1):
        return torch.cat(self.exchange(input_), dim)

    def reduce_scatter(self, input_, dim=-1):
        return torch.stack(self.exchange(input_)).sum(0).chunk(self.world_size, dim)[self.rank_in_group]

    def run(self, function):
        results = [None] * self.world_size

        def one(rank):
            self.rank.value = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world_size)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        return results
