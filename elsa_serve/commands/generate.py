"""`elsa-serve generate`: one answer on the terminal, streamed as it is drawn."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from elsa_serve.arguments import (
    add_engine_arguments,
    add_memory_arguments,
    add_model_arguments,
    check_model,
    engine_options,
)
from elsa_serve.errors import EngineFailed, UsageError
from elsa_serve.protocol import Engine, GenerationRequest, PrefillProgress, SamplingParams, TokenEvent, stream

HELP = "answer one prompt on the terminal"
EPILOG = (
    "examples:\n  elsa-serve generate ./llama-13b --gpu-memory 24GiB --prompt-file contract.txt --chat --max-tokens 200"
)


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("generate", help=HELP, description=HELP, epilog=EPILOG)
    add_model_arguments(parser)
    prompt = parser.add_argument_group("prompt").add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="read it from a file (- for standard input)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    sampling.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default: 1, off)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens (default: 0, off)")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    add_memory_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_model(args)
    text = read_prompt(args)
    sampling = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    sampling.check()
    from elsa_serve.offload.engine import OffloadEngine  # torch and transformers only once the flags are right

    engine = OffloadEngine(args.model, **engine_options(args))
    try:
        answer(engine, prompt_tokens(engine, text, args.chat), sampling)
    finally:
        engine.shutdown()
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    source = "--prompt" if args.prompt is not None else f"--prompt-file {args.prompt_file}"
    try:
        if args.prompt is not None:
            text: str = args.prompt
            text.encode()  # bytes of the command line that are no UTF-8 come as lone surrogates
        elif str(args.prompt_file) == "-":
            text = sys.stdin.buffer.read().decode()
        else:
            text = args.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read {source}: {error}") from error
    if not text:
        raise UsageError(f"{source} is empty: the model needs at least one token")
    return text


def prompt_tokens(engine: Engine, text: str, chat: bool) -> list[int]:
    if not chat:
        return engine.tokenizer.encode(text)
    conversation = [{"role": "user", "content": text}]
    try:
        return list(
            engine.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except Exception as error:  # templates are programs of the model's makers, and raise what they like
        reason = str(error).partition("!")[0].partition("\n")[0]
        raise UsageError(
            f"--chat: the model has no chat template that takes the prompt ({reason}): leave it out"
        ) from error


def answer(engine: Engine, tokens: list[int], sampling: SamplingParams) -> None:
    """Stream the text to standard output, and the speed to standard error."""
    request = GenerationRequest(request_id=uuid.uuid4().hex, prompt_token_ids=tokens, sampling=sampling)
    start = time.perf_counter()
    first = last = start
    count = 0
    end: TokenEvent | None = None
    watched = sys.stderr.isatty()
    for event in stream(engine, request, show_progress if watched else lambda _: None):
        last = time.perf_counter()
        if watched and end is None:
            _rewrite("")
        first = last if count == 0 else first
        count += event.token_id is not None
        print(event.text, end="", flush=True)
        end = event
    print()
    if end is not None and end.finish_reason == "error":
        raise EngineFailed(f"generation failed: {end.error}")
    rate = (count - 1) / (last - first) if count > 1 and last > first else float("nan")
    print(
        f"{len(tokens)} prompt tokens, {count} generated; first token after {first - start:.2f} s, "
        f"then {rate:.1f} tokens/s",
        file=sys.stderr,
    )


def show_progress(event: PrefillProgress) -> None:
    """A long prompt takes minutes: one line on the terminal, written over as it comes along."""
    _rewrite(f"prompt: {event.processed_tokens} of {event.total_tokens} tokens")


def _rewrite(line: str) -> None:
    print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
