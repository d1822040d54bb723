"""Proof that ELSA computes in a running vLLM: from the counters that its layers write, not from what was asked for.

python -m elsa_serve.vllm_plugin.verify http://127.0.0.1:8000     # exit status 1 where ELSA is not active
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from elsa_serve import envs
from elsa_serve.errors import UsageError
from elsa_serve.vllm_plugin.metrics import INDEX, SLOTS, totals

REMEDY = "start vLLM with --attention-backend elsa, and look for 'ELSA attention is active' in its log"


class NotActive(UsageError):
    """vLLM runs without ELSA."""


@dataclass(frozen=True, slots=True)
class Activity:
    """Attention layers on ELSA, over all engine processes, and the batches planned for them since the start."""

    layers: int
    steps: int

    def check(self, where: str) -> Activity:
        """Itself. Raises `NotActive` unless layers run on ELSA and have had a batch."""
        if not self.layers:
            raise NotActive(f"no attention layer of {where} runs on ELSA: {REMEDY}")
        if not self.steps:
            raise NotActive(f"{self.layers} attention layers of {where} are on ELSA, but no batch has reached them yet")
        return self


def assert_active() -> Activity:
    """For an `LLM` of this process, with its engine in here or in processes of its own, after a first `generate`."""
    directory = envs.vllm_metrics_dir()
    if directory is None:
        raise NotActive(f"vLLM has not loaded the plugin in this process: {REMEDY}")
    values = totals(directory)
    steps = sum(values[at] for (name, _), at in INDEX.items() if name == "elsa_vllm_steps")
    return Activity(layers=int(values[len(SLOTS)]), steps=int(steps)).check("this process's engine")


def assert_server_active(url: str, timeout_s: float = 10.0) -> Activity:
    """The same for a server, from its /metrics page."""
    address = url.rstrip("/").removesuffix("/v1") + "/metrics"
    try:
        with urllib.request.urlopen(address, timeout=timeout_s) as answer:
            page = answer.read().decode()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UsageError(f"cannot read {address}: {error}") from error
    samples = [line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("elsa_vllm_")]

    def total(name: str) -> int:
        return int(sum(float(value) for key, value in samples if key.partition("{")[0] == name))

    return Activity(layers=total("elsa_vllm_attention_layers"), steps=total("elsa_vllm_steps_total")).check(url)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elsa_serve.vllm_plugin.verify", description=__doc__.split("\n")[0])
    parser.add_argument("url", help="of a running vLLM server, such as http://127.0.0.1:8000")
    args = parser.parse_args(argv)
    try:
        activity = assert_server_active(args.url)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"ELSA is active: {activity.layers} attention layers, {activity.steps} batches so far")
    return 0


if __name__ == "__main__":
    sys.exit(main())
