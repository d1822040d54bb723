"""What the engine reports as it works: plain records, taken by `elsa_serve.metrics.Metrics.record`.

Seconds and bytes throughout. Nothing here imports a metrics library, so the engine's hot path depends on none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

EngineState = Literal["loading", "ready", "draining", "stalled", "failed"]
Outcome = Literal["ok", "length", "cancelled", "rejected", "client_error", "server_error", "timeout"]
TransferObject = Literal["weights", "kv"]
Direction = Literal["h2d", "d2h"]
Phase = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True)
class RequestReceived:
    endpoint: str


@dataclass(frozen=True, slots=True)
class RequestRejected:
    """Refused before it reached the engine, or by its admission control."""

    endpoint: str
    reason: Literal["queue_full", "draining", "too_long", "body_size", "auth", "invalid"]
    outcome: Outcome = "rejected"


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """The end of a received request. Times are None where the phase was never reached."""

    endpoint: str
    outcome: Outcome
    prompt_tokens: int
    output_tokens: int
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    ttft_s: float | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copies of one kind over one step: stall is the time compute waited for them, hidden the rest of `seconds`."""

    object: TransferObject
    direction: Direction
    bytes: int
    seconds: float
    stall_s: float
    hidden_s: float
    count: int = 1


@dataclass(frozen=True, slots=True)
class HostAttention:
    """Attention over KV in host memory over one step: bytes read, the host's seconds, and for how long compute waited.

    `calls` counts requests times layers.
    """

    bytes: int
    seconds: float
    stall_s: float
    calls: int


@dataclass(frozen=True, slots=True)
class DiskReads:
    """Layers read from disk over one step: bytes, the reading threads' seconds, and for how long compute waited."""

    bytes: int
    seconds: float
    stall_s: float


@dataclass(frozen=True, slots=True)
class StepStats:
    """One pass over the layers. `planned_s` is what the planner expects of it, from rates measured before the first
    pass; `predicted_s` the same at the pace of the host in the passes before this one. 0: nothing."""

    phase: Phase
    duration_s: float
    prompt_tokens: int
    generated_tokens: int
    attention_backend: str
    transfers: tuple[Transfer, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    host_attention: HostAttention | None = None
    planned_s: float = 0.0
    predicted_s: float = 0.0
    disk: DiskReads | None = None


@dataclass(frozen=True, slots=True)
class InterTokenLatency:
    seconds: float


@dataclass(frozen=True, slots=True)
class Gauges:
    """The engine's state now."""

    running_prefill: int
    running_decode: int
    waiting: int
    pending_prefill_tokens: int
    kv_used_bytes: dict[str, int] = field(default_factory=dict)
    kv_capacity_bytes: dict[str, int] = field(default_factory=dict)
    kv_cached_bytes: dict[str, int] = field(default_factory=dict)  # kept for later prompts, free when needed
    gpu_bytes: dict[str, int] = field(default_factory=dict)  # weights, kv, workspace, free
    host_bytes: dict[str, int] = field(default_factory=dict)  # requested, pinned, pageable, cgroup_limit
    planned_s: dict[str, float] = field(default_factory=dict)  # first_token of a full context, token at its end


@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """A request that joined: tokens it needed, and those whose KV the prefix cache had."""

    tokens: int
    hits: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """Requests that gave their KV back for older ones, to be computed again."""

    requests: int


@dataclass(frozen=True, slots=True)
class ClientDisconnected:
    """A client went away before its answer was complete; the request itself ends as cancelled."""

    phase: Literal["queue", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class CancelLatency:
    """From the abort of a request to its last event, when its slot is free again."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ServerState:
    """What /readyz answers now, and the requests still open (the rest of a drain)."""

    state: EngineState
    open_requests: int


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """Once, when the engine is ready: what is being served, on what, and how long the start took."""

    model: str
    dtype: str
    attention: str
    max_context: int
    startup_s: float
    versions: dict[str, str] = field(default_factory=dict)  # version, torch, cuda, gpu


Record = (
    RequestReceived
    | RequestRejected
    | RequestFinished
    | StepStats
    | InterTokenLatency
    | Gauges
    | PrefixLookup
    | Preempted
    | ClientDisconnected
    | CancelLatency
    | ServerState
    | EngineStarted
)


class MetricsSink(Protocol):
    def record(self, *stats: Record) -> None:
        """Take records; those of one call belong together, and nobody sees some of them without the others.

        Called from the engine's thread and from the server's: thread-safe and quick.
        """
        ...


class NullSink:
    def record(self, *stats: Record) -> None:
        return None


class Steps:
    """Keeps the passes, for whoever measures an engine."""

    def __init__(self) -> None:
        self.passes: list[StepStats] = []

    def record(self, *stats: Record) -> None:
        self.passes += [one for one in stats if isinstance(one, StepStats)]
