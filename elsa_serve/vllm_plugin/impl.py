"""One attention layer: writing its KV into vLLM's pages, and attending to them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from elsa_kernels import State, attention, attention_paged, attention_varlen, reshape_and_cache
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from elsa_serve.vllm_plugin import context_parallel, metrics
from elsa_serve.vllm_plugin.backend import FP8_NAMES, ElsaMetadata


class ElsaImpl(AttentionImpl):
    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._fp8 = kv_cache_dtype in FP8_NAMES
        # The forms without pages want offsets that end at the last token; those with pages skip padding themselves.
        self._needs_offsets = attn_type != AttentionType.DECODER or self.dcp_world_size > 1
        self._stopwatch: metrics.Stopwatch | None = None
        self._refuse()

    def _refuse(self) -> None:
        """What vLLM does not ask the backend about beforehand."""
        if self.sinks is not None and self.sinks.shape[0] != self.num_heads:
            raise ValueError(
                f"sinks of shape {list(self.sinks.shape)}: ELSA takes one for each of {self.num_heads} heads"
            )
        if self.dcp_world_size > 1 and self.num_kv_heads > 1:
            raise NotImplementedError(
                f"decode context parallelism with {self.num_kv_heads} key heads on a rank: gathered over the ranks, "
                "query heads would not lie in the order of their key heads (use a larger --tensor-parallel-size)"
            )
        if self.dcp_world_size > 1 and self.sliding_window is not None:
            raise NotImplementedError(
                "decode context parallelism with a sliding window: a rank's share of the keys is not a window in ELSA "
                "(set --decode-context-parallel-size 1)"
            )
        if self.dcp_world_size > 1 and (self.alibi_slopes is not None or self.sinks is not None):
            raise NotImplementedError(
                "decode context parallelism with ALiBi or attention sinks is not in ELSA "
                "(set --decode-context-parallel-size 1)"
            )

    def context_group(self) -> context_parallel.Group | None:
        """The ranks among which this layer's KV is shared out, or None."""
        if self.dcp_world_size == 1:
            return None
        from vllm.distributed.parallel_state import get_dcp_group

        return get_dcp_group()

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        if self.attn_type != AttentionType.DECODER:
            return
        reshape_and_cache(key, value, *self._caches(kv_cache), slot_mapping, *self._scales(layer))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: ElsaMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [T, H, D] over kv_cache [blocks, Hkv, block_size, 2·D], written to output [T, H, D]."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "fused quantisation of the output is not in ELSA: disable the fuse_attn_quant pass"
            )
        if attn_metadata is None:  # the profiling run
            return output.fill_(0)
        if self._stopwatch is None:
            self.prepare(query.device)
        assert self._stopwatch is not None
        started = self._stopwatch.start()
        tokens = attn_metadata.num_tokens
        if self._needs_offsets and attn_metadata.max_query_len > 1:
            tokens = attn_metadata.real_tokens
        q, out = query[:tokens], output[:tokens]
        if self.attn_type != AttentionType.DECODER:
            self._encoder(q, key[:tokens], value[:tokens], attn_metadata, out)
        elif attn_metadata.share is not None:
            self._shared(layer, q, key[:tokens], value[:tokens], kv_cache, attn_metadata, out)
        elif attn_metadata.fresh and not self._fp8 and key is not None:
            self._fresh(q, key, value, attn_metadata, out)
        else:
            self._paged(layer, q, kv_cache, attn_metadata, out)
        self._stopwatch.stop(started, attn_metadata.step.phase)
        return output

    def warm_up(self, batch: ElsaMetadata, page: int, dtype: torch.dtype, device: torch.device) -> None:
        """Attend on zeros as `forward` would, uncounted and without a word to other ranks; `prepare` comes first."""
        heads, dim, T = self.num_kv_heads, self.head_size, batch.num_tokens
        q = torch.zeros(T, self.num_heads, dim, dtype=dtype, device=device)
        k = torch.zeros(T, heads, dim, dtype=dtype, device=device)
        out = torch.empty_like(q)
        if batch.fresh and not self._fp8:
            self._fresh(q, k, k, batch, out)
            return
        scales, cache = self._zero_cache(batch.block_table.shape[1], page, dtype, device)
        if batch.share is None:
            self._paged(scales, q, cache, batch, out)
            return
        self._context_part(scales, q.repeat(1, self.dcp_world_size, 1), cache, batch)
        if batch.max_query_len > 1:
            self._own_part(q, k, k, batch)

    def warm_up_cache(self, page: int, dtype: torch.dtype, device: torch.device) -> None:
        """Write a token to nowhere."""
        scales, cache = self._zero_cache(1, page, dtype, device)
        k = torch.zeros(1, self.num_kv_heads, self.head_size, dtype=dtype, device=device)
        self.do_kv_cache_update(scales, k, k, cache, torch.full((1,), -1, device=device))

    def _zero_cache(self, pages: int, page: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, torch.Tensor]:
        """Scales, and a cache as vLLM lays it out."""
        shape = (pages, page, self.num_kv_heads, 2 * self.head_size)
        cache = torch.zeros(shape, dtype=torch.uint8 if self._fp8 else dtype, device=device)
        one = torch.ones((), device=device)
        return SimpleNamespace(_k_scale=one, _v_scale=one), cache.transpose(1, 2)

    def prepare(self, device: torch.device) -> None:
        self._stopwatch = metrics.Stopwatch(metrics.recorder(), device)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(device)

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [blocks, block_size, Hkv, D]: views of vLLM's [blocks, Hkv, block_size, 2·D], whatever its
        order in memory."""
        if self._fp8:
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        k, v = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return k, v

    def _scales(self, layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (layer._k_scale, layer._v_scale) if self._fp8 else (None, None)

    def _options(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "window": self.sliding_window,
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }

    def _paged(
        self, layer: Any, q: torch.Tensor, kv_cache: torch.Tensor, step: ElsaMetadata, out: torch.Tensor
    ) -> None:
        k_scale, v_scale = self._scales(layer)
        attention_paged(
            q,
            *self._caches(kv_cache),
            step.query_start_loc,
            step.seq_lens,
            step.block_table,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_seq_len,
            causal=step.causal,
            k_scale=k_scale,
            v_scale=v_scale,
            seqlens=step.seqlens,
            counters=step.counters,
            out=out,
            **self._options(),
        )

    def _fresh(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: ElsaMetadata, out: torch.Tensor) -> None:
        """Whole prompts: the dense kernels on their own keys. The bits are those that gathering them would give."""
        start = 0
        for queries, _ in step.seqlens or ():
            rows = slice(start, start + queries)
            start += queries
            if queries:
                one = attention(
                    *(x[rows].transpose(0, 1).unsqueeze(0) for x in (q, k, v)), causal=step.causal, **self._options()
                )
                out[rows].copy_(one[0].transpose(0, 1))

    def _encoder(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: ElsaMetadata, out: torch.Tensor
    ) -> None:
        """Every token sees every token of its sequence; there is no cache."""
        starts, longest = step.query_start_loc, step.max_query_len
        out.copy_(
            attention_varlen(
                q, k, v, starts, starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=False, **self._options()
            )
        )

    def _shared(
        self,
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        step: ElsaMetadata,
        out: torch.Tensor,
    ) -> None:
        """Decode context parallelism: all heads over this rank's keys, then a merge over the ranks.

        A single query sees every key there is, its own among them, so the cache alone answers it. Several queries of a
        request must not see each other's future: the cache gives the context before them, and their own keys, which
        every rank has at hand, a causal part beside it.
        """
        share = step.share
        assert share is not None
        context, lse = self._context_part(layer, share.group.all_gather(q.contiguous(), dim=1), kv_cache, step)
        merged, total = context_parallel.merge_ranks(context, lse, share.group)
        if step.max_query_len == 1:
            out.copy_(merged)
            return
        before = State.from_output(merged.transpose(0, 1), total.transpose(0, 1))
        out.copy_(before.merge(self._own_part(q, k, v, step)).finalize().transpose(0, 1))

    def _context_part(
        self, layer: Any, q: torch.Tensor, kv_cache: torch.Tensor, step: ElsaMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and logsumexp of the heads of all ranks over this rank's keys."""
        share = step.share
        assert share is not None
        k_scale, v_scale = self._scales(layer)
        return attention_paged(
            q,
            *self._caches(kv_cache),
            step.query_start_loc,
            share.seq_lens if step.max_query_len == 1 else share.context_lens,
            step.block_table,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=share.max_seq_len,
            causal=False,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=True,
            seqlens=share.seqlens,
            counters=step.counters,
            scale=self.scale,
            softcap=self.logits_soft_cap,
        )

    def _own_part(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: ElsaMetadata) -> State:
        """The batch's own tokens among themselves."""
        starts, longest = step.query_start_loc, step.max_query_len
        return attention_varlen(
            q, k, v, starts, starts, max_seqlen_q=longest, max_seqlen_k=longest, causal=True, return_state=True,
            scale=self.scale, softcap=self.logits_soft_cap,
        )  # fmt: skip
