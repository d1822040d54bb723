"""Two ranks of vLLM's real engine, on the CPU: the tokens of one."""

import json
import multiprocessing

import pytest
from vllm_support import needs_vllm, others_may_warn

pytestmark = [needs_vllm, others_may_warn, pytest.mark.slow]

FLAGS = ["tokens", "--dtype", "float32", "--layers", "2", "--context", "700", "--chunk-tokens", "256"]
FLAGS += ["--decode-tokens", "5", "--set", "num_key_value_heads=1", "--set", "num_attention_heads=4"]
FLAGS += ["--set", "hidden_size=256", "--set", "intermediate_size=128", "--set", "head_dim=64"]
FLAGS += ["--set", "vocab_size=512", "--variants", "plain", "dcp2", "pp2", "tp2"]


def measured(folder):
    """In a process of its own, whose environment the benchmark may change."""
    import os

    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    os.environ.pop("ELSA_VLLM_METRICS_DIR", None)
    from load_tests import vllm_bench

    args = vllm_bench.build_parser().parse_args(FLAGS)
    options = {"worker_cls": "cpu_ranks.Worker", "distributed_executor_backend": "mp"}
    # The CPU build's later pipeline stages have no room for what they receive unless their model was compiled.
    args.variants = [(way, changes | options | {"enforce_eager": way != "pp2"}) for way, changes in args.variants]
    config = vllm_bench.geometry(args)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rows.json").write_text(json.dumps(list(args.measure(args, str(folder), config))))


def test_two_ranks_give_the_tokens_of_one(tmp_path):
    """Prompts in chunks beside decode, keys shared out over the ranks, layers and heads, too."""
    process = multiprocessing.get_context("spawn").Process(target=measured, args=(tmp_path,))
    process.start()
    process.join(900)
    if process.is_alive():
        process.kill()
        pytest.fail("no result in 900 s")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["error"] for row in rows] == [None] * 4
    assert [row["variant"] for row in rows] == ["plain", "dcp2", "pp2", "tp2"]
    assert [row["elsa_layers"] for row in rows] == [2, 4, 2, 4]
    assert len({tuple(tokens) for tokens in rows[0]["tokens"]}) == 2
    assert [row["tokens"] for row in rows[1:]] == [rows[0]["tokens"]] * 3
