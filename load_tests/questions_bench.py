"""Questions about long documents, asked of the embedded model with streamed layers: with guesses and without.

    python -m load_tests.questions_bench --documents 12 --context 8192

The answers are the model's own, and its guesses prompt lookup's. Both engines answer every document, in turns (ABBA);
the row holds the tokens a second of the decode passes, the ratio document by document, and whether all tokens agreed
and all answers were right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elsa_serve.demo import Document, make_document
from elsa_serve.offload.engine import OffloadEngine
from elsa_serve.protocol import GenerationRequest, SamplingParams, stream
from elsa_serve.stats import Steps
from load_tests.offload_bench import record

MODEL = Path(__file__).parents[1] / "configs" / "demo_model"
ANSWER_TOKENS = 48
TEMPLATE_TOKENS = 256  # of the context: question and chat template


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    sides = {guesses: Side(args, guesses) for guesses in (0, None)}
    try:
        row = compare(args, sides[0], sides[None])
    finally:
        for side in sides.values():
            side.engine.shutdown()
    print(json.dumps(row), flush=True)
    if args.output:
        record(args.output, row)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a prompt and its answer (default: 8192)")
    parser.add_argument("--documents", type=int, default=12, help="documents, a question each (default: 12)")
    parser.add_argument("--gpu-memory", default="2GiB", help="device budget (default: 2GiB)")
    parser.add_argument("--output", type=Path, help="results file to put the row into")
    return parser


class Side:
    """One engine, and what its answers took."""

    def __init__(self, args: argparse.Namespace, guesses: int | None) -> None:
        self.steps = Steps()
        self.engine = OffloadEngine(
            MODEL, sink=self.steps, device=args.device, dtype=args.dtype, context=args.context, max_batch=1,
            gpu_memory=args.gpu_memory, resident_layers=0, num_speculative_tokens=guesses, prefix_caching=False,
            progress=False,
        )  # fmt: skip
        self.drafted = self.accepted = self.passes = 0

    def ask(self, document: Document) -> tuple[list[int], str, float]:
        """(tokens, text, tokens a second of the decode passes)."""
        tokenizer = self.engine.tokenizer
        conversation = [{"role": "user", "content": document.prompt}]
        prompt = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        self.steps.passes.clear()
        sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
        events = list(stream(self.engine, GenerationRequest("question", prompt, sampling)))
        decodes = [one for one in self.steps.passes if one.phase == "decode"]
        self.passes += len(decodes)
        self.drafted += sum(one.drafted_tokens for one in decodes)
        self.accepted += sum(one.accepted_tokens for one in decodes)
        rate = sum(one.generated_tokens for one in decodes) / sum(one.duration_s for one in decodes)
        tokens = [event.token_id for event in events if event.token_id is not None]
        return tokens, "".join(event.text for event in events), rate


def compare(args: argparse.Namespace, plain: Side, guessing: Side) -> dict[str, Any]:
    tokenizer = plain.engine.tokenizer
    room = args.context - ANSWER_TOKENS - TEMPLATE_TOKENS
    documents = [
        make_document(room, seed, measure=lambda line: len(tokenizer.encode(line, add_special_tokens=False)))
        for seed in range(args.documents)
    ]
    for side in (plain, guessing):
        side.ask(documents[0])  # to warm up
        side.drafted = side.accepted = side.passes = 0
    rates: dict[Side, list[float]] = {plain: [], guessing: []}
    equal = right = 0
    for i, document in enumerate(documents):
        seen = []
        for side in (plain, guessing) if i % 2 else (guessing, plain):
            tokens, text, rate = side.ask(document)
            rates[side].append(rate)
            seen.append(tokens)
            right += document.answer in text
        equal += seen[0] == seen[1]
    ratios = sorted(with_ / without for with_, without in zip(rates[guessing], rates[plain]))
    return {
        "system": "elsa-offload", "model": "demo_model", "layers": plain.engine.plan.geometry.layers,
        "dtype": args.dtype, "attention": "elsa", "linear": "torch", "context": args.context, "batch": 1,
        "gpu_cap": args.gpu_memory, "case": f"document questions on {args.device}", "documents": args.documents,
        "tokens_per_s": statistics.median(rates[guessing]), "tokens_per_s_plain": statistics.median(rates[plain]),
        "speedup": statistics.median(ratios), "speedup_min": ratios[0], "speedup_max": ratios[-1],
        "passes": guessing.passes, "passes_plain": plain.passes, "drafted_tokens": guessing.drafted,
        "accepted_tokens": guessing.accepted, "tokens_equal": equal == args.documents,
        "answers_right": right == 2 * args.documents,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
