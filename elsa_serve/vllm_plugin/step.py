"""One engine step as the host knows it: phases and lengths. No vLLM, no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

Phase = Literal["prefill", "decode", "mixed"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "mixed")


@dataclass(frozen=True, slots=True)
class Step:
    """Queries and keys of one batch. A row is a prefill row while its prompt is incomplete, or where it brings more
    tokens than a decode or verification step does."""

    phase: Phase
    prefill_tokens: int
    decode_tokens: int
    # Tokens of each row's query and of its KV, as far as they are exact on the host; None where they are not.
    query_lens: tuple[int, ...] | None
    kv_lens: tuple[int, ...] | None
    # KV tokens that rows in decode attend to (an upper bound where lengths are not exact): what splits are counted by.
    decode_kv_lens: tuple[int, ...]


def describe(
    query_start_loc: torch.Tensor,
    kv_lens: torch.Tensor | None,
    is_prefilling: torch.Tensor | None,
    *,
    decode_tokens_per_row: int = 1,
    exact_decode_lens: bool = True,
) -> Step:
    """The step of a batch: query_start_loc [B + 1] and kv_lens [B] int32, is_prefilling [B] bool, all on the host.

    decode_tokens_per_row: 1, or 1 + the number of speculative tokens. exact_decode_lens: False where kv_lens are upper
    bounds for rows in decode (asynchronous scheduling of drafts); then lengths count as known only if all rows prefill.
    """
    starts = query_start_loc.tolist()
    queries = tuple(after - before for before, after in pairwise(starts))
    flags = is_prefilling.tolist() if is_prefilling is not None else [False] * len(queries)
    prefills = [n > 0 and (flag or n > decode_tokens_per_row) for n, flag in zip(queries, flags)]
    decodes = [n > 0 and not prefill for n, prefill in zip(queries, prefills)]
    keys = tuple(kv_lens.tolist()) if kv_lens is not None else None
    known = keys is not None and (exact_decode_lens or not any(decodes))
    phase: Phase = "mixed" if any(prefills) and any(decodes) else "prefill" if any(prefills) else "decode"
    return Step(
        phase=phase,
        prefill_tokens=sum(n for n, prefill in zip(queries, prefills) if prefill),
        decode_tokens=sum(n for n, decode in zip(queries, decodes) if decode),
        query_lens=queries if known else None,
        kv_lens=keys if known else None,
        decode_kv_lens=tuple(k for k, decode in zip(keys, decodes) if decode) if keys is not None else (),
    )
