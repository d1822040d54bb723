"""The backend's three classes as vLLM wants them: what is supported, a step's metadata, and its builder."""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from elsa_kernels.paged import decode_counters

from elsa_serve.vllm_plugin import NAME, compat, logger, metrics
from elsa_serve.vllm_plugin.context_parallel import Share, local_lengths, prove
from elsa_serve.vllm_plugin.step import Step, describe

if (_refusal := compat.refusal(compat.vllm_version())) is not None:
    raise ImportError(_refusal)

from vllm import envs as vllm_envs
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KV_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")
FP8_NAMES = ("fp8", "fp8_e4m3")
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# Rows of so many tokens are what the kernels run in the dense form, where they are told the lengths.
LONG_QUERY = 128
MANY_THREADS = 16  # more kinds of kernels than that there are not to compile
# What decode may hold beside the cache without a word: vLLM leaves a few GiB of the GPU free.
MUCH_BYTES = 2 << 30

# vLLM names what its base class refuses in a few words; here is what they mean for ELSA, and what to do.
EXPLANATIONS = {
    "head_size not supported": f"head size {{head_size}}: ELSA takes {', '.join(map(str, HEAD_SIZES))}",
    "dtype not supported": "dtype {dtype}: ELSA takes float32, float16 and bfloat16 (--dtype)",
    "kv_cache_dtype not supported": "KV cache in {kv_cache_dtype}: ELSA takes the model's own dtype, or FP8 E4M3 "
    "(--kv-cache-dtype auto or fp8)",
    "block_size not supported": "block size {block_size}: ELSA takes multiples of 16 (--block-size 16)",
    "partial multimodal token full attention not supported": "prefix-LM attention over multimodal tokens: ELSA's masks "
    "are causal, windowed or full (--attention-backend triton_attn)",
    "MLA not supported": "multi-head latent attention: ELSA has no MLA form (leave the backend to vLLM for this model)",
    "sparse not supported": "sparse attention: ELSA is exact and dense (leave the backend to vLLM for this model)",
    "per-head quant scales not supported": "KV cache scales per head: ELSA reads one scale a layer "
    "(use a checkpoint with per-tensor scales, or --kv-cache-dtype auto)",
    "R-SWA not supported": "reference sliding-window attention is not in ELSA (--attention-backend triton_attn)",
    "PCP not supported": "prefill context parallel is not in ELSA (set --prefill-context-parallel-size 1)",
    "attention type encoder_decoder not supported": "cross-attention to an encoder's keys: ELSA serves decoders and "
    "encoder-only models (--attention-backend triton_attn)",
    "compute capability not supported": "compute capability {device_capability}: ELSA's kernels need 7.5 or newer",
}


@dataclass(slots=True)
class ElsaMetadata:
    """One step, for the layers of a KV cache group. Tensors are vLLM's persistent ones: a CUDA graph may hold them."""

    num_tokens: int  # padding of a CUDA graph included
    real_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32
    block_table: torch.Tensor  # [B, pages] int32
    causal: bool
    step: Step
    seqlens: tuple[tuple[int, int], ...] | None  # (queries, keys) of each request, where they help and are exact
    fresh: bool  # all rows are long prompts without any cached key: what they attend to is at hand, beside the cache
    share: Share | None  # this rank's part of the KV under decode context parallelism
    counters: torch.Tensor | None  # zeros that decode's programs count themselves with


class ElsaBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = list(DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_DTYPES)

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> Any:
        from elsa_serve.vllm_plugin.impl import ElsaImpl

        return ElsaImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return ElsaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_ONLY)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or (capability.major, capability.minor) >= (7, 5)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        named = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kv_cache_dtype or "auto")
        if named is not None and named != dtype:
            return (
                f"KV cache in {kv_cache_dtype} under a model in {dtype}: ELSA keeps them alike (--kv-cache-dtype auto)"
            )
        return None

    @classmethod
    def validate_configuration(cls, **configuration: Any) -> list[str]:
        """Every reason against a configuration, with the value at fault and a remedy; empty where ELSA takes it."""
        return [
            EXPLANATIONS[reason].format(**configuration) if reason in EXPLANATIONS else reason
            for reason in super().validate_configuration(**configuration)
        ]


class ElsaMetadataBuilder(AttentionMetadataBuilder[ElsaMetadata]):
    # Decode, and verification of drafts, in full CUDA graphs: the kernels read every length from the device.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    # Draft steps replay the metadata of the first: all of it lies in vLLM's persistent tensors.
    supports_draft_decode_metadata_update = True

    # Batches are counted once a step, not once a KV cache group: by the first builder of an engine.
    _counting: ClassVar[weakref.WeakValueDictionary[int, ElsaMetadataBuilder]] = weakref.WeakValueDictionary()

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        speculative = vllm_config.speculative_config
        drafts = (speculative.num_speculative_tokens or 0) if speculative is not None else 0
        self._decode_tokens_per_row = 1 + drafts
        self._exact_lens = speculative is None
        self._batch_invariant = bool(vllm_envs.VLLM_BATCH_INVARIANT)
        impls = check_layers(vllm_config, layer_names)
        # Streams of microbatches have builders of their own, and so counters of their own.
        self._counters_for = (
            max(
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.compilation_config.max_cudagraph_capture_size or 0,
            ),
            vllm_config.model_config.max_model_len + self._decode_tokens_per_row,
        )
        self._dcp = impls[0].context_group() if impls else None
        self._dcp_lens: torch.Tensor | None = None
        if self._dcp is not None:
            self._dcp_interleave = vllm_config.parallel_config.cp_kv_cache_interleave_size
            self._dcp_lens = torch.zeros(2, self._counters_for[0], dtype=torch.int32, device=device)
            prove(self._dcp, device)
        self._counters: torch.Tensor | None = None
        self._splits: Callable[[int], int] | None = None
        if device.type == "cuda" and impls:
            rows, longest = self._counters_for
            self._counters = decode_counters(rows, impls[0].num_kv_heads, longest, device)
            self._splits = self._plan_decode(impls[0], vllm_config.model_config.dtype)
            threads = min(MANY_THREADS, os.cpu_count() or 1)
            warm_up(impls[0], kv_cache_spec.block_size, vllm_config.model_config.dtype, device, threads)
        self._recorder = metrics.recorder()
        self._counting.setdefault(id(vllm_config), self)
        self._recorder.add_layers(len(impls))
        weakref.finalize(self, self._recorder.add_layers, -len(impls)).atexit = False
        announce(impls, kv_cache_spec, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            # Several queries of one request need the causal part apart, with lengths from the host.
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> ElsaMetadata:
        return self._metadata(common_attn_metadata, count=False)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> ElsaMetadata:
        return self._metadata(common_attn_metadata, count=self._counts())

    def _counts(self) -> bool:
        return self._counting.get(id(self.vllm_config)) is self

    def update_draft_decode_metadata(self, metadata: ElsaMetadata) -> None:
        """Nothing to refresh."""

    def _metadata(self, batch: Any, count: bool) -> ElsaMetadata:
        if isinstance(batch.causal, torch.Tensor):
            raise NotImplementedError(
                "ELSA takes one causal flag a batch, and this model asks for one a request: use --attention-backend "
                "flash_attn for it"
            )
        rows = batch.num_reqs
        starts, lens = batch.query_start_loc_cpu[: rows + 1], batch.seq_lens_cpu_upper_bound
        step = describe(
            starts,
            None if lens is None else lens[:rows],
            None if batch.is_prefilling is None else batch.is_prefilling[:rows],
            decode_tokens_per_row=self._decode_tokens_per_row,
            exact_decode_lens=self._exact_lens,
        )
        seqlens, fallback = self._seqlens(step, batch.max_query_len)
        if count:
            splits = sum(map(self._splits, step.decode_kv_lens)) if self._splits else 0
            self._recorder.step(step, splits, fallback)
        return ElsaMetadata(
            num_tokens=batch.num_actual_tokens,
            real_tokens=int(starts[-1]),
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            query_start_loc=batch.query_start_loc[: rows + 1],
            seq_lens=batch.seq_lens[:rows],
            block_table=batch.block_table_tensor[:rows],
            causal=batch.causal,
            step=step,
            seqlens=seqlens,
            fresh=seqlens is not None and all(keys == n and (n >= LONG_QUERY or n == 0) for n, keys in seqlens),
            share=self._share(batch, seqlens) if self._dcp is not None else None,
            counters=self._counters if self._fits(batch) else None,
        )

    def _fits(self, batch: Any) -> bool:
        rows, longest = self._counters_for
        return batch.num_reqs <= rows and batch.max_seq_len <= longest

    def _seqlens(self, step: Step, longest: int) -> tuple[tuple[tuple[int, int], ...] | None, str | None]:
        """Lengths for the kernels where they matter, or the cause why they are withheld."""
        if longest < LONG_QUERY:
            return None, None
        if self._batch_invariant:
            # The dense form is chosen by the length of a chunk, and chunks are cut by what else is in the batch.
            return None, "batch_invariant"
        if step.query_lens is None or step.kv_lens is None:
            return None, "host_lengths_unknown"
        return tuple(zip(step.query_lens, step.kv_lens)), None

    def _plan_decode(self, impl: Any, dtype: torch.dtype) -> Callable[[int], int]:
        """Splits of a row in decode by its keys, on a GPU. Warns where the largest graph will hold much for them."""
        from elsa_kernels.devices import architecture
        from elsa_kernels.paged import PagedProblem
        from elsa_kernels.paged.launch import decode_memory

        rows, longest = self._counters_for
        tokens = self._decode_tokens_per_row
        problem = PagedProblem(
            T=rows * tokens, B=rows, H=impl.num_heads, Hkv=impl.num_kv_heads, D=impl.head_size,
            page=self.kv_cache_spec.block_size, dtype=dtype, kv_dtype=dtype, device=self.device, precision="fp32",
            causal=True, scale=impl.scale, window=None, softcap=None, max_seqlen_q=tokens, max_seqlen_k=longest,
        )  # fmt: skip
        splits, held = decode_memory(problem, architecture(self.device.index or 0))
        if held > MUCH_BYTES:
            logger.warning(
                "ELSA: a decode batch of %d requests of %d tokens needs %.1f GiB for its splits, which vLLM does not "
                "plan for. A smaller --max-num-seqs or --max-model-len takes in proportion less",
                rows,
                longest,
                held / 2**30,
            )
        return splits

    def _share(self, batch: Any, seqlens: tuple[tuple[int, int], ...] | None) -> Share:
        assert self._dcp is not None
        assert self._dcp_lens is not None
        rows = batch.num_reqs
        seq_lens, starts = batch.seq_lens[:rows], batch.query_start_loc[: rows + 1]
        queries = starts[1:] - starts[:-1]
        lens, before = self._dcp_lens[0, :rows], self._dcp_lens[1, :rows]
        size, rank = self._dcp.world_size, self._dcp.rank_in_group
        lens.copy_(local_lengths(seq_lens, size, rank, self._dcp_interleave))
        before.copy_(local_lengths(seq_lens - queries, size, rank, self._dcp_interleave))
        stripe = size * self._dcp_interleave
        longest = -(-batch.max_seq_len // stripe) * self._dcp_interleave
        if seqlens is not None:
            cached = torch.tensor([keys - n for n, keys in seqlens])
            own = local_lengths(cached, size, rank, self._dcp_interleave).tolist()
            seqlens = tuple((n, keys) for (n, _), keys in zip(seqlens, own))
        return Share(group=self._dcp, seq_lens=lens, context_lens=before, max_seq_len=longest, seqlens=seqlens)


def warm_up(impl: Any, page: int, dtype: torch.dtype, device: torch.device, threads: int) -> int:
    """Call every kind of kernel that a layer will need, so that they are compiled before requests come.

    Returns the number of kinds of calls. What is compiled is kept on disk (TRITON_CACHE_DIR): the first start pays for
    it, with `threads` compilers at work.
    """
    if impl.attn_type != AttentionType.DECODER:
        return 0
    start = time.perf_counter()
    impl.prepare(device)
    ranks = impl.dcp_world_size
    group = impl.num_heads * ranks // impl.num_kv_heads
    # One query; few and more rows of packed heads; over pages; whole prompts and later chunks in the dense form. Each
    # of them but the last is a kernel of its own, once for a single request and once for several.
    lengths = sorted({1, max(2, 16 // group), max(3, 64 // group), LONG_QUERY - 28})
    batches = [
        [dummy_batch(rows, queries, context, page, device, ranks) for context in (0, page)]
        for queries in lengths
        for rows in (1, 2)
    ]
    batches.append([dummy_batch(2, LONG_QUERY + 2, context, page, device, ranks) for context in (0, page)])
    calls = [functools.partial(impl.warm_up_cache, page, dtype, device)]
    calls += [functools.partial(_run_each, impl, kind, page, dtype, device) for kind in batches]
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_in_thread, calls, [device] * len(calls)))
    for call in calls:  # once more in this thread: of what two threads note of one kernel at a time, one may be lost
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    logger.info("ELSA: kernels ready in %.1f s (%d kinds of calls)", time.perf_counter() - start, len(calls))
    return len(calls)


def _run_each(impl: Any, batches: list[ElsaMetadata], page: int, dtype: torch.dtype, device: torch.device) -> None:
    for batch in batches:
        impl.warm_up(batch, page, dtype, device)


def _in_thread(call: Callable[[], None], device: torch.device) -> None:
    """A thread begins on the first GPU, and with gradients."""
    with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        call()


def dummy_batch(rows: int, queries: int, context: int, page: int, device: torch.device, ranks: int = 1) -> ElsaMetadata:
    """`rows` requests of `queries` tokens after `context` cached ones, all in the first pages; of one of `ranks`."""
    keys = queries + context
    starts = torch.arange(rows + 1, dtype=torch.int32) * queries
    lens = torch.full((rows,), keys, dtype=torch.int32)
    dense = queries >= LONG_QUERY
    share = None
    if ranks > 1:
        before = torch.full((rows,), context, dtype=torch.int32, device=device)
        share = Share(
            group=None, seq_lens=lens.to(device), context_lens=before, max_seq_len=keys,
            seqlens=((queries, context),) * rows,
        )  # fmt: skip
    return ElsaMetadata(
        num_tokens=rows * queries,
        real_tokens=rows * queries,
        max_query_len=2048 if share is not None and dense else queries,  # a bound at which packed prompts run apart
        max_seq_len=keys,
        query_start_loc=starts.to(device),
        seq_lens=lens.to(device),
        block_table=torch.arange(-(-keys // page), dtype=torch.int32, device=device).repeat(rows, 1),
        causal=True,
        step=describe(starts, lens, None),
        # Lengths let the launcher leave out the kernels of other kinds.
        seqlens=((queries, keys),) * rows,
        fresh=dense and context == 0 and ranks == 1,
        share=share,
        counters=None,
    )


def check_layers(vllm_config: Any, layer_names: list[str]) -> list[Any]:
    """The implementations of these layers. Raises RuntimeError unless each is ELSA's: the proof that it is active."""
    from elsa_serve.vllm_plugin.impl import ElsaImpl

    context = vllm_config.compilation_config.static_forward_context
    impls = [context[name].impl for name in layer_names if name in context]
    for name, impl in zip(layer_names, impls):
        if not isinstance(impl, ElsaImpl):
            raise RuntimeError(f"layer {name} runs {type(impl).__name__} although the backend {NAME} was chosen for it")
    return impls


_announced = False


def announce(impls: list[Any], kv_cache_spec: Any, device: torch.device) -> None:
    """The line that says ELSA computes, once a process."""
    global _announced
    if _announced or not impls:
        return
    _announced = True
    first = impls[0]
    logger.info(
        "ELSA attention is active: %d layers, %d/%d heads of %d, %s KV cache, pages of %d, on %s",
        len(impls),
        first.num_heads,
        first.num_kv_heads,
        first.head_size,
        kv_cache_spec.dtype,
        kv_cache_spec.block_size,
        device,
    )
