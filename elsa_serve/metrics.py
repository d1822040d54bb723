"""What the records of `elsa_serve.stats` become: Prometheus metrics, a line in the log, or both.

Names carry the prefix `elsa_` and base units; no label holds anything a client sent. Every label set exists from the
start, so a rate over a counter is right from its first increment. At any time

    elsa_requests_received_total = elsa_requests_finished_total + elsa_requests_running + elsa_requests_waiting

summed over labels, a request being one sequence (n: 2 counts two).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

from elsa_serve.stats import (
    CancelLatency,
    ClientDisconnected,
    Direction,
    DiskReads,
    EngineStarted,
    EngineState,
    Gauges,
    HostAttention,
    InterTokenLatency,
    MetricsSink,
    Outcome,
    Phase,
    Preempted,
    PrefixLookup,
    Record,
    RequestFinished,
    RequestReceived,
    RequestRejected,
    ServerState,
    StepStats,
    Transfer,
    TransferObject,
)

ENDPOINTS = ("completions", "chat_completions", "generate", "other")
BACKENDS = ("elsa", "sdpa", "eager", "other")
REASONS = ("queue_full", "draining", "too_long", "body_size", "auth", "invalid")
TIERS = ("gpu", "host", "disk")
CONTEXTS = ((4096, "le_4k"), (32768, "le_32k"), (131072, "le_128k"))  # tokens, label
CONTEXT_LABELS = (*(label for _, label in CONTEXTS), "gt_128k")

# Seconds. Requests reach two hours, because a prefill of a million tokens from host memory takes minutes.
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600, 1800, 7200)
TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)
STEP_S = (*TOKEN_S, 30, 60, 180, 600)  # a layer-major prefill is one step
CANCEL_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
TOKENS = (1, 10, 100, 1000, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)

logger = logging.getLogger("elsa_serve")


class Registry(CollectorRegistry):
    """Without the `_created` series, which double every counter. The library's own switch is one for the process."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class Metrics:
    """The Prometheus sink, with a registry of its own: two servers in one process do not meet."""

    def __init__(self) -> None:
        self.registry = Registry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests()
        self._work()
        self._memory()
        self._server()
        self._lock = threading.Lock()
        self._handlers: dict[type, Callable[[Any], None]] = {
            RequestReceived: self._on_received,
            RequestRejected: self._on_rejected,
            RequestFinished: self._on_finished,
            StepStats: self._on_step,
            InterTokenLatency: lambda r: self.inter_token.observe(r.seconds),
            Gauges: self._on_gauges,
            PrefixLookup: self._on_lookup,
            Preempted: lambda r: self.preemptions.inc(r.requests),
            ClientDisconnected: lambda r: self.disconnects.labels(r.phase).inc(),
            CancelLatency: lambda r: self.cancel_latency.observe(r.seconds),
            ServerState: self._on_server_state,
            EngineStarted: self._on_started,
        }

    def record(self, *stats: Record) -> None:
        with self._lock:
            for one in stats:
                self._handlers[type(one)](one)

    def exposition(self) -> bytes:
        """The page that Prometheus scrapes, in its text format: never one from the middle of a `record`."""
        with self._lock:
            return generate_latest(self.registry)

    # Construction

    def _counter(self, name: str, text: str, **labels: Iterable[str]) -> Counter:
        return initialised(Counter(name, text, list(labels), registry=self.registry), labels)

    def _gauge(self, name: str, text: str, **labels: Iterable[str]) -> Gauge:
        return initialised(Gauge(name, text, list(labels), registry=self.registry), labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], **labels: Iterable[str]) -> Histogram:
        return initialised(Histogram(name, text, list(labels), registry=self.registry, buckets=buckets), labels)

    def _requests(self) -> None:
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.received = counter("elsa_requests_received_total", "Requests that arrived.", endpoint=ENDPOINTS)
        self.finished = counter(
            "elsa_requests_finished_total",
            "Requests that ended, by how; refused and cancelled ones included.",
            endpoint=ENDPOINTS,
            outcome=get_args(Outcome),
        )
        self.rejections = counter("elsa_admission_rejections_total", "Requests refused, by why.", reason=REASONS)
        self.running = gauge("elsa_requests_running", "Requests being computed.", phase=("prefill", "decode"))
        self.waiting = gauge("elsa_requests_waiting", "Requests in the queue.")
        self.pending = gauge(
            "elsa_prefill_pending_tokens", "Prompt tokens of queued and running requests still to compute."
        )
        self.ttft = histogram(
            "elsa_time_to_first_token_seconds",
            "From arrival at the engine to the first token, by prompt length.",
            REQUEST_S,
            ctx=CONTEXT_LABELS,
        )
        self.inter_token = histogram("elsa_inter_token_latency_seconds", "Between two tokens of a request.", TOKEN_S)
        self.per_token = histogram(
            "elsa_time_per_output_token_seconds", "Mean over a request's tokens after the first.", TOKEN_S
        )
        self.duration = histogram("elsa_request_duration_seconds", "From arrival to the end.", REQUEST_S)
        self.phases = {
            "queue_s": histogram("elsa_request_queue_seconds", "From arrival to the first pass.", REQUEST_S),
            "prefill_s": histogram(
                "elsa_request_prefill_seconds", "From the first pass to the first token.", REQUEST_S
            ),
            "decode_s": histogram("elsa_request_decode_seconds", "From the first token to the end.", REQUEST_S),
        }
        self.prompt_length = histogram("elsa_request_prompt_tokens", "Prompt length of finished requests.", TOKENS)
        self.output_length = histogram("elsa_request_output_tokens", "Tokens generated for finished requests.", TOKENS)
        self.disconnects = counter(
            "elsa_client_disconnects_total",
            "Clients gone before their answer was complete.",
            phase=("queue", "prefill", "decode"),
        )
        self.cancel_latency = histogram(
            "elsa_cancel_latency_seconds", "From an abort to the slot being free.", CANCEL_S
        )

    def _work(self) -> None:
        counter = self._counter
        self.prompt_tokens = counter("elsa_prompt_tokens_total", "Prompt tokens computed.")
        self.generation_tokens = counter("elsa_generation_tokens_total", "Tokens generated.")
        self.drafted_tokens = counter("elsa_spec_decode_draft_tokens_total", "Tokens guessed and verified.")
        self.accepted_tokens = counter("elsa_spec_decode_accepted_tokens_total", "Guessed tokens that came out.")
        self.prefix_queries = counter("elsa_prefix_cache_queries_total", "Tokens looked up in the prefix cache.")
        self.prefix_hits = counter("elsa_prefix_cache_hits_total", "Tokens whose KV the prefix cache had.")
        self.preemptions = counter(
            "elsa_preemptions_total", "Times a request gave its KV back to an older one and was computed again."
        )
        self.step_duration = self._histogram(
            "elsa_step_duration_seconds", "One pass over the layers.", STEP_S, phase=get_args(Phase)
        )
        self.predicted = counter(
            "elsa_step_predicted_seconds_total",
            "What the planner expected of the passes, each before it ran, at the host's pace in those that came "
            "before; elsa_step_duration_seconds_sum is what they took.",
            phase=get_args(Phase),
        )
        self.last_step = self._gauge(
            "elsa_last_step_timestamp_seconds", "End of the last pass, since the epoch; 0: none yet."
        )
        self.backend_steps = counter(
            "elsa_attention_backend_steps_total", "Passes, by the attention kernels that ran.", backend=BACKENDS
        )
        pairs = {"object": get_args(TransferObject), "direction": get_args(Direction)}
        self.transfer_bytes = counter(
            "elsa_offload_transfer_bytes_total", "Bytes copied between host and GPU.", **pairs
        )
        self.transfer_seconds = counter("elsa_offload_transfer_seconds_total", "Time those copies took.", **pairs)
        self.transfers = counter("elsa_offload_transfers_total", "Copies between host and GPU.", **pairs)
        one = {"object": get_args(TransferObject)}
        self.stall = counter("elsa_offload_stall_seconds_total", "Time that compute waited for copies.", **one)
        self.hidden = counter("elsa_offload_hidden_seconds_total", "Copy time covered by compute.", **one)
        # Other work for the passes' sake: attribute of StepStats -> its bytes, its seconds, compute's wait for it.
        self.beside = {
            "host_attention": (
                counter("elsa_host_attention_bytes_total", "KV in host memory that the CPU attended in place."),
                counter("elsa_host_attention_seconds_total", "Time that attention took."),
                counter("elsa_host_attention_stall_seconds_total", "Time that compute waited for it."),
            ),
            "disk": (
                counter("elsa_disk_read_bytes_total", "Weights read from disk for the passes."),
                counter("elsa_disk_read_seconds_total", "Time those reads took."),
                counter("elsa_disk_stall_seconds_total", "Time that compute waited for them."),
            ),
        }

    def _memory(self) -> None:
        gauge = self._gauge
        self.kv_used = gauge("elsa_kv_cache_used_bytes", "KV memory that requests hold.", tier=TIERS)
        self.kv_capacity = gauge("elsa_kv_cache_capacity_bytes", "KV memory there is.", tier=TIERS)
        self.kv_cached = gauge(
            "elsa_kv_cache_cached_bytes", "KV memory kept for prompts that begin alike, free when needed.", tier=TIERS
        )
        # The planner names the parts, and a part may move from one tier to the other with the budget.
        self.gpu_memory = gauge("elsa_gpu_memory_bytes", "GPU memory as planned, by use.", kind=())
        self.host_memory = gauge("elsa_host_memory_bytes", "Host memory as planned, by use.", kind=())
        self.planned = gauge(
            "elsa_plan_seconds",
            "As planned: the first token of a prompt of the full context, and a token at its end.",
            kind=("first_token", "token"),
        )

    def _server(self) -> None:
        gauge = self._gauge
        self.state = gauge("elsa_engine_state", "1 for what /readyz answers now.", state=get_args(EngineState))
        self.open_requests = gauge("elsa_server_open_requests", "HTTP requests for tokens not answered to the end yet.")
        self.startup = gauge("elsa_startup_seconds", "From the start of loading until ready.")
        self.build = gauge("elsa_build_info", "Versions, as labels.", version=(), torch=(), cuda=(), gpu=())
        self.config = gauge(
            "elsa_engine_config_info", "The model served.", model=(), dtype=(), attention=(), context=()
        )

    # Records

    def _on_received(self, record: RequestReceived) -> None:
        self.received.labels(known(record.endpoint, ENDPOINTS)).inc()

    def _on_rejected(self, record: RequestRejected) -> None:
        """A refused request has arrived and ended at once."""
        endpoint = known(record.endpoint, ENDPOINTS)
        self.received.labels(endpoint).inc()
        self.finished.labels(endpoint, record.outcome).inc()
        self.rejections.labels(record.reason).inc()

    def _on_finished(self, record: RequestFinished) -> None:
        self.finished.labels(known(record.endpoint, ENDPOINTS), record.outcome).inc()
        self.duration.observe(record.duration_s)
        self.prompt_length.observe(record.prompt_tokens)
        self.output_length.observe(record.output_tokens)
        for name, histogram in self.phases.items():
            seconds = getattr(record, name)
            if seconds is not None:
                histogram.observe(seconds)
        if record.ttft_s is not None:
            label = next((label for limit, label in CONTEXTS if record.prompt_tokens <= limit), CONTEXT_LABELS[-1])
            self.ttft.labels(label).observe(record.ttft_s)
        if record.decode_s is not None and record.output_tokens > 1:
            self.per_token.observe(record.decode_s / (record.output_tokens - 1))

    def _on_step(self, record: StepStats) -> None:
        self.step_duration.labels(record.phase).observe(record.duration_s)
        self.prompt_tokens.inc(record.prompt_tokens)
        self.generation_tokens.inc(record.generated_tokens)
        self.drafted_tokens.inc(record.drafted_tokens)
        self.accepted_tokens.inc(record.accepted_tokens)
        self.backend_steps.labels(known(record.attention_backend.partition(".")[0], BACKENDS)).inc()
        self.last_step.set(time.time())
        self.predicted.labels(record.phase).inc(record.predicted_s)
        for transfer in record.transfers:
            self._on_transfer(transfer)
        for name, (nbytes, seconds, stall) in self.beside.items():
            work: HostAttention | DiskReads | None = getattr(record, name)
            if work is not None:
                nbytes.inc(work.bytes)
                seconds.inc(work.seconds)
                stall.inc(work.stall_s)

    def _on_transfer(self, transfer: Transfer) -> None:
        labels = (transfer.object, transfer.direction)
        self.transfer_bytes.labels(*labels).inc(transfer.bytes)
        self.transfer_seconds.labels(*labels).inc(transfer.seconds)
        self.transfers.labels(*labels).inc(transfer.count)
        self.stall.labels(transfer.object).inc(transfer.stall_s)
        self.hidden.labels(transfer.object).inc(transfer.hidden_s)

    def _on_gauges(self, record: Gauges) -> None:
        self.running.labels("prefill").set(record.running_prefill)
        self.running.labels("decode").set(record.running_decode)
        self.waiting.set(record.waiting)
        self.pending.set(record.pending_prefill_tokens)
        for gauge, values in (
            (self.kv_used, record.kv_used_bytes),
            (self.kv_capacity, record.kv_capacity_bytes),
            (self.kv_cached, record.kv_cached_bytes),
            (self.gpu_memory, record.gpu_bytes),
            (self.host_memory, record.host_bytes),
            (self.planned, record.planned_s),
        ):
            for label, value in values.items():
                gauge.labels(label_of(label)).set(value)

    def _on_lookup(self, record: PrefixLookup) -> None:
        self.prefix_queries.inc(record.tokens)
        self.prefix_hits.inc(record.hits)

    def _on_server_state(self, record: ServerState) -> None:
        for state in get_args(EngineState):
            self.state.labels(state).set(state == record.state)
        self.open_requests.set(record.open_requests)

    def _on_started(self, record: EngineStarted) -> None:
        self.startup.set(record.startup_s)
        self.build.labels(*(record.versions.get(name, "") for name in ("version", "torch", "cuda", "gpu"))).set(1)
        self.config.labels(record.model, record.dtype, record.attention, str(record.max_context)).set(1)


def initialised(metric: Any, labels: dict[str, Iterable[str]]) -> Any:
    """Make every combination of label values exist, at zero. Labels whose values are not known ahead come as ()."""
    if labels:
        for values in product(*labels.values()):
            metric.labels(*values)
    return metric


def known(value: str, values: tuple[str, ...]) -> str:
    return value if value in values else "other"


def label_of(name: str) -> str:
    return "_".join(name.lower().split())


class LogSink:
    """One line of throughput every `interval_s` of activity; silent while nothing happens."""

    def __init__(self, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s, self._clock = interval_s, clock
        self._lock = threading.Lock()
        self._running = self._waiting = 0
        self._end = clock()  # of the last pass
        self._reset(self._end)

    def _reset(self, now: float) -> None:
        self._since = now
        self._prompt = self._generated = 0
        self._step_s = self._stall_s = 0.0

    def record(self, *stats: Record) -> None:
        with self._lock:
            for one in stats:
                self._take(one)

    def _take(self, stats: Record) -> None:
        if isinstance(stats, Gauges):
            self._running, self._waiting = stats.running_prefill + stats.running_decode, stats.waiting
        elif isinstance(stats, StepStats):
            now = self._clock()
            began = now - stats.duration_s
            if began - self._end > self._interval_s:  # an idle hour is no part of anybody's tokens a second
                self._report(self._end)
                self._reset(began)
            self._end = now
            self._prompt += stats.prompt_tokens
            self._generated += stats.generated_tokens
            self._step_s += stats.duration_s
            self._stall_s += sum(transfer.stall_s for transfer in stats.transfers)
            if now - self._since >= self._interval_s:
                self._report(now)
                self._reset(now)

    def _report(self, now: float) -> None:
        """One line on the passes since the last, if there were any."""
        if not self._step_s:
            return
        elapsed = now - self._since
        logger.info(
            "prompt %.1f, generation %.1f tokens/s, running %d, waiting %d, stalled %.0f %% of %.1f s of passes",
            self._prompt / elapsed,
            self._generated / elapsed,
            self._running,
            self._waiting,
            100 * self._stall_s / self._step_s,
            self._step_s,
        )


class Tee:
    """Several sinks as one."""

    def __init__(self, *sinks: MetricsSink) -> None:
        self._sinks = sinks

    def record(self, *stats: Record) -> None:
        for sink in self._sinks:
            sink.record(*stats)
