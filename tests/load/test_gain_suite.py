"""The suite of cells behind the headline figures, on a model small enough for a CPU."""

import argparse
import json
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from elsa_load.ab import agrees
from elsa_load.intervals import paired_gain
from transformers import AutoTokenizer

from elsa_serve import results_file
from elsa_serve.offload.checkpoint import load_config
from elsa_serve.offload.geometry import Geometry
from elsa_serve.offload.loading import DTYPES
from elsa_serve.offload.plan import make_plan
from load_tests import gain_suite, tables
from load_tests.gain_suite import SuiteCell

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file


def test_few_layers_are_placed_as_all_would_be():
    """The share of the KV that lies on the GPU is the whole model's, and chunks and slots are too."""
    cell = SuiteCell.parse("float16:32768:10")
    words = ["--output", "x", "--gpu-memory", "24GiB"]
    args = gain_suite.build_parser().parse_args(words)
    found = gain_suite.placement(args, cell)
    whole = Geometry.from_config(load_config(args.model), DTYPES["float16"])

    def plan(geometry, gpu_budget, **options):
        options |= {"host_budget": 1 << 50, "context": 32768 + 5, "resident_layers": 0, "device_type": "cpu"}
        return make_plan(geometry, gpu_budget=gpu_budget, **options)

    all_layers = plan(whole, 24 << 30)
    few = plan(replace(whole, layers=10), found["gpu-memory"], slots=found["slots"], chunk_tokens=found["chunk-tokens"])
    assert 0 < few.kv_gpu_bytes < whole.kv_bytes(32768) // 4
    assert few.kv_gpu_bytes == pytest.approx(all_layers.kv_gpu_bytes / 4, rel=0.02)
    assert (few.slots, few.chunk_tokens) == (all_layers.slots, all_layers.chunk_tokens)


@pytest.mark.parametrize("text", ["float16:32768", "int8:1:1", "float16:0:1", "float16:a:1", "float16:1:1:1"])
def test_what_is_no_cell_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="DTYPE:CONTEXT:LAYERS"):
        SuiteCell.parse(text)


def test_cells_of_several_runs_come_together(tmp_path, tiny, monkeypatch):
    """Without the package's entry points, as on a machine that has only the sources. What was committed and not
    measured again stays; what was, is replaced."""
    monkeypatch.setattr("elsa_serve.cli.entry_points", lambda **_: ())
    output = tmp_path / "gain-tiny.json"
    words = ["--model", str(tiny), "--gpu-memory", "24MiB", "--work", str(tmp_path / "work"), "--output", str(output)]
    words += ["--pairs", "2", "--warm-up", "0", "--chunk-tokens", "64"]
    monkeypatch.setattr("elsa_load.prometheus.missing", lambda: "none here")
    ran = []  # layers of what ran, and whether kernels that it compiles are noted
    run_cell = gain_suite.run_cell

    @contextmanager
    def compiled_kernels():
        ran.append("noted")
        yield ["merge", "merge"]
        ran.append("")

    monkeypatch.setattr(gain_suite, "compiled_kernels", compiled_kernels)

    def noted(args, cell, *rest):
        ran.append(cell.layers)
        return run_cell(args, cell, *rest)

    monkeypatch.setattr(gain_suite, "run_cell", noted)
    assert gain_suite.main([*words, "--cell", "float32:256:3"]) == 0
    assert ran == [2, "noted", 3, ""]
    assert gain_suite.main([*words, "--cell", "float32:256:3"]) == 0
    assert len(ran) == 4, "what is complete is not measured again"
    kept, old = (results_file.read(output)["rows"][0] | {"context": n, "layers": 7} for n in (128, 192))
    other = old | {"chunk_tokens": 192}  # in one piece: another row
    results_file.write_document(output, results_file.read(output) | {"rows": [kept, old, other]})
    assert gain_suite.main([*words, "--cell", "float32:192:1"]) == 0
    rows = results_file.read(output)["rows"]
    others = [(192, 1)] * 3 + [(192, 7)]
    assert [(row["context"], row["layers"]) for row in rows] == [(128, 7), *others, *[(256, 3)] * 3]
    assert rows.pop(4)["chunk_tokens"] == 192
    for row in rows[1:]:
        assert row["compiled_late"] == ["merge"]
        assert {"gpu_cap_bytes", "chunk_tokens", "commit", "gain_percent", "ci_low", "ci_high"} <= row.keys()
        seconds = [sum(column) / 2 for column in zip(*row["pairs_s"])]
        assert seconds == pytest.approx([row["baseline_s"], row["candidate_s"]])
    assert "<svg" in (tmp_path / "work" / "report-float32.html").read_text()
    output.replace(tmp_path / "gain-h200.json")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "float32, 256 tokens, 3 layers, prefill" in tables.gain_table()
    assert "float32, 192 tokens in one piece, 7 layers, prefill" in tables.gain_table()


@pytest.mark.parametrize(("dtype", "baseline"), [("float16", "FLASH_ATTN"), ("float32", "TRITON_ATTN")])
def test_a_cell_on_vllm_states_all_that_two_servers_share(tmp_path, tiny, monkeypatch, dtype, baseline):
    asked = []
    monkeypatch.setattr(gain_suite, "bench", lambda words: asked.append(words) or 0)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # what vllm_bench sets for itself
    words = ["--engine", "vllm", "--model", str(tiny), "--cell", f"{dtype}:256:3", "--warm-up", "1", "--pairs", "5"]
    assert gain_suite.main([*words, "--work", str(tmp_path), "--output", str(tmp_path / "gain.json")]) == 0
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    ((what, model, *flags),) = asked
    args = SimpleNamespace(**dict(zip((word.removeprefix("--").replace("-", "_") for word in flags[::2]), flags[1::2])))
    folder = tmp_path / f"vllm-{dtype}-256-3"
    assert (what, model, args.tokenizer, args.output) == ("gain", *[str(folder / "model")] * 2, str(folder))
    assert (args.engine, args.baseline, args.warm_up) == ("vllm", f"attention-backend={baseline}", "1")
    assert (args.pairs, args.context, args.counting) == ("5", "256", "continuous")
    settings = dict(item.split("=") for item in args.set.split(","))
    a_token = 2 * 3 * 4 * 16 * (4 if dtype == "float32" else 2)
    assert int(settings["kv-cache-memory-bytes"]) - (256 << 20) >= (256 + 8 + 1) * a_token
    assert settings["max-num-batched-tokens"] == "265"  # the prompt in one step
    assert (settings["dtype"], settings["load-format"]) == (dtype, "dummy")
    assert json.loads((folder / "model" / "config.json").read_text()) == TINY | {"num_hidden_layers": 3}


def test_every_token_of_a_random_model_has_a_text_of_its_own(tmp_path):
    gain_suite.write_tokenizer(tmp_path, 3000)
    tokenizer, known = (AutoTokenizer.from_pretrained(one) for one in (tmp_path, gain_suite.DEMO_MODEL))
    assert (len(tokenizer), len(known)) == (3000, 2048)
    new = [tokenizer.decode([i]) for i in range(2048, 3000)]
    assert len({*new}) == len(new)
    assert new[0] == "<2048>"
    text = "The code of alpha is 58213.\n" * 20 + "def f(x):\n    return <7>\n"
    assert tokenizer.encode(text) == known.encode(text)


def test_what_is_committed_follows_from_its_times_and_prometheus_agrees():
    rows = results_file.read(tables.RESULTS / "gain-h200.json")["rows"]
    assert rows
    for row in rows:
        found = paired_gain(*zip(*row["pairs_s"]), row["confidence"])
        assert (row["gain_percent"], row["ci_low"], row["ci_high"]) == pytest.approx(
            (found.percent, found.low, found.high)
        )
        assert agrees(row), (row["dtype"], row["context"], row["phase"])
        assert row["prometheus_gain_percent"] is not None
        assert not row.get("compiled_late")
