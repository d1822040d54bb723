"""Looks at a server's /metrics all through a run: no request may get lost, and memory may not grow."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from elsa_load.client import Client
from elsa_load.pages import Page
from elsa_serve.errors import UsageError

KEPT = 240  # points of a life's memory in a summary


@dataclass(slots=True)
class Life:
    """One process of the server: a restart begins another, whose memory starts anew."""

    born: float  # seconds since the epoch; 0 where the server does not tell
    memory: list[tuple[float, float]] = field(default_factory=list)  # (time, resident bytes)

    @property
    def seconds(self) -> float:
        return self.memory[-1][0] - self.memory[0][0]

    @property
    def growth(self) -> float | None:
        """Mean of the last quarter over that of the second, the first being warm-up, less 1; None for a short life."""
        quarter = len(self.memory) // 4
        if not quarter:
            return None
        second, last = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        return sum(value for _, value in last) / sum(value for _, value in second) - 1

    @property
    def slope(self) -> float | None:
        """Bytes a second through the second half, by least squares; None for a short life."""
        half = self.memory[len(self.memory) // 2 :]
        if len(half) < 2:
            return None
        mean_at, mean = (sum(column) / len(half) for column in zip(*half))
        spread = sum((at - mean_at) ** 2 for at, _ in half)
        return sum((at - mean_at) * (value - mean) for at, value in half) / spread

    def summary(self) -> dict[str, Any]:
        """Memory is thinned out to at most `KEPT` points, for the plot."""
        step = -(-len(self.memory) // KEPT)
        return {
            "seconds": self.seconds,
            "memory_growth": self.growth,
            "bytes_per_hour": self.slope * 3600 if self.slope is not None else None,
            "memory": self.memory[::step],
        }


@dataclass(slots=True)
class Watch:
    """Scrapes every `interval_s` until cancelled; a server that is being restarted is counted as unreachable."""

    client: Client
    interval_s: float = 1.0
    scrapes: int = 0
    unreachable: int = 0
    unbalanced: list[tuple[float, float]] = field(default_factory=list)  # (time, requests unaccounted for)
    in_a_row: int = 0
    longest_in_a_row: int = 0
    lives: list[Life] = field(default_factory=list)  # of the server's processes, one after the other

    async def run(self) -> None:
        start = time.monotonic()
        while True:
            try:
                self._take(time.monotonic() - start, Page.parse(await self.client.get_text("/metrics")))
            except UsageError:
                self.unreachable += 1
            await asyncio.sleep(self.interval_s)

    def _take(self, at: float, page: Page) -> None:
        self.scrapes += 1
        self.in_a_row = self.in_a_row + 1 if page.unaccounted else 0
        self.longest_in_a_row = max(self.longest_in_a_row, self.in_a_row)
        if page.unaccounted:
            self.unbalanced.append((at, page.unaccounted))
        resident = page.total("process_resident_memory_bytes")
        if resident:
            born = page.total("process_start_time_seconds")
            if not self.lives or self.lives[-1].born != born:
                self.lives.append(Life(born))
            self.lives[-1].memory.append((at, resident))

    def summary(self) -> dict[str, Any]:
        """`memory_growth` is that of the server's longest life; `lives` has every one."""
        longest = max(self.lives, key=lambda life: life.seconds, default=None)
        return {
            "scrapes": self.scrapes,
            "unreachable": self.unreachable,
            "unbalanced_scrapes": len(self.unbalanced),
            # One may be a request that changed its state while the page was written; two in a row are a lost request.
            "unbalanced_in_a_row": self.longest_in_a_row,
            "largest_imbalance": max((abs(n) for _, n in self.unbalanced), default=0.0),
            "memory_growth": longest.growth if longest is not None else None,
            "peak_memory_bytes": max((value for life in self.lives for _, value in life.memory), default=None),
            "lives": [life.summary() for life in self.lives],
        }
