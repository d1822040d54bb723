"""Measure the demo model: exact answers to questions about held-out documents, by length and by the fact's depth.

    python configs/demo_model/evaluate.py --lengths 512 2048 --documents 20
    python configs/demo_model/evaluate.py --lengths 8192 --documents 200 --device cuda --dtype float16

A document with its question and the answer fills the stated number of tokens. The default check needs one pass a
document: the answer counts as right when, after every prefix of the right answer, the most likely token is its next
one, up to the end-of-turn token. That is when greedy decoding produces exactly this answer; --generate decodes for
real.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elsa_serve.demo import Document, make_document

FACTS = (1, 4, 16, 64)


def held_out_document(tokenizer, length: int, seed: int, depth: float) -> Document:
    """Document number `seed` for a chat of `length` tokens: prose and Python in turn, one to sixty-four facts."""

    @lru_cache(maxsize=4096)
    def measure(line: str) -> int:
        return len(tokenizer.backend_tokenizer.encode(line, add_special_tokens=False).ids)

    overhead = 48  # the chat template, the question and the answer
    n_facts = max(1, min(FACTS[seed // 2 % len(FACTS)], (length - overhead) // 40))
    source = "python" if seed % 2 else "prose"
    return make_document(length - overhead, seed, n_facts=n_facts, depth=depth, source=source, measure=measure)


def encode(tokenizer, document: Document) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt [1, n] through the chat template, and the right continuation [1, m] with the end-of-turn token."""
    messages = [{"role": "user", "content": document.prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answer = document.answer + tokenizer.eos_token
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in (prompt, answer)]
    return ids[0], ids[1]


@torch.inference_mode()
def is_exact(model, prompt: torch.Tensor, answer: torch.Tensor, generate: bool) -> bool:
    prompt, answer = prompt.to(model.device), answer.to(model.device)
    if generate:
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=answer.shape[1])
        return torch.equal(output[:, prompt.shape[1] :], answer)
    given = torch.cat((prompt, answer[:, :-1]), dim=1)
    logits = model(given, use_cache=False, logits_to_keep=answer.shape[1]).logits
    return torch.equal(logits.argmax(-1), answer)


def evaluate(model, tokenizer, length: int, seeds: Iterable[int], documents: int, generate: bool = False) -> list[dict]:
    """One row for each seed; depths are spread evenly over `documents` documents and shuffled by a stride."""
    rows = []
    for seed in seeds:
        depth = (seed * 71 % documents + 0.5) / documents
        document = held_out_document(tokenizer, length, seed, depth)
        prompt, answer = encode(tokenizer, document)
        row = {"length": length, "seed": seed, "depth": round(depth, 4), "facts": len(document.facts)}
        row |= {"source": "python" if seed % 2 else "prose", "prompt_tokens": prompt.shape[1]}
        rows.append(row | {"exact": is_exact(model, prompt, answer, generate)})
    return rows


def table(rows: list[dict]) -> str:
    """Exact answers by length (lines) and depth of the fact (columns, fifths of the document)."""
    depths = " | ".join(f"depth {i / 5:.1f}–{(i + 1) / 5:.1f}" for i in range(5))
    lines = [f"| tokens | documents | exact | {depths} |", "|" + "---:|" * 8]
    by_length = defaultdict(list)
    for row in rows:
        by_length[row["length"]].append(row)
    for length, group in sorted(by_length.items()):
        cells = []
        for i in range(5):
            inside = [row["exact"] for row in group if int(row["depth"] * 5) == i]
            cells.append(f"{sum(inside)} / {len(inside)}" if inside else "–")
        share = sum(row["exact"] for row in group) / len(group)
        lines.append(f"| {length:,} | {len(group)} | {share:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: list[dict], model) -> dict:
    gpu = torch.cuda.get_device_name() if model.device.type == "cuda" else None
    machine = {"gpu": gpu, "cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    return {"machine": machine, "torch": torch.__version__, "dtype": str(model.dtype), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="folder of the model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of context")
    parser.add_argument("--documents", type=int, default=20, help="documents for each length")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of the model")
    parser.add_argument("--generate", action="store_true", help="decode greedily instead of checking each next token")
    parser.add_argument("--json", type=Path, help="write every document's result here")
    arguments = parser.parse_args()
    if arguments.documents < 1 or min(arguments.lengths) < 128:
        parser.error("--documents must be at least 1 and --lengths at least 128")
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation=arguments.attention
    )
    model = model.to(arguments.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = []
    for length in arguments.lengths:
        seeds = range(arguments.documents)
        rows += evaluate(model, tokenizer, length, seeds, arguments.documents, arguments.generate)
        print(table(rows).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(report(rows, model), indent=1))


if __name__ == "__main__":
    main()
