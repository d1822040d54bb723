"""vLLM with ELSA and with its own attention backends: seconds of prefill and decode, and logits against float64.

    python -m load_tests.vllm_bench speed --dtype float16 --context 32768 --attention ELSA --attention FLASH_ATTN \\
        --output load_tests/results/vllm-h200.json
    python -m load_tests.vllm_bench accuracy --dtype float32 --layers 4 --context 4096 --attention ELSA TRITON_ATTN
    python -m load_tests.vllm_bench tokens --layers 4 --context 4096 --tensor-parallel 1 2 [--context-parallel 2]

LLaMA-13B's geometry (`models/llama-13b.json`) with random weights, in vLLM's own `LLM`, in this process, one engine
after the other. Full CUDA graphs for decode, prefill in one piece, no compilation: the same for every backend, so that
attention alone differs. Every ELSA row is proved by the plugin's counters: a run in which ELSA did not compute is an
error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read by vLLM on import: the engine in this process, its own sampler, models' names taken as paths.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from elsa_serve.vllm_plugin.metrics import recorder
from elsa_serve.vllm_plugin.verify import assert_active
from kernels.bench import results_file
from load_tests import vllm_reference

MODEL = Path(__file__).parent / "models" / "llama-13b.json"
WARM_UP_TOKENS = 4096
SLOW_S = 4.0  # a prompt slower than this is timed once
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        config = geometry(args)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for row in args.measure(args, folder, config):
            print(json.dumps({key: value for key, value in row.items() if value is not None}), flush=True)
            if args.output:  # as it goes: a machine's time may end before the last row
                known = results_file.read(args.output)["rows"] if args.output.exists() else []
                results_file.write(args.output, [*known, row])
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, measure, text in (
        ("speed", speed, "seconds of prefill and per token of decode"),
        ("accuracy", accuracy, "relative error of logits against float64, on the same weights"),
        ("tokens", tokens, "greedy tokens on one GPU and on several"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(measure=measure)
        add = command.add_argument
        add("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
        add("--layers", type=int, help="decoder layers (default: the model's)")
        add("--set", action="append", default=[], metavar="KEY=NUMBER", help="other values in the config.json")
        add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
        add("--kv-cache-dtype", default="auto")
        add("--attention", nargs="+", default=["ELSA"], help="backends, in this order (default: ELSA)")
        add("--context", type=int, default=32768, help="prompt tokens (default: 32768)")
        add("--decode-tokens", type=int, default=32, help="tokens after the first (default: 32)")
        add("--prefills", type=int, default=1, help="timed prompts; the best counts (default: 1)")
        add("--chunk-tokens", type=int, help="prompt tokens a step (default: all)")
        add("--tensor-parallel", type=int, nargs="+", default=[1], help="GPUs (default: 1)")
        add("--context-parallel", type=int, default=1, help="decode context parallel ranks of the last (default: 1)")
        add("--batch-invariant", action="store_true", help="the same prompt alone and among others, bit for bit")
        add("--output", type=Path, help="results file to append the rows to")
    return parser


def geometry(args: argparse.Namespace) -> Row:
    config = json.loads(args.model.read_text())
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    for item in args.set:
        key, _, value = item.partition("=")
        if key not in config:
            raise SystemExit(f"--set {item}: {key!r} is not in {args.model}")
        config[key] = json.loads(value)
    return config


@contextmanager
def engine(args: argparse.Namespace, folder: str, backend: str, **changes: Any) -> Iterator[Any]:
    """A vLLM `LLM` of the model, gone with its memory afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    release()  # an engine before this one is garbage only now that its user has returned
    longest = args.context + args.decode_tokens + 1
    options: Row = {
        "model": folder,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "attention_backend": backend,
        "max_model_len": longest,
        "max_num_batched_tokens": args.chunk_tokens or longest,
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": 0,
        # What KV gets is stated below; vLLM would measure, and refuse where another process is on the GPU.
        "gpu_memory_utilization": 0.05,
    }
    if torch.cuda.is_available():
        options["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4],
        }
        options["kv_cache_memory_bytes"] = kv_bytes(args, folder)
    llm = LLM(**(options | changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def kv_bytes(args: argparse.Namespace, folder: str) -> int:
    """Room on each GPU for the prompts that a measurement runs at a time: one where speed is measured, else more."""
    config = json.loads((Path(folder) / "config.json").read_text())
    width = 4 if args.dtype == "float32" else 2
    a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * width
    prompts = 1.01 if args.command == "speed" else 1.6
    return int(prompts * (args.context + args.decode_tokens + 64) * a_token) + (256 << 20)


def prompt_of(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def generate(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **sampling)
    return llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)


def base_row(args: argparse.Namespace, config: Row, backend: str) -> Row:
    return {
        "system": "vllm",
        "model": f"{args.model.stem} geometry, random weights",
        "layers": config["num_hidden_layers"],
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "attention": backend,
        "ours": backend == "ELSA",
        "context": args.context,
        "batch": 1,
        "chunk_tokens": args.chunk_tokens or args.context,
    }


def attempt(row: Row, work: Callable[[], Row]) -> Row:
    """The row with what `work` measured, or with its error: a backend that fails does not end the run."""
    start = time.perf_counter()
    try:
        measured = work() | {"error": None}
    except Exception as error:
        measured = {"error": f"{type(error).__name__}: {error}"[:600]}
    return row | measured | {"run_s": round(time.perf_counter() - start, 1)}


def proved(backend: str) -> Row:
    """For ELSA, the layers that its counters show at work; raises where they show none."""
    return {"elsa_layers": assert_active().layers} if backend == "ELSA" else {}


def speed(args: argparse.Namespace, folder: str, config: Row) -> Iterator[Row]:
    for backend in args.attention:

        def work(backend: str = backend) -> Row:
            start = time.perf_counter()
            with engine(args, folder, backend) as llm:
                load_s = time.perf_counter() - start
                vocabulary = config["vocab_size"]
                generate(llm, [prompt_of(min(args.context, WARM_UP_TOKENS), vocabulary, 1)], 3)
                before = attention_seconds(llm, vocabulary)
                runs = [timed(llm, prompt_of(args.context, vocabulary), args)]
                while len(runs) < args.prefills and runs[-1]["prefill_s"] < SLOW_S:
                    runs.append(timed(llm, prompt_of(args.context, vocabulary), args))
                spent = (attention_seconds(llm, vocabulary) - before) / len(runs)
                best = {key: min(run[key] for run in runs) for key in ("prefill_s", "decode_s_per_token")}
                peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
                if backend == "ELSA":
                    best["prefill_attention_s"] = spent
                return best | {"peak_gpu_bytes": peak, "load_s": round(load_s, 1)} | proved(backend)

        yield attempt(base_row(args, config, backend), work)


def attention_seconds(llm: Any, vocabulary: int) -> float:
    """What ELSA's layers spent on prefill so far, by events on the device; a short prompt lets the last ones pass."""
    generate(llm, [prompt_of(200, vocabulary, 2)], 2)
    return recorder().value("elsa_vllm_attention_seconds", phase="prefill")


def timed(llm: Any, prompt: Sequence[int], args: argparse.Namespace) -> dict[str, float]:
    """By the engine's own clock: from scheduling to the first token, and between tokens."""
    (answer,) = generate(llm, [prompt], 1 + args.decode_tokens)
    stats = answer.metrics
    return {
        "prefill_s": stats.first_token_ts - stats.scheduled_ts,
        "decode_s_per_token": (stats.last_token_ts - stats.first_token_ts) / args.decode_tokens,
    }


def accuracy(args: argparse.Namespace, folder: str, config: Row) -> Iterator[Row]:
    """Raw logits after the prompt and after each token of decode, for one long prompt among shorter ones."""
    for backend in args.attention:

        def work(backend: str = backend) -> Row:
            with engine(args, folder, backend, logprobs_mode="raw_logits", max_logprobs=-1) as llm:
                llm.apply_model(vllm_reference.draw_weights)
                vocabulary = config["vocab_size"]
                lengths = (args.context, args.context // 3, 17)
                prompts = [prompt_of(length, vocabulary, seed) for seed, length in enumerate(lengths)]
                answers = [one.outputs[0] for one in generate(llm, prompts, 1 + args.decode_tokens, logprobs=-1)]
                errors: list[list[float]] = []
                for prompt, answer in zip(prompts, answers):
                    found = torch.stack([logits_of(step, vocabulary) for step in answer.logprobs])
                    sequence = [*prompt, *answer.token_ids[:-1]]
                    (expected,) = llm.apply_model(lambda m, s=sequence: vllm_reference.logits(m, s, len(found)))  # noqa: B023
                    errors.append(vllm_reference.relative_errors(found, expected[:, :vocabulary]))
                row = {
                    "prompts": list(lengths),
                    "relerr_prefill": max(one[0] for one in errors),
                    "relerr_decode": max((max(one[1:]) for one in errors if len(one) > 1), default=None),
                    "tokens": [list(one.token_ids) for one in answers],
                }
                if args.batch_invariant:
                    (alone,) = generate(llm, prompts[-1:], 1 + args.decode_tokens, logprobs=-1)
                    among = [logits_of(step, vocabulary) for step in answers[-1].logprobs]
                    apart = [logits_of(step, vocabulary) for step in alone.outputs[0].logprobs]
                    row["bits_equal_alone"] = all(torch.equal(a, b) for a, b in zip(among, apart))
                return row | proved(backend)

        yield attempt(base_row(args, config, backend) | {"check": "logits against float64"}, work)


def logits_of(step: Any, vocabulary: int) -> torch.Tensor:
    """One position's raw logits [vocabulary] from vLLM's {token: Logprob}."""
    row = torch.full((vocabulary,), torch.nan, dtype=torch.float64)
    for token, entry in step.items():
        row[token] = entry.logprob
    return row


def tokens(args: argparse.Namespace, folder: str, config: Row) -> Iterator[Row]:
    """Greedy tokens of the first configuration, and whether the others give the same."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # our own functions go to our own workers
    expected: list[list[int]] | None = None
    for backend in args.attention:
        for position, gpus in enumerate(args.tensor_parallel):
            last = position == len(args.tensor_parallel) - 1
            ranks = args.context_parallel if last else 1

            def work(backend: str = backend, gpus: int = gpus, ranks: int = ranks) -> Row:
                nonlocal expected
                changes = {"tensor_parallel_size": gpus, "decode_context_parallel_size": ranks}
                with engine(args, folder, backend, **changes) as llm:
                    llm.apply_model(vllm_reference.draw_weights)
                    vocabulary = config["vocab_size"]
                    prompts = [prompt_of(n, vocabulary, seed) for seed, n in enumerate((args.context, 300))]
                    found = [list(one.outputs[0].token_ids) for one in generate(llm, prompts, 1 + args.decode_tokens)]
                    expected = expected or found
                    return {"tokens": found, "tokens_equal": found == expected} | proved(backend)

            parallel = {"tensor_parallel": gpus, "context_parallel": ranks, "check": "tokens of several GPUs"}
            yield attempt(base_row(args, config, backend) | parallel, work)


if __name__ == "__main__":
    raise SystemExit(main())
