"""The benchmark's own parts: its float64 reference against transformers, its geometry, its errors as rows."""

import argparse
import os
from types import SimpleNamespace

import pytest
import torch
import transformers

from kernels.bench import results_file
from load_tests import vllm_bench, vllm_reference

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def as_in_vllm(model):
    """The modules of a transformers LLaMA under the names and in the packing that vLLM gives them."""

    def packed(*linears):
        return SimpleNamespace(weight=torch.cat([linear.weight for linear in linears]))

    positions = torch.arange(64)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, 64, 1, dtype=torch.float64), positions)
    table = torch.cat([cos[0, :, :8], sin[0, :, :8]], dim=-1)
    layers = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            SimpleNamespace(
                self_attn=SimpleNamespace(
                    qkv_proj=packed(attention.q_proj, attention.k_proj, attention.v_proj), o_proj=attention.o_proj,
                    head_dim=16, q_size=64, kv_size=32, scaling=16**-0.5,
                    rotary_emb=SimpleNamespace(cos_sin_cache=table),
                ),
                mlp=SimpleNamespace(gate_up_proj=packed(mlp.gate_proj, mlp.up_proj), down_proj=mlp.down_proj),
                input_layernorm=layer.input_layernorm,
                post_attention_layernorm=layer.post_attention_layernorm,
            )
        )  # fmt: skip
    body = SimpleNamespace(embed_tokens=model.model.embed_tokens, layers=layers, norm=model.model.norm)
    return SimpleNamespace(model=body, lm_head=model.lm_head)


def test_the_reference_is_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL)
    model = transformers.LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = torch.randint(0, 96, (40,)).tolist()
    found = vllm_reference.logits(as_in_vllm(model), tokens, 5)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -5:]
    # transformers normalises in float32, whatever the model's dtype.
    assert max(vllm_reference.relative_errors(found, expected)) < 2e-6
    assert max(vllm_reference.relative_errors(found[:, torch.randperm(96)], expected)) > 0.1
    rounded = vllm_reference.logits(as_in_vllm(model), tokens, 5, torch.float32)
    assert 1e-8 < max(vllm_reference.relative_errors(rounded, found)) < 1e-5


def test_geometry_takes_changes_and_refuses_unknown_keys():
    parser = vllm_bench.build_parser()
    args = parser.parse_args(["speed", "--layers", "2", "--set", "vocab_size=128"])
    config = vllm_bench.geometry(args)
    assert (config["num_hidden_layers"], config["vocab_size"], config["num_attention_heads"]) == (2, 128, 40)
    with pytest.raises(SystemExit, match="'colour' is not in"):
        vllm_bench.geometry(parser.parse_args(["speed", "--set", "colour=3"]))


def test_a_backend_that_fails_is_a_row_with_its_error():
    def fail():
        raise ValueError("no such backend")

    row = vllm_bench.attempt({"attention": "X"}, fail)
    assert row["error"] == "ValueError: no such backend"
    assert vllm_bench.attempt({}, lambda: {"prefill_s": 1.0})["error"] is None


def test_an_elsa_row_needs_proof(monkeypatch):
    from elsa_serve.vllm_plugin.verify import NotActive

    monkeypatch.delenv("ELSA_VLLM_METRICS_DIR", raising=False)
    with pytest.raises(NotActive):
        vllm_bench.proved("ELSA")
    assert vllm_bench.proved("FLASH_ATTN") == {}


def test_variants_are_engine_options_by_name():
    assert vllm_bench.variant("plain") == ("plain", {})
    assert vllm_bench.variant("dcp2")[1] == {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    assert vllm_bench.variant("elsa_fp32") == ("elsa_fp32", {"quantization": "elsa_fp32"})
    assert vllm_bench.variant("ngram5")[1]["speculative_config"]["num_speculative_tokens"] == 5
    with pytest.raises(argparse.ArgumentTypeError, match="'warp9'"):
        vllm_bench.variant("warp9")


def test_collected_rows_keep_the_newest_of_a_configuration_and_where_it_came_from(tmp_path):
    def run(name, date, rows):
        head = {"machine": {}, "versions": {}, "commit": name, "date": date}
        command = f"python3 -m load_tests.vllm_bench speed --output /somewhere/{name}.json"
        results_file.write_document(tmp_path / name, head | {"command": command, "rows": rows})

    fp16, fp32 = {"dtype": "float16", "layers": 40}, {"dtype": "float32", "layers": 40}
    run("old", "2026-01-01", [fp16 | {"prefill_s": 3.0}, fp32 | {"prefill_s": 9.0}])
    run("new", "2026-01-02", [fp16 | {"prefill_s": 2.0}])
    for _ in range(2):  # what the file holds is kept
        vllm_bench.main(["collect", *map(str, (tmp_path / "new", tmp_path / "old")), "--output", str(tmp_path / "all")])
        rows = results_file.read(tmp_path / "all")["rows"]
        assert [(row["dtype"], row["prefill_s"], row["commit"]) for row in rows] == [
            ("float32", 9.0, "old"),
            ("float16", 2.0, "new"),
        ]
        assert all(row["command"] == "python3 -m load_tests.vllm_bench speed" for row in rows)


def test_ranks_of_one_gpu_are_nccl_hosts_of_their_own_on_the_first_device(monkeypatch):
    pytest.importorskip("vllm")
    from load_tests import shared_gpu

    for name in ("NCCL_HOSTID", "NCCL_SOCKET_IFNAME", "VLLM_ALLREDUCE_USE_SYMM_MEM"):
        monkeypatch.setenv(name, "before")  # so that all are put back
    seen = []
    monkeypatch.setattr(shared_gpu.GpuWorker, "init_device", lambda self: seen.append(self.local_rank))
    hosts = set()
    for rank in range(2):
        worker = object.__new__(shared_gpu.Worker)
        worker.rank = worker.local_rank = rank
        worker.init_device()
        hosts.add(os.environ["NCCL_HOSTID"])
    assert seen == [0, 0]
    assert hosts == {"rank 0", "rank 1"}


def test_the_engine_of_ranks_on_one_gpu_takes_that_worker(monkeypatch):
    vllm = pytest.importorskip("vllm")

    from load_tests import shared_gpu

    taken = {}

    class Engine:
        def __init__(self, **options):
            taken.update(options)
            self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    monkeypatch.setattr(vllm, "LLM", Engine)
    parser = vllm_bench.build_parser()
    for flags in ([], ["--one-gpu"]):
        args = parser.parse_args(["tokens", "--layers", "1", *flags])
        taken.clear()
        with vllm_bench.engine(args, "folder", "ELSA", tensor_parallel_size=2):
            pass
        row = vllm_bench.base_row(args, vllm_bench.geometry(args), "ELSA", "tp2")
        assert row.get("one_gpu") == (True if flags else None)
        assert (taken.get("worker_cls") == shared_gpu.ENGINE_OPTIONS["worker_cls"]) == bool(flags)
    assert shared_gpu.ENGINE_OPTIONS["worker_cls"] == "load_tests.shared_gpu.Worker"
