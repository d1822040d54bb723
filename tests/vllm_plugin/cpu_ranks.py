"""A worker of vLLM's CPU build whose engine can share the keys of a prompt among ranks, for what ELSA makes of that.

The build itself refuses context parallelism in one place, the slots of new tokens: here they are as its GPU kernel
computes them. Linear layers keep their weights as they are, so that weights drawn after loading count.
"""

from typing import Any

import torch
from vllm.model_executor.layers import utils as layer_utils
from vllm.v1.worker.block_table import BlockTable
from vllm.v1.worker.cpu_worker import CPUWorker

VLLM_SLOTS = BlockTable.compute_slot_mapping


class Worker(CPUWorker):
    def init_device(self) -> None:
        BlockTable.compute_slot_mapping = compute_slot_mapping
        layer_utils.dispatch_cpu_unquantized_gemm = use_weight_as_it_is
        super().init_device()


def compute_slot_mapping(
    table: BlockTable, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
) -> None:
    size, page, interleave = table.dcp_world_size, table.block_size, table.cp_kv_cache_interleave_size
    if size == 1:
        VLLM_SLOTS(table, num_reqs, query_start_loc, positions)
        return
    starts = query_start_loc[: num_reqs + 1].long()
    rows = torch.repeat_interleave(torch.arange(num_reqs), starts.diff())
    positions = positions[: len(rows)].long()
    at = positions % (page * size)  # in a block, which spans `page` tokens of every rank
    place = at // (interleave * size) * interleave + at % interleave
    slots = table.block_table.gpu[rows, positions // (page * size)].long() * page + place
    table.slot_mapping.gpu.fill_(-1)
    table.slot_mapping.gpu[: len(rows)] = torch.where(at // interleave % size == table.dcp_rank, slots, -1)


def use_weight_as_it_is(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear
