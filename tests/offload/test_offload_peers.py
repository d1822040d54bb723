"""The rows of other systems: accelerate on a tiny model, vLLM's refusal and its options, without vLLM."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_models import make_config

from kernels.bench import results_file
from load_tests import offload_peers


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(make_config("llama").to_dict()))
    return [
        "--model", str(model), "--device", "cpu", "--dtype", "float32", "--layers", "2", "--context", "40",
        "--decode-tokens", "2", "--output", str(tmp_path / "rows.json"),
    ]  # fmt: skip


def rows_of(flags: list[str]) -> list[dict[str, Any]]:
    assert offload_peers.main(flags) == 0
    return results_file.read(Path(flags[-1]))["rows"]


def test_accelerate_runs_a_prompt_and_tokens(flags: list[str]) -> None:
    pytest.importorskip("accelerate")
    (row,) = rows_of(["--case", "accelerate:1GiB", *flags])
    assert row["error"] is None
    assert (row["system"], row["layers"], row["context"]) == ("hf-accelerate", 2, 40)
    assert row["prefill_s"] > 0
    assert row["decode_s_per_token"] > 0


def test_vllm_offloads_everything_under_the_cap_and_a_refusal_is_a_row(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    @contextmanager
    def engine(args: Any, folder: str, backend: str, **changes: Any) -> Iterator[Any]:
        asked.append(changes)
        if changes["offload_backend"] == "uva":
            raise ValueError("no room for KV")
        metrics = SimpleNamespace(scheduled_ts=1.0, first_token_ts=4.5, last_token_ts=5.5)
        yield SimpleNamespace(generate=lambda *_, **__: [SimpleNamespace(metrics=metrics)])

    def generate(llm: Any, *_: Any, **__: Any) -> Any:
        return llm.generate()

    monkeypatch.setattr(offload_peers.vllm_bench, "engine", engine)
    monkeypatch.setattr(offload_peers.vllm_bench, "generate", generate)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=4 << 30), raising=False
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    cases = ["vllm-prefetch:1GiB", "vllm-uva:1GiB", "vllm-prefetch-3-of-4:1GiB"]
    prefetch, uva, deeper = rows_of(["--case", *cases, *flags])
    assert (prefetch["prefill_s"], prefetch["decode_s_per_token"], prefetch["case"]) == (3.5, 0.5, "vllm-prefetch")
    assert "no room for KV" in uva["error"]
    assert deeper["case"] == "vllm-prefetch-3-of-4"
    assert [one.get("offload_prefetch_step") for one in asked] == [1, None, 2]
    assert [one.get("offload_group_size") for one in asked] == [1, None, 4]
    assert {one["gpu_memory_utilization"] for one in asked} == {0.25}
    layer = 4 * 64 * 64 + 3 * 64 * 96
    assert asked[1]["cpu_offload_gb"] >= 2 * layer * 4 / 2**30


def test_the_engine_gets_all_options_and_what_it_offloaded_is_let_go(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark's own engine over a stand-in for vLLM: one that runs, and one that is refused."""
    asked: list[dict[str, Any]] = []
    layers: list[SimpleNamespace] = []
    current: list[Any] = [None]

    class LLM:
        def __init__(self, **options: Any) -> None:
            asked.append(options)
            layers.append(SimpleNamespace(_param_offloaders={"weight": torch.zeros(1)}))
            current[0] = SimpleNamespace(module_offloaders=layers[-1:])
            if options["gpu_memory_utilization"] < 0.5:
                raise ValueError("no room for KV")
            self.llm_engine = SimpleNamespace(engine_core=self)

        def shutdown(self) -> None:
            current[0] = None  # as vLLM's runner does

        def generate(self, prompts: Any, params: Any, **_: Any) -> Any:
            metrics = SimpleNamespace(scheduled_ts=1.0, first_token_ts=4.5, last_token_ts=5.5)
            return [SimpleNamespace(metrics=metrics) for _ in prompts]

    offloader = SimpleNamespace(get_offloader=lambda: current[0], set_offloader=lambda one: current.__setitem__(0, one))
    loader = SimpleNamespace(dummy_loader=SimpleNamespace(initialize_single_dummy_weight=None))
    for name, module in {
        "vllm": SimpleNamespace(LLM=LLM, SamplingParams=lambda **_: None),
        "vllm.distributed": SimpleNamespace(cleanup_dist_env_and_memory=lambda: None),
        "vllm.model_executor": SimpleNamespace(),
        "vllm.model_executor.model_loader": loader,
        "vllm.model_executor.offloader": offloader,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=4 << 30), raising=False
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    ran, refused = rows_of(["--case", "vllm-prefetch-2:3GiB", "vllm-prefetch-2:1GiB", *flags])
    assert (ran["error"], ran["prefill_s"]) == (None, 3.5)
    assert "no room for KV" in refused["error"]
    assert [one["gpu_memory_utilization"] for one in asked] == [0.75, 0.25]
    assert all(one["attention_backend"] == "FLASH_ATTN" and one["max_model_len"] == 43 for one in asked)
    assert "worker_cls" not in asked[0]
    assert layers[0]._param_offloaders == {}
    assert current == [None]


def test_what_takes_too_long_is_ended_and_an_error_of_its_own_row(flags: list[str]) -> None:
    start = time.monotonic()  # a second is over before such a process has imported torch
    rows = rows_of(["--case", "accelerate:1GiB", "accelerate:2GiB", "--limit", "1", *flags])
    assert [(row["gpu_cap"], row["error"]) for row in rows] == [
        (cap, "no result within 1 s") for cap in ("1GiB", "2GiB")
    ]
    assert all(row["run_s"] >= 1 for row in rows)
    assert "spawn" not in results_file.read(Path(flags[-1]))["command"]
    assert time.monotonic() - start < 60
    assert not multiprocessing.active_children()


def died(*_: Any) -> None:
    os._exit(3)


def told(connection: Any, *_: Any) -> None:
    """A worker whose second engine is refused."""
    for error in (None, "ValueError: no room for KV"):
        peer, cap = connection.recv()
        connection.send({"error": error, "process": os.getpid(), "asked": [peer, cap]})
    connection.recv()


def test_a_process_that_ends_leaves_a_row(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows_of(["--case", "vllm-uva:1GiB", "--limit", "300", *flags])  # neither vLLM nor a GPU is here
    assert row["case"] == "vllm-uva"
    assert row["peak_host_bytes"] > 0  # known to the process alone
    assert "Error" in row["error"]
    monkeypatch.setattr(offload_peers, "serve", died)
    (row,) = rows_of(["--case", "vllm-uva:1GiB", "--limit", "300", *flags])
    assert (row["case"], row["error"]) == ("vllm-uva", "ended with status 3")


def test_cases_of_one_system_share_a_process_until_one_fails(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_peers, "serve", told)
    cases = ["vllm-prefetch-2:4GiB", "vllm-prefetch-2:3GiB", "vllm-uva:2GiB", "vllm-uva:1GiB", "accelerate:1GiB"]
    rows = rows_of(["--case", *cases, "--limit", "300", *flags])
    assert [row["asked"] for row in rows] == [case.split(":") for case in cases]
    first, refused, fresh, failed, other = (row["process"] for row in rows)
    assert first == refused
    assert fresh == failed
    assert len({refused, fresh, other}) == 3
    assert not multiprocessing.active_children()
