"""The main job on the embedded model: serve it with streamed layers, ask it about a long document, show the metrics.

Starts `elsa-serve serve` as a user would, talks to it with the official `openai` client, and stops it with SIGTERM.
Exit status 0 only if the answer is right, layers were really streamed, and the server stopped cleanly.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from transformers import AutoTokenizer

from elsa_serve.demo import Document, make_document

ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "elsa_requests_finished_total",
    "elsa_time_to_first_token_seconds_sum",
    "elsa_prompt_tokens_total",
    "elsa_generation_tokens_total",
    "elsa_offload_transfer_bytes_total",
    "elsa_offload_stall_seconds_total",
    "elsa_offload_hidden_seconds_total",
    "elsa_attention_backend_steps_total",
)


@contextmanager
def server(arguments: list[str], startup_s: float) -> Iterator[str]:
    """Run `elsa-serve serve`; yields its base URL once it is ready, and stops it with SIGTERM."""
    command = [sys.executable, "-m", "elsa_serve", "serve", *arguments, "--port", "0"]
    print("$ elsa-serve serve", *arguments, flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(startup_s, process.kill)
    watchdog.start()
    try:
        url = listening_url(process)
        wait_ready(url, process)
        watchdog.cancel()
        yield url
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        if code != 0:
            raise SystemExit(f"the server ended with status {code}, not 0")
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()


def listening_url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        print("  server:", line.rstrip(), flush=True)
        if line.startswith("Listening on "):
            # Keep reading in the background, so that a full pipe never blocks the server.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return line.split()[2]
    raise SystemExit("the server ended before it listened; its message stands above")


def wait_ready(url: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/readyz", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            pass  # 503 while the model loads
        time.sleep(0.2)
    raise SystemExit(f"the server ended with status {process.returncode} while loading")


def real_document(model: Path, tokens: int, seed: int) -> Document:
    """Sources of this interpreter's standard library, that many tokens of them, with facts hidden among the lines."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return make_document(
        tokens, seed, source="python", measure=lambda line: len(tokenizer.encode(line, add_special_tokens=False))
    )


def ask(url: str, prompt: str) -> tuple[str, float, float, int]:
    """The streamed answer, time to first token (s), decode rate (tokens/s) and prompt tokens."""
    client = OpenAI(base_url=url + "/v1", api_key=os.environ.get("ELSA_API_KEY", "none"), timeout=600)
    model = client.models.list().data[0].id
    start = time.perf_counter()
    arrivals: list[float] = []
    text, prompt_tokens = "", 0
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    print("answer: ", end="")
    for chunk in chunks:
        if chunk.usage is not None:
            prompt_tokens, tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                arrivals.append(time.perf_counter())
                text += choice.delta.content
                print(choice.delta.content, end="", flush=True)
    print()
    seconds = arrivals[-1] - arrivals[0]
    return text, arrivals[0] - start, (tokens - 1) / seconds if seconds > 0 else float("nan"), prompt_tokens


def show_metrics(url: str) -> str:
    with urllib.request.urlopen(url + "/metrics", timeout=10) as response:
        metrics = response.read().decode()
    for line in metrics.splitlines():
        if line.startswith(SHOWN) and not line.endswith(" 0.0"):
            print("  " + line)
    return metrics


def streamed_bytes(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("elsa_offload_transfer_bytes_total")]
    return sum(float(line.split()[-1]) for line in lines if 'object="weights"' in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "configs" / "demo_model", help="checkpoint to serve")
    parser.add_argument("--tokens", type=int, default=8000, help="length of the document in tokens (default: 8000)")
    parser.add_argument("--seed", type=int, default=20, help="which document (default: 20)")
    parser.add_argument("--startup-timeout", type=float, default=180, help="seconds until the server must be ready")
    args = parser.parse_args()

    document = real_document(args.model, args.tokens, args.seed)
    with server([str(args.model), "--resident-layers", "0", "--log-level", "warning"], args.startup_timeout) as url:
        print(f"document: {len(document.text):,} characters of Python sources; question: {document.question}")
        text, ttft, rate, prompt_tokens = ask(url, document.prompt)
        print(f"{prompt_tokens:,} prompt tokens; TTFT {ttft:.2f} s; then {rate:.1f} tokens/s")
        metrics = show_metrics(url)
    if document.answer not in text:
        raise SystemExit(f"wrong answer: the document says {document.answer!r}, the model {text!r}")
    if streamed_bytes(metrics) <= 0:
        raise SystemExit("no weights were streamed: elsa_offload_transfer_bytes_total is 0")
    print(f"right: the document says {document.answer!r}. The server stopped cleanly.")


if __name__ == "__main__":
    main()
