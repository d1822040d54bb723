"""How far FP32 models are from FP64, and how long their greedy tokens agree: ours, torch's FP32, and TF32.

    python -m load_tests.fp32_model --layers 20 --prompt 4096 --tokens 64 --output load_tests/results/fp32-h200.json

One model of LLaMA-13B's geometry with random weights, as many layers as asked for, through transformers. The truth is
the same model in FP64 throughout (its norms too, which transformers computes in FP32), with the rotary tables of the
FP32 model, which belong to its definition. `relerr` is ‖logits − truth‖ / ‖truth‖ over the prompt's last positions,
`tokens_equal` how many greedy tokens come before the first that differs from the truth's.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from elsa_serve import hf
from elsa_serve.fp32_linear import use_fp32_linear
from kernels.bench import results_file
from kernels.bench.linear import tf32

MODEL = Path(__file__).parent / "models" / "llama-13b.json"
POSITIONS = 64  # whose logits are compared, the prompt's last
SYSTEMS = (  # name, attention, linear layers, TF32
    ("torch.fp32", "sdpa", "torch", False),
    ("torch.tf32", "sdpa", "torch", True),
    ("elsa.linear", "sdpa", "elsa", False),
    ("elsa", "elsa", "elsa", False),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    hf.register()
    torch.manual_seed(args.seed)
    model = build(args)
    ids = torch.randint(0, model.config.vocab_size, (1, args.prompt), device=args.device)
    with torch.inference_mode():
        start = time.perf_counter()
        exact = in_fp64(model)
        truth, tokens = logits(exact, ids), greedy(exact, ids, args.tokens)
        del exact
        print(f"FP64: {time.perf_counter() - start:.1f} s", flush=True)
        rows = [measure(model, ids, truth, tokens, args, *system) for system in SYSTEMS]
    if args.output:
        known = results_file.read(args.output)["rows"] if args.output.exists() else []
        results_file.write(args.output, [*known, *rows])
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a config.json (default: LLaMA-13B's geometry)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens after the prompt (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="results file to append the rows to")
    return parser


def build(args: argparse.Namespace) -> Any:
    """The model with random weights, in FP32 on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(json.loads(args.model.read_text()) | changes))
        config = AutoConfig.from_pretrained(folder)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()


def in_fp64(model: Any) -> Any:
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(_norm, module)
    return exact


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[POSITIONS, V], of the last positions of ids [1, N]."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=POSITIONS).logits[0]


def greedy(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, ids.shape[1] :].tolist()


@contextmanager
def configured(model: Any, attention: str, linear: str, allow_tf32: bool) -> Iterator[None]:
    model.set_attn_implementation(attention)
    split = use_fp32_linear(model) if linear == "elsa" else nullcontext()
    with split, tf32(allow_tf32):
        yield


def measure(
    model: Any,
    ids: torch.Tensor,
    truth: torch.Tensor,
    tokens: list[int],
    args: argparse.Namespace,
    name: str,
    attention: str,
    linear: str,
    allow_tf32: bool,
) -> dict[str, Any]:
    with configured(model, attention, linear, allow_tf32):
        found = logits(model, ids).double()
        generated = greedy(model, ids, args.tokens)
    equal = next((i for i, (a, b) in enumerate(zip(generated, tokens)) if a != b), len(tokens))
    row = {
        "what": "fp32_model", "impl": name, "ours": name.startswith("elsa"), "model": args.model.stem,
        "layers": len(model.model.layers), "dtype": "float32", "attention": attention, "linear": linear,
        "tf32": allow_tf32, "context": args.prompt, "relerr": ((found - truth).norm() / truth.norm()).item(),
        "max_error": (found - truth).abs().max().item(), "logits_std": truth.std().item(),
        "tokens": len(tokens), "tokens_equal": equal,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
