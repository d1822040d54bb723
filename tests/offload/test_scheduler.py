"""Who is in the next pass, who waits, and what a full queue says."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from elsa_serve.errors import QueueFull
from elsa_serve.offload.kv import KVPool, KVShape
from elsa_serve.offload.scheduler import PassTokens, Scheduler, Sequence, Work
from elsa_serve.protocol import GenerationRequest, SamplingParams

SHAPE = KVShape(layers=2, kv_heads=1, head_dim=64, dtype=torch.float32)  # 1 KiB a token in both layers


def sequence(name: str, prompt: int = 4, max_tokens: int = 1, deadline_s: float | None = None) -> Sequence:
    request = GenerationRequest(name, [0] * prompt, SamplingParams(max_tokens=max_tokens), deadline_s=deadline_s)
    unused: Any = None  # neither sampling nor text is the scheduler's business
    return Sequence(request, unused, unused, unused, time.monotonic())


def scheduler(
    kv_tokens: int = 100, max_batch: int = 8, max_queue: int = 8, alone: int = 100, beside: int = 100
) -> Scheduler:
    storage = torch.zeros(kv_tokens * SHAPE.block_nbytes(1) * SHAPE.layers, dtype=torch.uint8)
    pool = KVPool(SHAPE, storage, torch.empty(0, dtype=torch.uint8))
    return Scheduler(pool, max_batch=max_batch, max_queue=max_queue, pass_tokens=PassTokens(alone, beside))


def names(sequences: list[Sequence]) -> list[str]:
    return [s.request.request_id for s in sequences]


def admit(target: Scheduler) -> list[Sequence]:
    """The sequences that join with the next pass, whose tokens then count as computed."""
    before = target.running()
    run(target.next_pass().work)
    return [s for s in target.running() if s not in before]


def run(work: list[Work]) -> None:
    """What a pass does to its sequences: their KV grows, and those whose tokens are all there get another one."""
    for share in work:
        assert share.sequence.kv is not None
        share.sequence.kv.length += len(share.tokens)
        if share.rows:
            share.sequence.tokens.append(7)


def fill(target: Scheduler, *sequences: Sequence) -> None:
    for s in sequences:
        target.add(s)


def test_first_come_first_served_up_to_the_batch() -> None:
    target = scheduler(max_batch=2)
    fill(target, sequence("a"), sequence("b"), sequence("c"))
    first = admit(target)
    assert names(first) == ["a", "b"]
    assert admit(target) == []
    target.finish(first[0])
    assert names(admit(target)) == ["c"]
    assert names(target.running()) == ["b", "c"]


def test_a_large_head_is_not_overtaken() -> None:
    target = scheduler(kv_tokens=30)
    fill(target, sequence("a", 20), sequence("large", 25), sequence("small", 2))
    first = admit(target)
    assert names(first) == ["a"]
    assert admit(target) == []
    target.finish(first[0])
    assert names(admit(target)) == ["large", "small"]


def test_kv_is_held_for_prompt_and_output_and_given_back() -> None:
    target = scheduler(kv_tokens=30)
    fill(target, sequence("a", prompt=10, max_tokens=11))
    (admitted,) = admit(target)
    assert admitted.kv is not None
    assert admitted.kv.capacity == 20
    fill(target, sequence("b", prompt=11))
    assert admit(target) == []
    target.finish(admitted)
    assert admitted.kv is None
    assert names(admit(target)) == ["b"]


def shares(work: list[Work]) -> list[tuple[str, int, int]]:
    return [(share.sequence.request.request_id, len(share.tokens), share.rows) for share in work]


def test_prompts_share_a_pass_up_to_its_tokens_and_long_ones_come_in_even_rounds() -> None:
    target = scheduler(kv_tokens=1000, alone=10, beside=10)
    fill(target, sequence("long", 25), sequence("b", 6), sequence("c", 4), sequence("d", 1))
    seen = []
    while any(s.prefilling for s in (*target.running(), *target.waiting())):
        work = target.next_pass().work
        seen.append([share for share in shares(work) if share[0] in ("long", "b")])
        assert sum(len(share.tokens) for share in work if share.prefilling) <= 10
        run(work)
    assert seen == [
        [("long", 9, 0), ("b", 1, 0)],  # three even rounds, none of them a rest of five
        [("long", 8, 0), ("b", 2, 0)],
        [("long", 8, 1), ("b", 2, 0)],
        [("long", 1, 1), ("b", 1, 1)],
    ]
    assert names(target.running()) == ["long", "b", "c", "d"]


def test_a_prompt_beside_decodes_comes_in_smaller_pieces_and_every_decode_is_in_every_pass() -> None:
    target = scheduler(kv_tokens=1000, alone=100, beside=8)
    fill(target, sequence("a", 3, max_tokens=50), sequence("b", 2, max_tokens=50))
    assert len(admit(target)) == 2
    fill(target, sequence("long", 30, max_tokens=50))
    seen = []
    for _ in range(4):
        work = target.next_pass().work
        assert shares(work)[:2] == [("a", 1, 1), ("b", 1, 1)]
        seen += [share.tokens for share in work[2:]]
        run(work)
    assert [len(tokens) for tokens in seen] == [8, 8, 7, 7]
    assert not target.running()[2].prefilling


def test_a_full_queue_says_how_long_a_place_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    target = scheduler(max_batch=1, max_queue=2)
    fill(target, sequence("a"))
    admit(target)
    fill(target, sequence("b"), sequence("c"))
    with pytest.raises(QueueFull, match="2 requests wait") as caught:
        target.add(sequence("d"))
    assert caught.value.retry_after_s == 1.0
    for name in ("e", "f"):
        clock[0] += 30.0
        target.finish(target.running()[0])
        admit(target)
        fill(target, sequence(name))
    with pytest.raises(QueueFull) as caught:
        target.add(sequence("g"))
    assert caught.value.retry_after_s == pytest.approx(30.0)


def test_idle_time_does_not_count_as_slow_service(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    target = scheduler()
    for name in ("a", "b"):
        fill(target, sequence(name))
        target.finish(admit(target)[0])
        clock[0] += 5000.0
    assert target.retry_after_s() == 1.0


def test_cancelling_marks_waiting_and_running_alike() -> None:
    target = scheduler(max_batch=1)
    fill(target, sequence("a"), sequence("b"))
    admit(target)
    assert target.cancel("a")
    assert target.cancel("b")
    assert not target.cancel("unknown")
    assert [s.ending() for s in (*target.running(), *target.waiting())] == ["cancelled", "cancelled"]
    target.finish(target.running()[0])
    assert not target.cancel("a")


def test_a_deadline_counts_from_arrival() -> None:
    late, early = sequence("late", deadline_s=0.0), sequence("early", deadline_s=60.0)
    time.sleep(0.001)
    assert late.ending() == "timeout"
    assert early.ending() is None


def test_counts_and_pending_tokens() -> None:
    target = scheduler(max_batch=2, alone=5)
    fill(target, sequence("a", 5), sequence("b", 7), sequence("c", 9))
    admit(target)
    target.next_pass()
    assert target.counts() == (1, 1, 1)
    assert target.pending_prefill_tokens() == 16
    assert not target.idle()
    for s in (*target.running(), *target.waiting()):
        target.finish(s)
    assert target.idle()
    assert target.counts() == (0, 0, 0)


def test_the_prompt_is_fed_first_and_then_the_last_token() -> None:
    target = scheduler()
    fill(target, sequence("a", prompt=3, max_tokens=5))
    work = target.next_pass().work
    assert [(share.tokens, share.rows, share.prefilling) for share in work] == [([0, 0, 0], 1, True)]
    run(work)
    assert [(share.tokens, share.rows, share.prefilling) for share in target.next_pass().work] == [([7], 1, False)]
