"""Drive a plan against one endpoint: on schedule (open) or with a fixed number of clients (closed)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from tqdm import tqdm

from elsa_load.client import Client, Prepared
from elsa_load.records import Observation, Request


@dataclass(slots=True)
class Run:
    """What was seen, in the order of the plan. `wall_s`: from the first sending to the last end."""

    observations: list[Observation]
    wall_s: float
    started: float  # seconds since the epoch


async def run(
    client: Client, requests: Sequence[Request], *, concurrency: int | None = None, progress: bool = False
) -> Run:
    """Run every request. `concurrency` None: open, each at its `at_s`. Turns of a session follow one another."""
    prepared = [client.prepare(request) for request in requests]
    chains = sessions(prepared)
    bar = tqdm(total=len(requests), desc="requests", disable=not progress)
    seen: dict[str, Observation] = {}
    started, epoch = time.time(), time.perf_counter()

    async def follow(chain: list[Prepared]) -> None:
        for turn, one in enumerate(chain):
            await asyncio.sleep(max(0.0, (one.request.at_s or 0.0) - (time.perf_counter() - epoch)))
            observation = await client.send(one, epoch)
            if turn:  # it waited for the turn before it, not for the schedule
                observation.due_s = None
            seen[one.request.id] = observation
            bar.update()

    try:
        if concurrency is None:
            await asyncio.gather(*(follow(chain) for chain in chains))
        else:
            await workers([partial(follow, chain) for chain in chains], concurrency)
    finally:
        bar.close()
    wall_s = time.perf_counter() - epoch
    return Run([seen[request.id] for request in requests], wall_s, started)


def sessions(prepared: Sequence[Prepared]) -> list[list[Prepared]]:
    """Requests that run one after the other, as lists; most lists hold one."""
    keyed = [
        (one.request.session if one.request.session is not None else f"alone {i}", one)
        for i, one in enumerate(prepared)
    ]
    return [[one for _, one in group] for _, group in groupby(keyed, key=lambda pair: pair[0])]


async def workers(jobs: Sequence[Callable[[], Awaitable[None]]], count: int) -> None:
    """Run the jobs in order, `count` at a time."""
    queue = list(reversed(jobs))

    async def work() -> None:
        while queue:
            await queue.pop()()

    await asyncio.gather(*(work() for _ in range(count)))
