"""Two processes share the keys of a layer through vLLM's own groups, as its engine would drive them on two GPUs."""

import os
from types import SimpleNamespace

import pytest
import torch
from elsa_kernels import attention
from vllm_support import needs_vllm

pytestmark = needs_vllm

RANKS, HEADS, D, PAGE = 2, 4, 32, 16
# Steps of an engine: (request, new tokens). Prompts in one piece and in chunks, decode beside prefill, decode alone.
STEPS = (((0, 180),), ((0, 121), (1, 40)), ((1, 1), (0, 3)), ((0, 1), (1, 1)), ((0, 1), (1, 1)), ((2, 1), (0, 1)))


class Requests:
    """What every rank sees alike: queries of all heads, keys and values, and the pages of each request."""

    def __init__(self):
        torch.manual_seed(3)
        lengths = [sum(n for step in STEPS for r, n in step if r == request) for request in range(3)]
        self.q = [torch.randn(n, HEADS, D) for n in lengths]
        self.k, self.v = ([torch.randn(n, 1, D) for n in lengths] for _ in range(2))
        pages = [-(-n // (PAGE * RANKS)) for n in lengths]
        self.blocks = sum(pages) + 3
        order = torch.randperm(self.blocks).int()
        self.table = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
        for row, count in enumerate(pages):
            self.table[row, :count], order = order[:count], order[count:]

    def slots(self, request, positions, rank, interleave):
        """As vLLM 0.32 computes them (`v1/worker/gpu/block_table.py`): a block spans PAGE tokens of every rank."""
        at = positions % (PAGE * RANKS)
        place = at // (interleave * RANKS) * interleave + at % interleave
        slots = self.table[request].long()[positions // (PAGE * RANKS)] * PAGE + place
        return torch.where(at // interleave % RANKS == rank, slots, -1)


def rank_part(rank, folder, interleave, without_nccl):
    os.environ["VLLM_DISABLE_PYNCCL"] = "1"  # as where vLLM could not load NCCL
    torch.set_num_threads(1)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(RANKS, rank, f"file://{folder}/store", rank, "gloo")
        parallel_state.initialize_model_parallel(RANKS, decode_context_model_parallel_size=RANKS, backend="gloo")
    group = parallel_state.get_dcp_group()
    if without_nccl:  # the communicator that CUDA would have, over gloo
        known, group.device_communicator = group.device_communicator, CudaCommunicator.__new__(CudaCommunicator)
        group.use_custom_op_call = False
        DeviceCommunicatorBase.__init__(group.device_communicator, known.cpu_group, known.device, known.device_group)
        group.device_communicator.pynccl_comm = PyNcclCommunicator(group.cpu_group, "cpu")
        assert group.device_communicator.pynccl_comm.disabled

    outs = drive(rank, interleave)
    torch.save(outs, f"{folder}/{rank}.pt")


@torch.inference_mode()
def drive(rank, interleave):
    """Every step's output for this rank's heads."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

    from elsa_serve.vllm_plugin.backend import ElsaMetadataBuilder
    from elsa_serve.vllm_plugin.impl import ElsaImpl

    requests, own = Requests(), slice(rank * HEADS // RANKS, (rank + 1) * HEADS // RANKS)
    impl = ElsaImpl(HEADS // RANKS, D, D**-0.5, 1)
    assert (impl.dcp_world_size, impl.need_to_return_lse_for_decode) == (RANKS, True)
    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=RANKS, cp_kv_cache_interleave_size=interleave),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(
            static_forward_context={"l": SimpleNamespace(impl=impl)}, max_cudagraph_capture_size=0
        ),
        model_config=SimpleNamespace(max_model_len=512, dtype=torch.float32),
    )
    builder = ElsaMetadataBuilder(
        SimpleNamespace(dtype=torch.float32, block_size=PAGE), ["l"], config, torch.device("cpu")
    )
    cache = torch.full((requests.blocks, 1, PAGE, 2 * D), torch.nan)
    done, outs = [0, 0, 0], []
    for step in STEPS:
        rows, new = ([pair[i] for pair in step] for i in (0, 1))
        q, k, v = (
            torch.cat([x[r][done[r] : done[r] + n] for r, n in step]) for x in (requests.q, requests.k, requests.v)
        )
        slots = [requests.slots(r, torch.arange(done[r], done[r] + n), rank, interleave) for r, n in step]
        for r, n in step:
            done[r] += n
        starts = torch.tensor([0, *new]).cumsum(0).int()
        lens = torch.tensor([done[r] for r in rows], dtype=torch.int32)
        batch = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lens, seq_lens_cpu_upper_bound=lens,
            num_reqs=len(step), num_actual_tokens=len(q), max_query_len=max(new), max_seq_len=max(lens.tolist()),
            block_table_tensor=requests.table[rows], slot_mapping=torch.cat(slots), causal=True,
            dcp_local_seq_lens=get_dcp_local_seq_lens(lens, RANKS, rank, interleave),
        )  # fmt: skip
        metadata = builder.build(0, batch)
        assert metadata.share.seq_lens.tolist() == batch.dcp_local_seq_lens.tolist()
        impl.do_kv_cache_update(None, k, v, cache, batch.slot_mapping)
        out = torch.full((len(q), HEADS // RANKS, D), torch.nan)
        outs.append(impl.forward(None, q[:, own], k, v, cache, metadata, out))
    return outs


def expected():
    """Every step's output of all heads, in float64, from all keys of a request."""
    requests, done, outs = Requests(), [0, 0, 0], []
    for step in STEPS:
        parts = []
        for r, n in step:
            done[r] += n
            q, k, v = requests.q[r][done[r] - n : done[r]], requests.k[r][: done[r]], requests.v[r][: done[r]]
            heads = [x.double().transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            parts.append(attention(*heads, causal=True, impl="reference")[0].transpose(0, 1))
        outs.append(torch.cat(parts))
    return outs


@pytest.mark.parametrize(
    ("interleave", "without_nccl"), [(1, False), (1, True), (PAGE, True)], ids=["gloo", "no-nccl", "no-nccl-pages"]
)
def test_two_processes_that_share_the_keys_give_one_process_answers(tmp_path, interleave, without_nccl):
    """Where vLLM could not load NCCL, its CUDA communicator gathers all the same, and returns from reduce_scatter
    memory that nobody wrote: on two H200s every token that read a shared cache was wrong."""
    torch.multiprocessing.spawn(rank_part, (str(tmp_path), interleave, without_nccl), nprocs=RANKS)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for number, truth in enumerate(expected()):
        found = torch.cat([outs[number] for outs in parts], dim=1)
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=4e-6, msg=lambda m, n=number: f"step {n}: {m}")
