"""Looks at a server's /metrics all through a run: no request may get lost, and memory may not grow."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from elsa_load.client import Client
from elsa_load.pages import Page
from elsa_serve.errors import UsageError


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
    memory: list[tuple[float, float]] = field(default_factory=list)  # (time, resident bytes of the server)

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
            self.memory.append((at, resident))

    def summary(self) -> dict[str, Any]:
        """`memory_growth`: mean of the last quarter over that of the second, the first being warm-up."""
        quarter = len(self.memory) // 4
        second, last = self.memory[quarter : 2 * quarter], self.memory[-quarter:] if quarter else []
        mean = [sum(value for _, value in part) / len(part) for part in (second, last) if part]
        return {
            "scrapes": self.scrapes,
            "unreachable": self.unreachable,
            "unbalanced_scrapes": len(self.unbalanced),
            # One may be a request that changed its state while the page was written; two in a row are a lost request.
            "unbalanced_in_a_row": self.longest_in_a_row,
            "largest_imbalance": max((abs(n) for _, n in self.unbalanced), default=0.0),
            "memory_growth": mean[1] / mean[0] - 1 if len(mean) == 2 else None,
            "peak_memory_bytes": max((value for _, value in self.memory), default=None),
        }
