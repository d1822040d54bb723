"""vLLM's parallel ranks on one GPU, on a machine that has no second one: for what they compute, not for its speed.

NCCL refuses two ranks on one GPU of one host. Under host names of their own it connects them by sockets, and the
processes take turns on the GPU. Two processes on one H200 have reduced so, in CUDA graphs too; an engine has not run
so yet.
"""

import os
from typing import Any

from vllm.v1.worker.gpu_worker import Worker as GpuWorker

ENGINE_OPTIONS: dict[str, Any] = {
    "worker_cls": f"{__name__}.Worker",
    "distributed_executor_backend": "mp",  # left to choose, vLLM counts the GPUs
    "disable_custom_all_reduce": True,  # it is for two GPUs' memories
}


class Worker(GpuWorker):
    """A worker on the first GPU, whatever its rank."""

    def init_device(self) -> None:
        os.environ["NCCL_HOSTID"] = f"rank {self.rank}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"  # memory of two GPUs, too
        self.local_rank = 0
        super().init_device()
