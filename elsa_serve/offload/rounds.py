"""How many prompt tokens a pass takes, from the plan's rates.

Alone, a prompt passes the layers in rounds that copying stays hidden in: each copies the streamed weights and the KV
that lies in host memory once more, so it must compute for longer than that takes, and the device rests for some
milliseconds at its end. What a finished round has computed survives a cancellation or a timeout. Beside running
decodes, a round is what the device can compute while the decode pass waits for its copies or for its issue, so that
decodes hardly feel it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elsa_serve.errors import UsageError
from elsa_serve.offload.predict import Share, device_seconds
from elsa_serve.offload.scheduler import PassTokens

if TYPE_CHECKING:
    from elsa_serve.offload.plan import Plan

HIDDEN = 2.0  # a round computes for this many times its copies' duration
ROUND_S = 4.0  # and for so long: rounds are few, and what a cancelled prompt loses is little
LEAST = 256  # tokens: fewer would not keep a GPU busy
CPU_BESIDE = 512  # tokens beside decodes on a CPU, whose rates are not measured


def pass_tokens(plan: Plan, alone: int | None = None, beside_decode: int | None = None) -> PassTokens:
    """The limits asked for, or those that the plan's rates suggest, as far as the plan has memory for their hidden
    states. Raises UsageError for limits under 1.
    """
    for flag, value in (("--prefill-round-tokens", alone), ("--max-num-batched-tokens", beside_decode)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}: at least 1 is needed")
    if alone is None:
        alone = round_tokens(plan)
    if beside_decode is None:
        beside_decode = CPU_BESIDE if plan.device_type == "cpu" else _computed_in(plan, _decode_seconds(plan))
    alone = min(alone, plan.round_tokens)
    return PassTokens(alone, min(alone, beside_decode))


def round_tokens(plan: Plan) -> int:
    """Prompt tokens of a pass without decodes."""
    if plan.device_type == "cpu":
        return plan.round_tokens
    return min(plan.round_tokens, max(plan.chunk_tokens, _computed_in(plan, max(ROUND_S, _copies(plan)))))


def rounds_of(plan: Plan, tokens: int) -> list[Share]:
    """The passes of a prompt alone."""
    count = -(-tokens // round_tokens(plan))
    size = -(-tokens // count)
    return [Share(done, min(size, tokens - done)) for done in range(0, tokens, size)]


def _copies(plan: Plan) -> float:
    """Seconds that a round's copies and its reads from disk need, with some to spare."""
    host_kv = plan.geometry.kv_bytes(plan.context) - min(plan.kv_gpu_bytes, plan.geometry.kv_bytes(plan.context))
    return HIDDEN * max((plan.streamed_bytes + host_kv) / plan.rates.h2d, plan.disk_bytes / plan.rates.disk)


def _decode_seconds(plan: Plan) -> float:
    """Of a decode pass that a prompt joins: no graph holds it, so it takes as long as its issue at least."""
    return max(plan.s_per_token, plan.geometry.layers * plan.rates.layer_s + plan.rates.pass_s)


def _computed_in(plan: Plan, seconds: float) -> int:
    """Prompt tokens, in the middle of the context, that the device computes in so long."""
    whole = device_seconds(plan.geometry, plan.rates, [Share(0, plan.context)], plan.device_type == "cuda")
    return max(LEAST, int(plan.context * seconds / whole))
