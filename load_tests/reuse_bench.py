"""What is computed once and used many times, at full size: several tokens a pass, several requests over a document.

    python -m load_tests.reuse_bench --dtype float16 --context 32768 --gpu-memory 24GiB --requests 8

One engine with random weights (load_tests.offload_bench) runs, over one document of `--context` tokens:
- `speculation`: a token a pass, then the same tokens with guesses that hold as often as prompt lookup's do on a
  copy-heavy text. A random model copies nothing, so the guesses are its own tokens, known from the first run, up to
  where lookup would have gone wrong in writing TRACE again with the changes of EDITS: the cost of verifying is real,
  the hits are those of that text. Where other tokens come out, `differs_at` is the first such place, `margin` by how
  many nats the best two lay apart. `each_pass` lists rows, and seconds as planned, as expected live, and as measured;
  of passes that differ so, `s_per_pass` and its predictions are means.
- `shared document`: `--requests` questions at once, whose KV of the document is one and the same; tokens a second while
  they decode. Its `floor_s` is offload_bench's: the streamed weights over PCIe, the document's KV in host memory, read
  once, or both out of that memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.speculation import PromptLookup
from elsa_serve.offload.units import parse_size
from elsa_serve.offload.weights import ModelWeights
from elsa_serve.protocol import Event, GenerationRequest, SamplingParams, TokenEvent
from elsa_serve.stats import Steps, StepStats
from load_tests.offload_bench import (
    MODEL,
    floor_seconds,
    median,
    prompt_of,
    read_bandwidth,
    record,
    shared_weights,
    significant,
)

TRACE = Path(__file__).parents[1] / "elsa_serve" / "offload" / "scheduler.py"
EDITS = (("sequence", "request"), ("Sequence", "Request"), ("waiting", "queued"), ("_running", "_active"))
QUESTION = 32  # tokens after the document
DRAFT_TOKENS = 15


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, shared_weights(args, Path(folder)) as (directory, weights, load_s):
        bandwidth = read_bandwidth(weights)
        steps = Steps()
        start = time.perf_counter()
        engine = make_engine(args, directory, weights, steps)
        print(json.dumps({"load_s": load_s, "engine_s": time.perf_counter() - start}), flush=True)
        try:
            bench = Bench(args, engine, steps, base_row(args, engine, bandwidth))
            cases = args.case or ("speculation", "shared document")
            for i, row in enumerate(row for case in cases for row in CASES[case](bench)):
                print(json.dumps(row), flush=True)
                if args.output:
                    record(args.output, row, fresh=args.fresh and i == 0)
        finally:
            engine.shutdown()
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16")
    parser.add_argument("--linear", choices=("torch",), default="torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=32768, help="tokens of the document (default: 32768)")
    parser.add_argument("--tokens", type=int, default=24, help="generated a token a pass (default: 24)")
    parser.add_argument("--requests", type=int, default=8, help="questions at once (default: 8)")
    parser.add_argument("--gpu-memory", default="24GiB", help="device budget, enforced (default: 24GiB)")
    parser.add_argument("--host-kv", default="28GiB", help="host memory for KV (default: 28GiB)")
    parser.add_argument("--resident-layers", type=int, help="layers on the device (default: planned)")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: all")
    parser.add_argument("--output", type=Path, help="results file to put the rows into")
    parser.add_argument("--fresh", action="store_true", help="without the rows that --output has from earlier runs")
    return parser


def make_engine(args: argparse.Namespace, directory: Path, weights: ModelWeights, steps: Steps) -> OffloadEngine:
    return OffloadEngine(
        directory,
        sink=steps,
        device=args.device,
        gpu_memory=args.gpu_memory,
        host_memory=weights.store.nbytes + parse_size(args.host_kv),
        context=args.context + QUESTION + 512,
        max_batch=args.requests,
        resident_layers=args.resident_layers,
        num_speculative_tokens=DRAFT_TOKENS,
        load_format="dummy",
        weights=weights,
    )


def base_row(args: argparse.Namespace, engine: OffloadEngine, bandwidth: float) -> dict[str, Any]:
    plan = engine.plan
    streamed = plan.geometry.streamed_bytes(len(plan.resident_layers))
    on_host = max(0, args.context - plan.kv_gpu_tokens) * plan.geometry.layers * plan.geometry.kv_token_bytes()
    return {
        "system": "elsa-offload", "model": args.model.stem, "layers": plan.geometry.layers, "dtype": args.dtype,
        "attention": "elsa", "linear": args.linear, "context": args.context, "gpu_cap": args.gpu_memory,
        "gpu_cap_bytes": plan.gpu_budget, "resident_layers": len(plan.resident_layers),
        "kv_host_bytes": on_host, "weights_host_bytes": streamed, "host_read_bytes_per_s": bandwidth,
        "floor_s": floor_seconds(streamed, on_host, bandwidth, plan.rates), "rates": significant(plan.rates),
    }  # fmt: skip


class Bench:
    """The engine, the document, and ways to run requests over it."""

    def __init__(self, args: argparse.Namespace, engine: OffloadEngine, steps: Steps, row: dict[str, Any]) -> None:
        self.args, self.engine, self.steps, self.row = args, engine, steps, row
        self.document = prompt_of(args.context, engine.info.vocab_size)
        self._numbers = iter(range(1 << 30))
        engine.make_lookup = NoGuesses
        self.run([prompt_of(300, engine.info.vocab_size)], 3)  # warms up
        start = time.perf_counter()
        self.run([self.document], 1)
        self.first_s = time.perf_counter() - start
        for kind in (NoGuesses, Nonsense):  # warms up attention over both tiers, of one row and of several
            engine.make_lookup = kind
            self.run([[*self.document, *self.question(-1)]], 4)
        engine.make_lookup = NoGuesses

    def question(self, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.engine.info.vocab_size, (QUESTION,), generator=generator).tolist()

    def run(
        self, prompts: list[list[int]], count: int, logprobs: int | None = None
    ) -> tuple[list[list[int]], list[TokenEvent], list[StepStats]]:
        """Greedy tokens of requests that arrive together, their last events, and the decode passes."""
        results: list[list[int]] = [[] for _ in prompts]
        ends: list[TokenEvent] = []
        done = threading.Event()

        def listener(tokens: list[int]) -> Callable[[Event], None]:
            def take(event: Event) -> None:
                if isinstance(event, TokenEvent):
                    tokens.extend([event.token_id] if event.token_id is not None else [])
                    if event.finish_reason is not None:
                        ends.append(event)
                        if len(ends) == len(prompts):
                            done.set()

            return take

        self.steps.passes.clear()
        sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=logprobs)
        for prompt, tokens in zip(prompts, results):
            self.engine.submit(GenerationRequest(f"reuse-{next(self._numbers)}", prompt, sampling), listener(tokens))
        done.wait()
        failed = [end.error for end in ends if end.error]
        if failed:
            raise SystemExit(f"a request failed: {failed[0]}")
        return results, ends, [one for one in self.steps.passes if one.phase == "decode"]


def speculation(bench: Bench) -> Iterator[dict[str, Any]]:
    prompt = [*bench.document, *bench.question(0)]
    pattern = trace_hits(bench.args.tokens)
    bench.run([prompt], 1)  # from here on its KV is cached, and lies in the same pieces both times
    (tokens,), ends, passes = bench.run([prompt], bench.args.tokens)
    seconds = statistics.median(one.duration_s for one in passes)
    plain = tokens_per_s(passes)
    yield bench.row | {
        "case": "speculation off", "batch": 1, "decode_s_per_token": seconds,
        **predicted(passes, "decode_s_per_token"), "tokens_per_s": plain,
        "cached_tokens": ends[0].cached_tokens, "first_prompt_s": bench.first_s,
    }  # fmt: skip
    bench.engine.make_lookup = lambda prompt, most, longest: KnownTokens(prompt, tokens, pattern, longest)
    (again,), _, passes = bench.run([prompt], len(tokens))
    bench.engine.make_lookup = NoGuesses
    drafted, accepted = (sum(getattr(one, name) for one in passes) for name in ("drafted_tokens", "accepted_tokens"))
    each = [[1 + one.drafted_tokens, one.planned_s, one.predicted_s, one.duration_s] for one in passes]
    _, planned, live, measured = (statistics.fmean(column) for column in zip(*each))
    yield bench.row | {
        "case": "speculation, copy-heavy trace", "batch": 1, "tokens_per_s": tokens_per_s(passes),
        "speedup": tokens_per_s(passes) / plain, "s_per_pass": measured, "predicted_s_per_pass": planned,
        "live_predicted_s_per_pass": live, "passes": len(passes), "drafted_tokens": drafted,
        "accepted_tokens": accepted, "tokens_equal": again == tokens, **difference(bench, prompt, tokens, again),
        "each_pass": each,
    }  # fmt: skip


def difference(bench: Bench, prompt: list[int], tokens: list[int], others: list[int]) -> dict[str, Any]:
    """The first place at which others were generated, and how far the best two tokens lie apart there."""
    place = next((i for i, pair in enumerate(zip(tokens, others)) if pair[0] != pair[1]), None)
    if place is None:
        return {}
    _, ends, _ = bench.run([prompt], place + 1, logprobs=2)
    best, second = sorted((one.logprob for one in ends[0].top_logprobs), reverse=True)
    return {"differs_at": place, "margin": best - second}


def shared_document(bench: Bench) -> Iterator[dict[str, Any]]:
    prompts = [[*bench.document, *bench.question(1 + i)] for i in range(bench.args.requests)]
    (alone,), _, single = bench.run(prompts[:1], 5)
    results, ends, passes = bench.run(prompts, 6)
    seconds = statistics.median(one.duration_s for one in passes)
    yield bench.row | {
        "case": "shared document", "batch": bench.args.requests, "s_per_pass": seconds,
        **predicted(passes, "s_per_pass"), "tokens_per_s": bench.args.requests / seconds,
        "floor_tokens_per_s": bench.args.requests / bench.row["floor_s"],
        "tokens_per_s_alone": tokens_per_s(single), "cached_tokens": min(end.cached_tokens for end in ends),
        "tokens_equal": results[0][: len(alone)] == alone[: len(results[0])],
        "host_attention_bytes": host_bytes(passes),
    }  # fmt: skip


def predicted(passes: list[StepStats], name: str) -> dict[str, Any]:
    """What the planner expected of the median pass: before the first one, and before each by those before it."""
    return {
        f"predicted_{name}": median(one.planned_s for one in passes),
        f"live_predicted_{name}": median(one.predicted_s for one in passes),
    }


CASES: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "speculation": speculation,
    "shared document": shared_document,
}


def tokens_per_s(passes: list[StepStats]) -> float:
    return sum(one.generated_tokens for one in passes) / sum(one.duration_s for one in passes)


def host_bytes(passes: list[StepStats]) -> int:
    return sum(one.host_attention.bytes for one in passes if one.host_attention is not None) // max(1, len(passes))


class NoGuesses(PromptLookup):
    def draft(self, limit: int) -> list[int]:
        return []


class Nonsense(PromptLookup):
    def draft(self, limit: int) -> list[int]:
        return [0] * min(limit, self._longest)


class KnownTokens(PromptLookup):
    """Guesses from the known answer, right as often as the trace's were: (drafted, accepted) of each pass in turn."""

    def __init__(self, prompt: Sequence[int], answer: list[int], pattern: list[tuple[int, int]], longest: int) -> None:
        super().__init__(prompt, len(answer), longest)
        self._answer, self._start, self._pattern = answer, len(prompt), iter(pattern)

    def draft(self, limit: int) -> list[int]:
        drafted, accepted = next(self._pattern, (0, 0))
        at = self._count - self._start
        right = self._answer[at : at + min(accepted, limit)]
        wrong = [(token + 1) % 1000 for token in self._answer[at + len(right) : at + min(drafted, limit)]]
        return [*right, *wrong]


def trace_hits(tokens: int) -> list[tuple[int, int]]:
    """(drafted, accepted) of every pass in which lookup writes TRACE again with EDITS, from its middle on."""
    source = TRACE.read_text()
    edited = source
    for old, new in EDITS:
        edited = edited.replace(old, new)
    document, answer = words(source), words(edited)
    known = {word: i for i, word in enumerate(dict.fromkeys([*document, *answer]))}
    ids = [known[word] for word in answer]
    middle = len(ids) // 3
    lookup = PromptLookup([*(known[word] for word in document), *ids[:middle]], len(ids), DRAFT_TOKENS)
    place, hits = middle, []
    while place < min(len(ids), middle + tokens + DRAFT_TOKENS):
        draft = lookup.draft(len(ids) - place - 1)
        accepted = 0
        while accepted < len(draft) and draft[accepted] == ids[place + accepted]:
            accepted += 1
        if draft:
            lookup.verified(len(draft), accepted)
        hits.append((len(draft), accepted))
        for token in ids[place : place + accepted + 1]:
            lookup.append(token)
        place += accepted + 1
    return hits


def words(text: str) -> list[str]:
    """About as long as a language model's tokens: words, signs and runs of spaces of at most six characters."""
    import re

    return re.findall(r"[A-Za-z]{1,6}|[0-9]{1,3}|\s+|[^\sA-Za-z0-9]", text)


if __name__ == "__main__":
    sys.exit(main())
