"""vLLM with ELSA and with its own attention backends: seconds of prefill and decode, and logits against float64.

    python -m load_tests.vllm_bench speed --dtype float16 --context 32768 --attention ELSA --attention FLASH_ATTN \\
        --output load_tests/results/vllm-h200.json
    python -m load_tests.vllm_bench accuracy --dtype float32 --layers 4 --context 4096 --attention ELSA TRITON_ATTN
    python -m load_tests.vllm_bench tokens --layers 4 --context 4096 --variants plain tp2 dcp2 pp2 ngram4 compile
    python -m load_tests.vllm_bench tokens --one-gpu --layers 2 --context 4096 --variants plain tp2 dcp2 pp2
    python -m load_tests.vllm_bench collect RUN.json … --output load_tests/results/vllm-h200.json

LLaMA-13B's geometry (`models/llama-13b.json`) with random weights, in vLLM's own `LLM`, in this process, one engine
after the other. Full CUDA graphs for decode, prefill in one piece, no compilation: the same for every backend, so that
attention alone differs. Every ELSA row is proved by the plugin's counters: a run in which ELSA did not compute is an
error. Where the engine is in this process, a row names the Triton kernels that requests had to wait for.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import tempfile
import time
import traceback
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

from elsa_serve import envs
from elsa_serve.vllm_plugin.metrics import INDEX, recorder, totals
from elsa_serve.vllm_plugin.verify import assert_active
from kernels.bench import results_file
from load_tests import vllm_reference
from load_tests.offload_bench import SLOW_S

MODEL = Path(__file__).parent / "models" / "llama-13b.json"
WARM_UP_TOKENS = 4096
GRAPH_SIZES = [1, 2, 4]
Row = dict[str, Any]
# Ways to run the engine, by name; a number after the name takes the place of N.
VARIANTS: dict[str, Callable[[int], Row]] = {
    "plain": lambda n: {},
    "tp": lambda n: {"tensor_parallel_size": n},
    "pp": lambda n: {"pipeline_parallel_size": n},
    "dcp": lambda n: {"tensor_parallel_size": n, "decode_context_parallel_size": n},
    "ngram": lambda n: {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": n, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
        }
    },
    "compile": lambda n: {
        "compilation_config": {
            "mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": GRAPH_SIZES,
        }
    },
    "elsa_fp32": lambda n: {"quantization": "elsa_fp32"},
}  # fmt: skip
# What tells one row from another; the rest was measured.
CONFIGURATION = (
    "model", "layers", "dtype", "kv_cache_dtype", "attention", "variant", "context", "batch", "chunk_tokens", "check",
    "key_heads", "tensor_parallel", "one_gpu",
)  # fmt: skip


# What rows were run with that were measured before these were noted.
UNNOTED: Row = {"variant": "plain", "key_heads": 40}


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.command == "collect":
        collect(args.files, args.output)
        return 0
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


def collect(files: Sequence[Path], output: Path) -> None:
    """One file of several, and of what `output` holds: of rows of one configuration the newest, each with the commit
    and the command of its own run."""
    documents = sorted((results_file.read(f) for f in {*files, output} if f.exists()), key=lambda one: one["date"])
    rows: dict[str, Row] = {}
    for document in documents:
        # Where a run kept its results is no part of what it ran.
        command = re.sub(r" --output \S+", "", document["command"])
        for row in (UNNOTED | row for row in document["rows"]):
            key = json.dumps([row.get(name) for name in CONFIGURATION])
            rows.pop(key, None)
            rows[key] = {"commit": document["commit"], "command": command, "date": document["date"]} | row
    newest = {key: documents[-1][key] for key in ("machine", "versions", "commit", "date")}
    command = f"python -m load_tests.vllm_bench collect … --output {output.name}"
    results_file.write_document(output, newest | {"command": command, "rows": list(rows.values())})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, measure, text in (
        ("speed", speed, "seconds of prefill and per token of decode"),
        ("accuracy", accuracy, "relative error of logits against float64, on the same weights"),
        ("tokens", tokens, "greedy tokens of the first variant, and whether the others give the same"),
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
        add("--variants", nargs="+", type=variant, default=[variant("plain")], help=f"of {', '.join(VARIANTS)}; tp2 …")
        add("--batch-invariant", action="store_true", help="the same prompt alone and among others, bit for bit")
        add("--one-gpu", action="store_true", help="all ranks of a variant on one GPU, by sockets: not for speed")
        add("--output", type=Path, help="results file to append the rows to")
    command = commands.add_parser("collect", help="one results file of several")
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--output", type=Path, required=True)
    return parser


def variant(text: str) -> tuple[str, Row]:
    """Its name, and the engine options that make it."""
    name = text if text in VARIANTS else text.rstrip("0123456789")
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{text!r}: known are {', '.join(VARIANTS)}, some with a number after them")
    return text, VARIANTS[name](int(text[len(name) :] or 2))


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
            "cudagraph_capture_sizes": GRAPH_SIZES,
        }
        options["kv_cache_memory_bytes"] = kv_bytes(args, folder)
    if args.one_gpu:
        from load_tests import shared_gpu

        options |= shared_gpu.ENGINE_OPTIONS
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


def base_row(args: argparse.Namespace, config: Row, backend: str, way: str) -> Row:
    return {
        "system": "vllm",
        "model": f"{args.model.stem} geometry, random weights",
        "layers": config["num_hidden_layers"],
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "attention": backend,
        "variant": way,
        "ours": backend == "ELSA",
        "key_heads": config["num_key_value_heads"],
        "context": args.context,
        "batch": 1,
        "chunk_tokens": args.chunk_tokens or args.context,
    } | ({"one_gpu": True} if args.one_gpu else {})


def runs(args: argparse.Namespace) -> Iterator[tuple[str, str, Row]]:
    """Backend, variant and its engine options, of every engine to be measured."""
    for backend in args.attention:
        for name, changes in args.variants:
            yield backend, name, changes


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """The names of Triton kernels that are compiled meanwhile, in this process: requests wait for them."""
    names: list[str] = []
    if not torch.cuda.is_available():
        yield names
        return
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook

    def note(**event: Any) -> Any:
        names.append(event["fn"].name)
        return before(**event) if before is not None else None

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


def attempt(row: Row, work: Callable[[], Row]) -> Row:
    """The row with what `work` measured, or with its error: a backend that fails does not end the run."""
    start = time.perf_counter()
    try:
        measured = work() | {"error": None}
    except Exception as error:
        traceback.print_exc()  # the row has the last line alone
        measured = {"error": f"{type(error).__name__}: {error}"[:600]}
    return row | measured | {"run_s": round(time.perf_counter() - start, 1)}


def proved(backend: str) -> Row:
    """For ELSA, the layers that its counters show at work; raises where they show none."""
    return {"elsa_layers": assert_active().layers} if backend == "ELSA" else {}


def speed(args: argparse.Namespace, folder: str, config: Row) -> Iterator[Row]:
    for backend, way, changes in runs(args):

        def work(backend: str = backend, changes: Row = changes) -> Row:
            start = time.perf_counter()
            with engine(args, folder, backend, **changes) as llm, compiled_kernels() as late:
                load_s = time.perf_counter() - start
                vocabulary = config["vocab_size"]
                generate(llm, [prompt_of(min(args.context, WARM_UP_TOKENS), vocabulary, 1)], 3)
                before = attention_seconds(llm, vocabulary)
                times = timed(llm, prompt_of(args.context, vocabulary), args)
                spent = (attention_seconds(llm, vocabulary) - before) / len(times)
                best: Row = {key: min(one[key] for one in times) for key in ("prefill_s", "decode_s_per_token")}
                peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
                if backend == "ELSA":
                    best["prefill_attention_s"] = spent
                best |= {"peak_gpu_bytes": peak, "load_s": round(load_s, 1), "compiled_late": sorted(set(late))}
                return best | proved(backend)

        yield attempt(base_row(args, config, backend, way), work)


def attention_seconds(llm: Any, vocabulary: int) -> float:
    """What ELSA's layers spent on prefill so far, by events on the device; a short prompt lets the last ones pass."""
    generate(llm, [prompt_of(200, vocabulary, 2)], 2)
    return recorder().value("elsa_vllm_attention_seconds", phase="prefill")


def timed(llm: Any, prompt: Sequence[int], args: argparse.Namespace) -> list[dict[str, float]]:
    """`args.prefills` times, a slow prompt once, by the engine's own clock: from scheduling to the first token, and
    between tokens."""
    times: list[dict[str, float]] = []
    while not times or (len(times) < args.prefills and times[-1]["prefill_s"] < SLOW_S):
        (answer,) = generate(llm, [prompt], 1 + args.decode_tokens)
        stats = answer.metrics
        times.append(
            {
                "prefill_s": stats.first_token_ts - stats.scheduled_ts,
                "decode_s_per_token": (stats.last_token_ts - stats.first_token_ts) / args.decode_tokens,
            }
        )
    return times


def accuracy(args: argparse.Namespace, folder: str, config: Row) -> Iterator[Row]:
    """Raw logits after the prompt and after each token of decode, for one long prompt among shorter ones."""
    for backend, way, changes in runs(args):

        def work(backend: str = backend, changes: Row = changes) -> Row:
            with engine(args, folder, backend, logprobs_mode="raw_logits", max_logprobs=-1, **changes) as llm:
                llm.apply_model(vllm_reference.draw_weights)
                vocabulary = config["vocab_size"]
                lengths = (args.context, args.context // 3, 17)
                prompts = [prompt_of(length, vocabulary, seed) for seed, length in enumerate(lengths)]
                with compiled_kernels() as late:
                    answers = [one.outputs[0] for one in generate(llm, prompts, 1 + args.decode_tokens, logprobs=-1)]
                found = [torch.stack([logits_of(step, vocabulary) for step in one.logprobs]) for one in answers]
                row = {
                    "prompts": list(lengths),
                    "tokens": [list(one.token_ids) for one in answers],
                    "compiled_late": sorted(set(late)),
                }
                if args.batch_invariant:  # vLLM then has products of its own, none for float64: no reference
                    (alone,) = generate(llm, prompts[-1:], 1 + args.decode_tokens, logprobs=-1)
                    apart = torch.stack([logits_of(step, vocabulary) for step in alone.outputs[0].logprobs])
                    return row | {"bits_equal_alone": torch.equal(found[-1], apart)} | proved(backend)
                sequences = [[*prompt, *one.token_ids[:-1]] for prompt, one in zip(prompts, answers)]
                return row | errors(llm, sequences, found, args.dtype) | proved(backend)

        check = "bits alone and among others" if args.batch_invariant else "logits against float64"
        yield attempt(base_row(args, config, backend, way) | {"check": check}, work)


def errors(llm: Any, sequences: list[list[int]], found: list[torch.Tensor], dtype: str) -> Row:
    """Largest relative errors over the sequences, of their last positions' logits; the first of these is prefill's.

    For float32 also those of float32 linear layers alone: of the reference with no other rounding in it.
    """
    prefill, decode, linear = [], [], []
    for sequence, logits in zip(sequences, found):
        count, vocabulary = logits.shape
        (expected,) = llm.apply_model(lambda m, s=sequence, n=count: vllm_reference.logits(m, s, n))
        expected = expected[:, :vocabulary]
        first, *rest = vllm_reference.relative_errors(logits, expected)
        prefill.append(first)
        decode += rest
        if dtype == "float32":
            (rounded,) = llm.apply_model(lambda m, s=sequence, n=count: vllm_reference.logits(m, s, n, torch.float32))
            linear += vllm_reference.relative_errors(rounded[:, :vocabulary], expected)
    row = {"relerr_prefill": max(prefill), "relerr_decode": max(decode, default=None)}
    return row | ({"relerr_float32_linear_alone": max(linear)} if linear else {})


def logits_of(step: Any, vocabulary: int) -> torch.Tensor:
    """One position's raw logits [vocabulary] from vLLM's {token: Logprob}."""
    row = torch.full((vocabulary,), torch.nan, dtype=torch.float64)
    for token, entry in step.items():
        row[token] = entry.logprob
    return row


def tokens(args: argparse.Namespace, folder: str, config: Row) -> Iterator[Row]:
    """Greedy tokens of the first engine, and whether the others give the same."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # our own functions go to our own workers
    expected: list[list[int]] | None = None
    for backend, way, changes in runs(args):

        def work(backend: str = backend, changes: Row = changes) -> Row:
            nonlocal expected
            with engine(args, folder, backend, **changes) as llm:
                llm.apply_model(vllm_reference.draw_weights)
                vocabulary = config["vocab_size"]
                prompts = [prompt_of(n, vocabulary, seed) for seed, n in enumerate((args.context, 300))]
                before = decode_tokens()
                found = [list(one.outputs[0].token_ids) for one in generate(llm, prompts, 1 + args.decode_tokens)]
                expected = expected or found
                row = {"tokens": found, "tokens_equal": found == expected} | proved(backend)
                if backend == "ELSA":  # more than were asked for: drafts were verified
                    row["tokens_in_decode"] = decode_tokens() - before
                return row

        yield attempt(base_row(args, config, backend, way) | {"check": "greedy tokens"}, work)


def decode_tokens() -> int:
    """Tokens whose attention ELSA computed in decode so far, over all engine processes."""
    directory = envs.vllm_metrics_dir()
    slot = ("elsa_vllm_tokens", (("phase", "decode"),))
    return int(totals(directory)[INDEX[slot]]) if directory is not None else 0


if __name__ == "__main__":
    raise SystemExit(main())
