"""The offload engine: one thread that turns requests into passes over streamed layers, and rows of logits into text."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elsa_serve import envs
from elsa_serve.errors import BudgetError, ContextTooLong, EngineDraining, EngineFailed, QueueFull, UsageError
from elsa_serve.offload import attention as attentions
from elsa_serve.offload import checksums
from elsa_serve.offload import device as devices
from elsa_serve.offload.kv import RequestKV
from elsa_serve.offload.loading import EngineOptions, LoadedModel, load
from elsa_serve.offload.output import OutputText
from elsa_serve.offload.plan import ALIKE_ROWS, Plan
from elsa_serve.offload.predict import Pace, Prediction, Share, pass_time, running_shares
from elsa_serve.offload.prefix import PrefixCache
from elsa_serve.offload.rounds import pass_tokens
from elsa_serve.offload.sampling import Draw, Sampler
from elsa_serve.offload.scheduler import Pass, Scheduler, Sequence, Work
from elsa_serve.offload.speculation import PromptLookup
from elsa_serve.offload.step import SHORT_TOKENS, Part, PassAbandoned, Throttle
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
    Preempted,
    PrefixLookup,
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
DRAFT_LOGITS = 64 << 20  # bytes that the logits of all drafted tokens of a pass may take
LOGIT_BYTES = 10  # of a logit: in 16 bits as the model gives it, in FP32, and on its way to the host
DRAFT_TOKENS = ALIKE_ROWS - 1  # guessed at once at most: with the token before them a tile of the tensor cores

OUTCOMES: dict[FinishReason, Outcome] = {
    "stop": "ok", "length": "length", "cancelled": "cancelled", "timeout": "timeout", "error": "server_error",
}  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Result:
    """What a pass gave a sequence: its new tokens, the last perhaps with a finish reason, or an error."""

    share: Work
    tokens: list[TokenEvent]
    error: str | None = None


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
        self.make_lookup: Callable[..., PromptLookup] = PromptLookup  # whose guesses are verified
        self._checksums = envs.checksums()
        self._draft_tokens = draft_tokens(plan, self._options.num_speculative_tokens)
        self._scheduler = Scheduler(
            self._loaded.pool,
            max_batch=self._options.max_batch,
            max_queue=max_queue,
            pass_tokens=pass_tokens(plan, self._options.prefill_round_tokens, self._options.max_num_batched_tokens),
            together=self._together,
            draft_rows=DRAFT_LOGITS // (self._loaded.vocab_size * LOGIT_BYTES),
            cache=PrefixCache(self._loaded.pool, self._identity()) if self._options.prefix_caching else None,
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
        self._pace = Pace()
        self._loaded.runner.poll = self._poll
        self._sink.record(self._gauges())
        self._thread = threading.Thread(target=self._run, name="elsa-engine", daemon=True)
        self._thread.start()

    def _identity(self) -> str:
        """What KV depends on besides tokens: the model, and how it is computed."""
        options, weights = self._options, self._loaded.weights
        parts = (options.model_dir.resolve(), weights.config.to_json_string(), weights.dtype, options.attention,
                 options.linear, options.load_format, options.seed, "no adapter")  # fmt: skip
        return "\n".join(map(str, parts))

    # --- any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        with self._lock:
            self._check_open(request)
            self._check_request(request)
            prompt, sampling = request.prompt_token_ids, request.sampling
            output = OutputText(self.tokenizer, prompt, sampling.stop, sampling.min_tokens)
            sampler = Sampler(sampling, self._loaded.eos_ids, self._options.seed + self._arrivals, prompt)
            lookup = self.make_lookup(prompt, sampling.max_tokens, self._draft_tokens) if self._draft_tokens else None
            sequence = Sequence(request, on_event, sampler, output, time.monotonic(), lookup)
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
            sampling.check()
            if any(not 0 <= token < self.info.vocab_size for token, _ in sampling.logit_bias):
                raise UsageError(f"logit_bias has token ids outside 0 … {self.info.vocab_size - 1}")
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
            self._loaded.tiers.use(attentions.ATTEND[name], attentions.ATTEND_STATE.get(name))
            if self._loaded.runner.graphs is not None:
                self._loaded.runner.graphs.usable = name in attentions.IN_GRAPHS
            self._options = replace(self._options, attention=name)
            self.info = replace(self.info, attention=name)
            self._scheduler.forget_prefixes(self._identity())

    def use_chunks(self, tokens: int) -> None:
        """Send prompts through a layer in chunks of so many tokens from the next pass on, at most as many as planned.

        For comparisons of chunks alone. Raises UsageError for more, or for none.
        """
        if not 0 < tokens <= self.plan.chunk_tokens:
            raise UsageError(f"chunks of {tokens} tokens: memory is planned for 1 to {self.plan.chunk_tokens}")
        self._loaded.runner.chunk_tokens = tokens

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
                # Cached KV is views of the pools: a cycle must not keep those until the collector comes.
                self._scheduler.forget_prefixes("")
                self._loaded.close()

    @property
    def decoder_layers(self) -> tuple[torch.nn.Module, ...]:
        """In order. What a hook on one of them does takes part in every pass that no graph replays."""
        return tuple(self._loaded.weights.decoder_layers)

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

    def _together(self, kv: RequestKV, new: int) -> int:
        """How many of so many new tokens of a request are computed as cheaply as one. One that is replayed from a graph
        with all its KV on the device is cheapest alone, and rounds otherwise: beside it no drafts are made that nobody
        asked for."""
        replayed = self.plan.graphs and not self.plan.streamed_layers and not kv.host_tokens(kv.length + new)
        if replayed and self._options.num_speculative_tokens is None:
            return 1
        return self._loaded.tiers.without_moving(kv, new)

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
        planned = self._scheduler.next_pass()
        self._record_joining(planned)
        if not planned.work:
            self._end_stuck()
            return
        work = self._undamaged(planned.work) if self._checksums else planned.work
        if not work:
            return
        parts = [self._part(share) for share in work]
        shares = running_shares((part.kv, len(part.tokens)) for part in parts)
        expected = self._expected(shares)
        start = time.monotonic()
        try:
            rows = self._loaded.runner.run(parts)
        except PassAbandoned:
            rows = {}
        except Exception as error:
            self._pass_failed(error, work)
            return
        self._failures = 0
        self._last_step = self._alive = time.monotonic()
        done = [(share, rows[id(part)]) for share, part in zip(work, parts) if id(part) in rows]
        results = [self._draw(share, logits) for share, logits in done if share.rows]
        self._record_step(self._last_step - start, expected, work, [share for share, _ in done], results)
        if self._checksums:
            for part, before in zip(parts, shares):
                checksums.remember(part.kv, before.past)
        for share, _ in done:
            self._scheduler.computed(share.sequence)
        for result in results:
            self._deliver(result)
        with self._lock:
            self._sink.record(self._gauges())

    def _expected(self, shares: list[Share]) -> tuple[Prediction, Prediction] | None:
        """A pass before it runs: as planned, and at the host's present pace. None of the twin that copies and computes
        in turn, which is not what the planner predicts."""
        if self._options.serial:
            return None
        planned = pass_time(self.plan, shares)
        return planned, planned if self._pace == Pace() else pass_time(self.plan, shares, self._pace)

    def _undamaged(self, work: list[Work]) -> list[Work]:
        """Without the requests whose KV has changed since it was computed: those end here, with an error."""
        whole = []
        for share in work:
            kv = share.sequence.kv
            found = checksums.damage(kv) if kv is not None else None
            if found is None:
                whole.append(share)
                continue
            logger.error("request %s: %s", share.sequence.request.request_id, found)
            self._scheduler.withdraw(found.extent)
            self._end(share.sequence, "error", error=str(found))
        return whole

    def _end_stuck(self) -> None:
        """Nothing runs, and yet the head of the queue, whose memory was checked, cannot join: it never will."""
        waiting = self._scheduler.waiting()
        if waiting and not self._scheduler.running():
            tokens = len(waiting[0].tokens)
            self._end(waiting[0], "error", error=f"no KV memory for {tokens} tokens, although no request holds any")

    def _record_joining(self, planned: Pass) -> None:
        for lookup in planned.lookups:
            self._sink.record(PrefixLookup(lookup.tokens, lookup.hits))
        if planned.preempted:
            self._sink.record(Preempted(planned.preempted))
        if planned.lookups or planned.preempted:
            with self._lock:
                self._sink.record(self._gauges())

    def _part(self, share: Work) -> Part:
        sequence = share.sequence
        if sequence.kv is None:
            raise RuntimeError(f"request {sequence.request.request_id!r} runs without KV memory")
        progress = self._progress(sequence, sequence.kv.length) if share.prefilling else None
        return Part(sequence.kv, share.tokens, share.rows, sequence.given_up, progress)

    def _progress(self, sequence: Sequence, before: int) -> Callable[[int], None]:
        throttle = Throttle(PROGRESS_S)
        total = sequence.prompt_tokens
        layers = self._loaded.layers

        def report(layer_tokens: int) -> None:
            if throttle.ready():
                processed = min(total, before + layer_tokens // layers)
                self._send(sequence, PrefillProgress(sequence.request.request_id, processed, total))

        return report

    def _record_step(
        self,
        seconds: float,
        expected: tuple[Prediction, Prediction] | None,
        work: list[Work],
        done: list[Work],
        results: list[_Result],
    ) -> None:
        prefilling = sum(share.prefilling for share in work)
        phase: Phase = "decode" if not prefilling else "prefill" if prefilling == len(work) else "mixed"
        self._peak_device_used = self.memory().device_used
        drafts = [result for result in results if result.share.draft]
        attended = self._loaded.tiers.drain()
        planned, predicted = expected or (None, None)
        if predicted and len(done) == len(work):
            self._pace = self._pace.after(predicted, seconds, attended.seconds if attended else 0.0)
        self._sink.record(
            StepStats(
                phase=phase,
                duration_s=seconds,
                prompt_tokens=sum(len(share.tokens) for share in done if share.prefilling),
                generated_tokens=sum(len(result.tokens) for result in results),
                attention_backend=self._options.attention,
                transfers=self._loaded.streams.drain_transfers(),
                drafted_tokens=sum(len(result.share.draft) for result in drafts),
                accepted_tokens=sum(max(0, len(result.tokens) - 1) for result in drafts),
                host_attention=attended,
                planned_s=planned.seconds if planned else 0.0,
                predicted_s=predicted.seconds if predicted else 0.0,
                disk=self._loaded.weights.drain_disk(),
            )
        )

    # --- results --------------------------------------------------------------------------------------------------

    def _draw(self, share: Work, logits: torch.Tensor) -> _Result:
        """A sequence's new tokens as events. What raises here, sampling or text, fails this request alone."""
        sequence = share.sequence
        before = len(sequence.tokens)
        try:
            taken = sequence.take(logits, share.draft, self._loaded.eos_ids)
            events = [self._event(sequence, one.draw, one.text, one.reason) for one in taken]
        except Exception as error:
            logger.exception("drawing a token of request %s failed", sequence.request.request_id)
            del sequence.tokens[before:]
            return _Result(share, [], f"{type(error).__name__}: {error}")
        return _Result(share, events)

    def _deliver(self, result: _Result) -> None:
        sequence, events = result.share.sequence, result.tokens
        now = time.monotonic()
        if events:
            if sequence.last_token is not None:
                # Tokens of one pass arrive together; each took its share of the time since the last ones.
                each = InterTokenLatency((now - sequence.last_token) / len(events))
                self._sink.record(*[each] * len(events))
            sequence.first_token = sequence.first_token or now
            sequence.last_token = now
        for event in events:
            if event.finish_reason is None:
                self._send(sequence, event)
            else:
                self._end(sequence, event.finish_reason, event)
        if result.error is not None:
            self._end(sequence, "error", error=result.error)

    def _event(self, sequence: Sequence, draw: Draw, text: str, reason: FinishReason | None = None) -> TokenEvent:
        logprob = None if draw.logprob is None else self._logprob(draw.token_id, draw.logprob)
        return TokenEvent(
            sequence.request.request_id,
            draw.token_id,
            text,
            logprob,
            tuple(self._logprob(token, value) for token, value in draw.top),
            reason,
            cached_tokens=sequence.cached_tokens or 0 if reason is not None else 0,
        )

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
        self, sequence: Sequence, reason: FinishReason, event: TokenEvent | None = None, error: str | None = None
    ) -> None:
        """Take a sequence out, record it, then tell its listener: metrics are complete when the answer is."""
        with self._lock:
            self._scheduler.finish(sequence, keep=reason != "error")
            self._sink.record(_finished(sequence, OUTCOMES[reason]), self._gauges())
            self._work.notify_all()
        if event is None:
            text = self._held_text(sequence) if error is None else ""
            cached = sequence.cached_tokens or 0
            request_id = sequence.request.request_id
            event = TokenEvent(request_id, None, text, finish_reason=reason, error=error, cached_tokens=cached)
        self._send(sequence, event)

    def _held_text(self, sequence: Sequence) -> str:
        try:
            return sequence.output.flush()
        except Exception:
            logger.exception("the last text of request %s cannot be decoded", sequence.request.request_id)
            return ""

    # --- failures -------------------------------------------------------------------------------------------------

    def _pass_failed(self, error: Exception, work: list[Work]) -> None:
        """Fail the requests that the pass was probably run for: new ones if there are any, else all of them."""
        logger.error("a pass over the layers failed", exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        if not devices.device_works(self._loaded.weights.device):
            raise EngineFailed(f"the device no longer works after {reason}") from error
        if devices.is_out_of_memory(error):
            reason = f"out of memory during the pass ({error}); use a smaller --chunk-tokens or a larger --gpu-memory"
        else:
            self._failures += 1
        fresh = [share for share in work if share.prefilling]
        for share in fresh or work:
            self._end(share.sequence, "error", error=reason)
        if self._failures >= MAX_FAILURES:
            raise EngineFailed(f"{self._failures} passes failed in a row, the last with {reason}") from error

    def _fail(self, detail: str) -> None:
        with self._lock:
            self._state, self._detail = "failed", detail
        for sequence in [*self._scheduler.running(), *self._scheduler.waiting()]:
            with suppress(Exception):
                self._end(sequence, "error", error=f"the engine has failed: {detail}")

    def _gauges(self) -> Gauges:
        plan = self.plan
        prefill, decode, waiting = self._scheduler.counts()
        return Gauges(
            running_prefill=prefill,
            running_decode=decode,
            waiting=waiting,
            pending_prefill_tokens=self._scheduler.pending_prefill_tokens(),
            kv_used_bytes=self._loaded.pool.used_bytes(),
            kv_capacity_bytes=self._loaded.pool.capacity_bytes(),
            kv_cached_bytes=self._loaded.pool.cached_bytes(),
            gpu_bytes=dict(plan.gpu_bytes),
            host_bytes=dict(plan.host_bytes),
            planned_s={} if self._options.serial else {"first_token": plan.ttft_s, "token": plan.s_per_token},
        )


def draft_tokens(plan: Plan, asked: int | None) -> int:
    """Tokens of a draft at most, 0 for none. Unasked, they are drafted where weights or KV are read from host memory:
    there a pass takes as long for several tokens as for one. Raises UsageError for numbers under 0.
    """
    if asked is not None:
        if not 0 <= asked < SHORT_TOKENS:
            raise UsageError(f"--num-speculative-tokens is {asked}: choose 0 (none) to {SHORT_TOKENS - 1}")
        return asked
    return DRAFT_TOKENS if plan.streamed_layers or plan.kv_host_bytes else 0


def _finished(sequence: Sequence, outcome: Outcome) -> RequestFinished:
    now = time.monotonic()
    admitted, first = sequence.admitted, sequence.first_token
    return RequestFinished(
        endpoint=sequence.request.endpoint,
        outcome=outcome,
        prompt_tokens=sequence.prompt_tokens,
        output_tokens=sequence.generated,
        queue_s=(admitted if admitted is not None else now) - sequence.received,
        prefill_s=first - admitted if admitted is not None and first is not None else None,
        decode_s=now - first if first is not None else None,
        ttft_s=first - sequence.received if first is not None else None,
        duration_s=now - sequence.received,
    )
