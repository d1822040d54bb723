"""The comparison of FP32 models with FP64, at a size where a CPU does it in a second."""

import json

import pytest

from kernels.bench import results_file
from load_tests import fp32_model

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp32")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    output = folder / "fp32.json"
    arguments = ["--model", str(folder / "tiny.json"), "--layers", "2", "--device", "cpu"]
    assert fp32_model.main([*arguments, "--prompt", "80", "--tokens", "8", "--output", str(output)]) == 0
    return results_file.read(output)["rows"]


def test_every_system_has_its_row(rows):
    assert [row["impl"] for row in rows] == [name for name, *_ in fp32_model.SYSTEMS]
    assert {(row["attention"], row["linear"]) for row in rows if row["ours"]} == {("sdpa", "elsa"), ("elsa", "elsa")}
    assert {row["layers"] for row in rows} == {2}


def test_fp32_is_near_the_truth_and_not_equal_to_it(rows):
    for row in rows:
        assert 1e-8 < row["relerr"] < 3e-6
        assert row["tokens_equal"] == row["tokens"] == 8
