"""What an operator can set of the server, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_SEQUENCES = 128  # prompts × n of one request, at most


@dataclass(frozen=True, slots=True)
class Settings:
    """Seconds and bytes. `served_names`: the ids clients may ask for, the first being the one answers carry; none: the
    engine's own name. `api_keys`: none means no authentication. `request_timeout_s` bounds a request's whole life.
    """

    served_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    open_metrics: bool = False
    cors_origins: tuple[str, ...] = ()
    keep_alive_interval_s: float = 15.0
    drain_timeout_s: float = 60.0
    stall_timeout_s: float = 300.0
    request_timeout_s: float | None = None
    max_body_bytes: int = 8 << 20
    max_sequences: int = MAX_SEQUENCES  # prompts × n of one request: more than the queue holds would never be taken
