"""What a server's own /metrics page says, read as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Page:
    """One scrape: (name, labels, value) of every sample."""

    samples: tuple[tuple[str, dict[str, str], float], ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Page:
        families = text_string_to_metric_families(text)
        return cls(tuple((s.name, dict(s.labels), s.value) for family in families for s in family.samples))

    def total(self, name: str, **labels: str) -> float:
        """The sum over the series that carry these labels; 0 where there are none."""
        return sum(v for n, found, v in self.samples if n == name and labels.items() <= found.items())

    def labels(self, name: str) -> dict[str, str]:
        """The labels of an info metric; empty where it is missing."""
        return next((found for n, found, value in self.samples if n == name and value), {})

    @property
    def unaccounted(self) -> float:
        """Received − finished − running − waiting: 0 on a server that loses no request."""
        return (
            self.total("elsa_requests_received_total")
            - self.total("elsa_requests_finished_total")
            - self.total("elsa_requests_running")
            - self.total("elsa_requests_waiting")
        )


def growth(before: Page, after: Page) -> dict[str, Any]:
    """What the offload engine did between two scrapes; bytes and seconds. Zeros on servers without these metrics."""

    def grown(name: str, **labels: str) -> float:
        return after.total(name, **labels) - before.total(name, **labels)

    compute = grown("elsa_step_duration_seconds_sum")
    stall = grown("elsa_offload_stall_seconds_total")
    return {
        "h2d_bytes": grown("elsa_offload_transfer_bytes_total", direction="h2d"),
        "d2h_bytes": grown("elsa_offload_transfer_bytes_total", direction="d2h"),
        "stall_s": stall,
        "hidden_s": grown("elsa_offload_hidden_seconds_total"),
        "steps_s": compute,
        "stall_share": stall / compute if compute else None,
    }
