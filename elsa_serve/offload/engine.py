"""The offload engine: one thread that turns requests into passes over streamed layers, and rows of logits into text."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elsa_serve.errors import BudgetError, ContextTooLong, EngineDraining, EngineFailed, QueueFull, UsageError
from elsa_serve.offload import attention as attentions
from elsa_serve.offload import device as devices
from elsa_serve.offload.loading import EngineOptions, LoadedModel, load
from elsa_serve.offload.output import OutputText
from elsa_serve.offload.sampling import BadLogits, Draw, Sampler
from elsa_serve.offload.scheduler import Scheduler, Sequence
from elsa_serve.offload.step import Part, PassAbandoned, Throttle
from elsa_serve.protocol import (
    EngineState,
    EngineStats,
    Event,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PrefillProgress,
    TokenEvent,
    TokenLogprob,
)
from elsa_serve.stats import (
    Gauges,
    InterTokenLatency,
    MetricsSink,
    NullSink,
    Outcome,
    Phase,
    RequestFinished,
    RequestReceived,
    RequestRejected,
    StepStats,
)

PROGRESS_S = 0.5  # between two progress events of a request
SWEEP_S = 0.05  # between two looks at the waiting requests while a pass runs
STALL_S = 60.0  # without a sign of life from a pass: the engine calls itself stalled
MAX_FAILURES = 3  # passes in a row that fail for another reason than memory: the engine gives up
JOIN_S = 60.0  # for the engine's thread to end

OUTCOMES: dict[FinishReason, Outcome] = {
    "stop": "ok", "length": "length", "cancelled": "cancelled", "timeout": "timeout", "error": "server_error",
}  # fmt: skip

logger = logging.getLogger(__name__)


class OffloadEngine:
    """Serves one model whose layers stream through the device. Implements `elsa_serve.protocol.Engine`.

    Options are those of `EngineOptions`. Raises CheckpointError, BudgetError or UsageError where they cannot work.
    """

    def __init__(
        self,
        model_dir: Path | str,
        *,
        name: str | None = None,
        sink: MetricsSink | None = None,
        max_queue: int = 64,
        **options: Any,
    ) -> None:
        self._options = EngineOptions(model_dir=Path(model_dir), **options)
        self._sink = sink if sink is not None else NullSink()
        devices.require_exact_matmul()
        self._loaded: LoadedModel = load(self._options)
        plan = self._loaded.plan
        self.plan, self.tokenizer = plan, self._loaded.tokenizer
        self.info = ModelInfo(
            name=name or self._options.model_dir.resolve().name,
            max_context=plan.context,
            vocab_size=self._loaded.vocab_size,
            created=int(time.time()),
            dtype=str(self._loaded.weights.dtype).removeprefix("torch."),
            attention=self._options.attention,
        )
        self._scheduler = Scheduler(
            self._loaded.pool, max_batch=self._options.max_batch, max_queue=max_queue, pass_tokens=plan.context
        )
        # Guards state changes together with the records that tell of them, so that at every moment
        # received = finished + running + waiting in what the sink has seen.
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._state: EngineState = "ready"
        self._detail = ""
        self._stopping = self._closed = False
        self._arrivals = self._failures = 0
        self._alive = time.monotonic()  # the last sign of life of the engine's thread
        self._swept = 0.0
        self._last_step: float | None = None
        self._peak_device_used = 0
        self._loaded.runner.poll = self._poll
        self._sink.record(self._gauges())
        self._thread = threading.Thread(target=self._run, name="elsa-engine", daemon=True)
        self._thread.start()

    # --- any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        with self._lock:
            self._check_open(request)
            self._check_request(request)
            prompt, sampling = request.prompt_token_ids, request.sampling
            output = OutputText(self.tokenizer, prompt, sampling.stop, sampling.min_tokens)
            sampler = Sampler(sampling, self._loaded.eos_ids, self._options.seed + self._arrivals)
            sequence = Sequence(request, on_event, sampler, output, time.monotonic())
            try:
                self._scheduler.add(sequence)
            except QueueFull:
                self._sink.record(RequestRejected(request.endpoint, "queue_full"))
                raise
            self._arrivals += 1
            self._sink.record(RequestReceived(request.endpoint), self._gauges())
            self._work.notify_all()

    def _check_open(self, request: GenerationRequest) -> None:
        if self._state == "failed":
            raise EngineFailed(f"the engine has failed and must be restarted: {self._detail}")
        if self._state == "draining":
            self._sink.record(RequestRejected(request.endpoint, "draining"))
            raise EngineDraining("the engine is shutting down and takes no new requests")

    def _check_request(self, request: GenerationRequest) -> None:
        """Raise for a request that can never run, and record why."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        try:
            if len(prompt) + max(1, sampling.max_tokens) > self.info.max_context:
                raise ContextTooLong(self.info.max_context, len(prompt), sampling.max_tokens)
            if not prompt:
                raise UsageError("the prompt is empty: at least one token is needed")
            if sampling.max_tokens < 1:
                raise UsageError(f"max_tokens is {sampling.max_tokens}: at least 1 is needed")
            if min(prompt) < 0 or max(prompt) >= self.info.vocab_size:
                raise UsageError(f"the prompt has token ids outside 0 … {self.info.vocab_size - 1}")
            if request.request_id in self._scheduler:
                raise UsageError(f"a request with id {request.request_id!r} is already under way")
            self._loaded.pool.check(len(prompt) + sampling.max_tokens - 1)
        except (ContextTooLong, BudgetError):
            self._sink.record(RequestRejected(request.endpoint, "too_long", "client_error"))
            raise
        except UsageError:
            self._sink.record(RequestRejected(request.endpoint, "invalid", "client_error"))
            raise

    def abort(self, request_id: str) -> bool:
        with self._lock:
            found = self._scheduler.cancel(request_id)
            self._work.notify_all()
            return found

    def use_attention(self, name: str) -> None:
        """Change the attention kernels between two requests; memory, plan and weights stay where they are.

        For comparisons of kernels alone. Raises UsageError while a request is under way, or where the model's
        attention cannot run so.
        """
        with self._lock:
            if not self._scheduler.idle():
                raise UsageError("attention cannot change while requests are under way: wait until they have ended")
            attentions.check_model(self._loaded.weights.config, name)
            self._loaded.runner.attend = attentions.ATTEND[name]
            self._options = replace(self._options, attention=name)
            self.info = replace(self.info, attention=name)

    def stats(self) -> EngineStats:
        prefill, decode, waiting = self._scheduler.counts()
        state, detail = self._state, self._detail
        silent = time.monotonic() - self._alive
        if state == "ready" and prefill + decode and silent > STALL_S:
            state, detail = "stalled", f"no layer was finished for {silent:.0f} s"
        return EngineStats(
            state=state,
            running=prefill + decode,
            waiting=waiting,
            pending_prefill_tokens=self._scheduler.pending_prefill_tokens(),
            kv_used_bytes=self._loaded.pool.used_bytes(),
            kv_capacity_bytes=self._loaded.pool.capacity_bytes(),
            last_step_monotonic=self._last_step,
            detail=detail,
        )

    def memory(self) -> devices.DeviceMemory:
        """Device memory as enforced and as used; `device_used` is its peak between passes so far."""
        now = devices.device_memory(self._loaded.weights.device, self._loaded.allocator_bytes)
        used = max(now.device_used, self._peak_device_used)
        return devices.DeviceMemory(now.budget, now.peak_allocated, now.peak_reserved, used)

    def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        deadline = time.monotonic() + drain_timeout_s
        with self._lock:
            if self._state != "failed":
                self._state, self._detail = "draining", "shutting down"
            while not self._scheduler.idle() and time.monotonic() < deadline and self._thread.is_alive():
                self._work.wait(min(0.1, max(0.001, deadline - time.monotonic())))
            for sequence in [*self._scheduler.waiting(), *self._scheduler.running()]:
                sequence.cancelled = True
            self._stopping = True
            self._work.notify_all()
        self._thread.join(JOIN_S)
        with self._lock:
            if self._thread.is_alive():
                logger.error("the engine's thread did not end within %.0f s; its memory is not freed", JOIN_S)
            elif not self._closed:
                self._closed = True
                self._loaded.close()

    # --- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._end_given_up()
                self._pass()
        except BaseException as error:
            logger.exception("the engine has failed")
            self._fail(f"{type(error).__name__}: {error}")

    def _wait_for_work(self) -> bool:
        with self._work:
            while self._scheduler.idle() and not self._stopping:
                self._work.notify_all()  # a drain that waits for idleness
                self._work.wait()
            self._alive = time.monotonic()
            return not self._scheduler.idle()

    def _poll(self) -> None:
        """Between two chunks of a layer: a sign of life, and the end of waiting requests that were given up."""
        self._alive = time.monotonic()
        if self._alive - self._swept > SWEEP_S:
            self._swept = self._alive
            self._end_given_up(self._scheduler.waiting())

    def _end_given_up(self, candidates: list[Sequence] | None = None) -> None:
        found = candidates if candidates is not None else [*self._scheduler.running(), *self._scheduler.waiting()]
        for sequence in found:
            reason = sequence.ending()
            if reason is not None:
                self._end(sequence, reason)

    def _pass(self) -> None:
        with self._lock:
            admitted = self._scheduler.admit()
            if admitted:
                self._sink.record(self._gauges())
        sequences = self._scheduler.running()
        if not sequences:
            return
        parts = {id(sequence): self._part(sequence) for sequence in sequences}
        start = time.monotonic()
        try:
            rows = self._loaded.runner.run(list(parts.values()))
        except PassAbandoned:
            rows = {}
        except Exception as error:
            self._pass_failed(error, sequences)
            return
        self._failures = 0
        prefilling = [s for s in sequences if s.prefilling]
        done = [(s, rows[id(parts[id(s)])]) for s in sequences if id(parts[id(s)]) in rows]
        self._record_step(start, len(sequences), [s for s in prefilling if id(parts[id(s)]) in rows], prefilling, done)
        for sequence, row in done:
            self._deliver(sequence, row[-1])
        with self._lock:
            self._sink.record(self._gauges())

    def _part(self, sequence: Sequence) -> Part:
        if sequence.kv is None:
            raise RuntimeError(f"request {sequence.request.request_id!r} runs without KV memory")
        progress = self._progress(sequence) if sequence.prefilling else None
        return Part(sequence.kv, sequence.next_tokens(), given_up=sequence.given_up, on_progress=progress)

    def _progress(self, sequence: Sequence) -> Callable[[int], None]:
        throttle = Throttle(PROGRESS_S)
        total = len(sequence.request.prompt_token_ids)
        layers = self._loaded.layers

        def report(layer_tokens: int) -> None:
            if throttle.ready():
                self._send(sequence, PrefillProgress(sequence.request.request_id, layer_tokens // layers, total))

        return report

    def _record_step(
        self,
        start: float,
        batch: int,
        finished_prompts: list[Sequence],
        prefilling: list[Sequence],
        done: list[tuple[Sequence, torch.Tensor]],
    ) -> None:
        phase: Phase = "decode" if not prefilling else "prefill" if len(prefilling) == batch else "mixed"
        self._last_step = self._alive = time.monotonic()
        self._peak_device_used = self.memory().device_used
        self._sink.record(
            StepStats(
                phase=phase,
                duration_s=self._last_step - start,
                prompt_tokens=sum(len(s.request.prompt_token_ids) for s in finished_prompts),
                generated_tokens=len(done),
                attention_backend=self._options.attention,
                transfers=self._loaded.streams.drain_transfers(),
            )
        )

    # --- results --------------------------------------------------------------------------------------------------

    def _deliver(self, sequence: Sequence, row: torch.Tensor) -> None:
        try:
            draw = sequence.sampler.draw(row)
        except BadLogits as error:
            self._end(sequence, "error", error=str(error))
            return
        now = time.monotonic()
        if sequence.last_token is not None:
            self._sink.record(InterTokenLatency(now - sequence.last_token))
        sequence.first_token = sequence.first_token or now
        sequence.last_token = now
        sequence.generated.append(draw.token_id)
        sampling = sequence.request.sampling
        if draw.token_id in self._loaded.eos_ids and not sampling.ignore_eos:
            self._end(sequence, "stop", draw, sequence.output.flush())
            return
        last = len(sequence.generated) >= sampling.max_tokens
        text, stopped = sequence.output.push(draw.token_id, last)
        if stopped or last:
            self._end(sequence, "stop" if stopped else "length", draw, text)
        else:
            self._send(sequence, self._event(sequence, draw, text))

    def _event(self, sequence: Sequence, draw: Draw, text: str, reason: FinishReason | None = None) -> TokenEvent:
        request_id = sequence.request.request_id
        if draw.logprob is None:
            return TokenEvent(request_id, draw.token_id, text, finish_reason=reason)
        top = tuple(self._logprob(token, logprob) for token, logprob in draw.top)
        return TokenEvent(request_id, draw.token_id, text, self._logprob(draw.token_id, draw.logprob), top, reason)

    def _logprob(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, self.tokenizer.decode([token_id]), logprob)

    def _send(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.on_event(event)
        except Exception:
            # A broken listener loses its own request, never the others'.
            logger.exception("the listener of request %s failed; the request is cancelled", event.request_id)
            sequence.cancelled = True

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        draw: Draw | None = None,
        text: str = "",
        error: str | None = None,
    ) -> None:
        """Take a sequence out, record it, then tell its listener: metrics are complete when the answer is."""
        with self._lock:
            self._scheduler.finish(sequence)
            self._sink.record(_finished(sequence, OUTCOMES[reason]), self._gauges())
            self._work.notify_all()
        if draw is not None:
            self._send(sequence, self._event(sequence, draw, text, reason))
        else:
            text = sequence.output.flush() if error is None else ""
            self._send(
                sequence,
                TokenEvent(sequence.request.request_id, None, text, finish_reason=reason, error=error),
            )

    # --- failures -------------------------------------------------------------------------------------------------

    def _pass_failed(self, error: Exception, sequences: list[Sequence]) -> None:
        """Fail the requests that the pass was probably run for: new ones if there are any, else all of them."""
        logger.error("a pass over the layers failed", exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        if not devices.device_works(self._loaded.weights.device):
            raise EngineFailed(f"the device no longer works after {reason}") from error
        if devices.is_out_of_memory(error):
            reason = f"out of memory during the pass ({error}); use a smaller --chunk-tokens or a larger --gpu-memory"
        else:
            self._failures += 1
        fresh = [sequence for sequence in sequences if sequence.prefilling]
        for sequence in fresh or sequences:
            self._end(sequence, "error", error=reason)
        if self._failures >= MAX_FAILURES:
            raise EngineFailed(f"{self._failures} passes failed in a row, the last with {reason}") from error

    def _fail(self, detail: str) -> None:
        with self._lock:
            self._state, self._detail = "failed", detail
        for sequence in [*self._scheduler.running(), *self._scheduler.waiting()]:
            with suppress(Exception):
                self._end(sequence, "error", error=f"the engine has failed: {detail}")

    def _gauges(self) -> Gauges:
        prefill, decode, waiting = self._scheduler.counts()
        return Gauges(
            running_prefill=prefill,
            running_decode=decode,
            waiting=waiting,
            pending_prefill_tokens=self._scheduler.pending_prefill_tokens(),
            kv_used_bytes=self._loaded.pool.used_bytes(),
            kv_capacity_bytes=self._loaded.pool.capacity_bytes(),
            gpu_bytes=dict(self.plan.gpu_bytes),
            host_bytes=dict(self.plan.host_bytes),
        )


def _finished(sequence: Sequence, outcome: Outcome) -> RequestFinished:
    now = time.monotonic()
    admitted, first = sequence.admitted, sequence.first_token
    return RequestFinished(
        endpoint=sequence.request.endpoint,
        outcome=outcome,
        prompt_tokens=len(sequence.request.prompt_token_ids),
        output_tokens=len(sequence.generated),
        queue_s=(admitted if admitted is not None else now) - sequence.received,
        prefill_s=first - admitted if admitted is not None and first is not None else None,
        decode_s=now - first if first is not None else None,
        ttft_s=first - sequence.received if first is not None else None,
        duration_s=now - sequence.received,
    )
