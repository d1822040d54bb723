"""Checkpoints into flat buffers: the same logits as transformers' own loading, and an error for each broken one."""

from __future__ import annotations

import gc
import json
import logging
import resource
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_models import FAMILIES, logits, make_config, make_model, save, streamed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from elsa_serve.errors import CheckpointError
from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.streams import make_streams
from elsa_serve.offload.units import ALIGNMENT
from elsa_serve.offload.weights import ModelWeights, load_model

IDS = torch.arange(24).view(2, 12)


@contextmanager
def loaded(directory: Path, **options: Any) -> Iterator[ModelWeights]:
    options = {"dtype": "auto", "device": "cpu", "attn_implementation": "sdpa", "progress": False} | options
    weights = load_model(directory, **options)
    try:
        yield weights
    finally:
        weights.close()


def run(weights: ModelWeights) -> torch.Tensor:
    streams = make_streams("cpu", serial=True)
    ring = WeightStream(weights, (), 2, streams)
    with streamed(weights, ring):
        result = logits(weights.model, IDS)
    ring.close()
    return result


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One single-file and one sharded checkpoint of every family."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for family in FAMILIES:
        model = make_model(family)
        found[family] = save(model, root / family)
        found[f"{family}-sharded"] = save(model, root / f"{family}-sharded", shard="200KB")
    return found


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A single-file LLaMA checkpoint to break."""
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "copy"))


@pytest.fixture
def sharded(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["llama-sharded"], tmp_path / "sharded"))


@pytest.mark.parametrize("kind", ["", "-sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_saved_model(checkpoints: dict[str, Path], family: str, kind: str) -> None:
    directory = checkpoints[family + kind]
    assert (len(list(directory.glob("*.safetensors"))) > 1) == bool(kind)
    with loaded(directory) as weights:
        assert weights.dtype == torch.float32
        assert torch.equal(run(weights), logits(make_model(family), IDS))


def test_a_layer_is_one_flat_buffer_of_aligned_parameters(checkpoints: dict[str, Path]) -> None:
    model = make_model("qwen3")
    with loaded(checkpoints["qwen3"]) as weights:
        assert len(weights.store.layers) == 5
        for index, flat in enumerate(weights.store.layers):
            own = dict(model.model.layers[index].named_parameters())
            views = weights.store.views(index)
            assert views.keys() == own.keys()
            for name, spec in weights.store.layouts[index].items():
                assert spec.offset % ALIGNMENT == 0
                assert views[name].data_ptr() == flat.data_ptr() + spec.offset
                assert torch.equal(views[name], own[name])
        assert weights.store.nbytes == sum(flat.numel() for flat in weights.store.layers)


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_resident_layers_take_no_host_memory(checkpoints: dict[str, Path], load_format: str) -> None:
    with loaded(checkpoints["llama"], load_format=load_format) as weights:
        whole, expected = weights.store.host_nbytes, run(weights)
    with loaded(checkpoints["llama"], load_format=load_format, resident=(0, 3)) as weights:
        assert weights.store.host_nbytes == whole * 3 // 5
        assert weights.store.nbytes == whole
        streams = make_streams("cpu")
        ring = WeightStream(weights, (0, 3), 2, streams)
        assert ring.device_nbytes == 4 * whole // 5
        with streamed(weights, ring):
            assert torch.equal(logits(weights.model, IDS), expected)
        ring.close()
        streams.close()


def test_tied_weights_are_stored_once(checkpoints: dict[str, Path]) -> None:
    with loaded(checkpoints["qwen3"]) as weights:
        assert weights.model.lm_head.weight is weights.model.model.embed_tokens.weight
        embedding = weights.model.lm_head.weight.numel() * 4
        assert embedding < weights.device_nbytes < embedding + 1024  # and the norm, and the rotary frequencies


def test_everything_outside_the_layers_is_real_and_on_the_device(checkpoints: dict[str, Path]) -> None:
    with loaded(checkpoints["gemma2"]) as weights:
        inside = {id(p) for layer in weights.decoder_layers for p in layer.parameters()}
        assert all(p.is_meta == (id(p) in inside) for p in weights.model.parameters())
        assert not any(b.is_meta or b.isnan().any() for b in weights.model.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_that_was_asked_for(
    checkpoints: dict[str, Path], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), loaded(checkpoints["llama-sharded"], dtype=dtype) as weights:
        assert weights.dtype == dtype
        expected = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=dtype, attn_implementation="sdpa")
        assert torch.equal(run(weights), logits(expected, IDS))
    announced = [r.getMessage() for r in caplog.records if "converting" in r.getMessage()]
    assert len(announced) == (dtype != torch.float32)  # said once, not once a tensor


def test_auto_dtype_is_the_checkpoints_own(tmp_path: Path) -> None:
    directory = save(make_model("llama", dtype=torch.bfloat16), tmp_path)
    with loaded(directory) as weights:
        assert weights.dtype == torch.bfloat16
    config = json.loads((directory / "config.json").read_text())
    config.pop("dtype")
    (directory / "config.json").write_text(json.dumps(config))
    with loaded(directory) as weights:
        assert weights.dtype == torch.bfloat16


def test_key_prefix_missing(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    with loaded(copy) as weights:
        assert torch.equal(run(weights), logits(make_model("llama"), IDS))


def test_progress_is_shown_in_bytes(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with loaded(checkpoints["llama"], progress=True):
        pass
    shown = capsys.readouterr().err
    assert "loading weights" in shown
    assert "kB/s" in shown or "MB/s" in shown or "100%" in shown


def test_no_second_copy_of_the_model_in_host_memory(tmp_path: Path) -> None:
    """Peak memory may grow by the weights once, and by the largest tensor where the file is mapped."""
    config = make_config("llama", layers=8)
    config.hidden_size, config.intermediate_size, config.vocab_size = 512, 2048, 64
    config.head_dim = 128
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = sum(p.numel() * 4 for p in model.parameters())
    save(model, tmp_path, shard="20MB")
    del model
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    filler = torch.ones(max(0, 1024 * (before - _resident_kib())) // 4 + 1)  # raise current use to the peak
    with loaded(tmp_path) as weights:
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert weights.store.nbytes > 0.9 * size
        assert grown < 1.5 * size
    assert filler.sum() > 0


def _resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS in /proc/self/status")


# --- dummy weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_of_a_config_alone(tmp_path: Path, family: str) -> None:
    make_config(family).save_pretrained(tmp_path)
    with loaded(tmp_path, load_format="dummy", seed=3) as first, loaded(tmp_path, load_format="dummy", seed=3) as again:
        matrix, other = (first.store.views(i)["mlp.up_proj.weight"] for i in (0, 1))
        assert 0.015 < matrix.std() < 0.025
        assert not torch.equal(matrix, other)
        norm = first.store.views(2)["input_layernorm.weight"]
        assert torch.all(norm == (0 if family == "gemma2" else 1))  # Gemma's norm multiplies by 1 + weight
        result = run(first)
        assert torch.isfinite(result).all()
        assert torch.equal(result, run(again))
    with loaded(tmp_path / "config.json", load_format="dummy", seed=4) as different:
        assert not torch.equal(result, run(different))


def test_dummy_weights_leave_the_callers_random_state_alone(tmp_path: Path) -> None:
    make_config("llama").save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    with loaded(tmp_path, load_format="dummy"):
        assert torch.equal(torch.random.get_rng_state(), state)


# --- broken checkpoints -------------------------------------------------------------------------------------------


def refused(directory: Path, *words: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught, loaded(directory, **options):
        pass
    for word in words:
        assert word in str(caught.value)


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "hf download")


def test_missing_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    refused(copy, "config.json", str(copy))


def test_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    refused(copy, "not valid JSON", "download it again")


def test_unknown_model_type(copy: Path) -> None:
    edit_config(copy, model_type="nonsense", architectures=["NonsenseForCausalLM"])
    refused(copy, "nonsense")


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    refused(sharded, gone.name, "download the missing files")


def test_missing_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "shards but no model.safetensors.index.json")


def test_damaged_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(sharded, "not a valid safetensors index")


def test_truncated_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(copy, "model.safetensors", "truncated or damaged")


def test_git_lfs_pointer(copy: Path) -> None:
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(copy, "Git LFS pointer", "git lfs pull")


def test_missing_tensor(copy: Path) -> None:
    edit_tensors(copy, model__layers__2__mlp__up_proj__weight=None)
    refused(copy, "lacks 1 of", "model.layers.2.mlp.up_proj.weight")


def test_fewer_layers_than_the_config_says(copy: Path) -> None:
    edit_config(copy, num_hidden_layers=6)
    refused(copy, "lacks 9 of", "model.layers.5.")


def test_unexpected_shape(copy: Path) -> None:
    edit_tensors(copy, model__norm__weight=torch.ones(63))
    refused(copy, "model.norm.weight has shape [63]", "[64]")


def test_unused_tensors_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tensors(copy, vision__tower__weight=torch.ones(3))
    with caplog.at_level(logging.WARNING), loaded(copy):
        pass
    assert "vision.tower.weight" in caplog.text


def test_float8_weights(copy: Path) -> None:
    edit_tensors(copy, model__layers__0__mlp__up_proj__weight=torch.zeros(96, 64).to(torch.float8_e4m3fn))
    refused(copy, "float8_e4m3fn", "model.layers.0.mlp.up_proj.weight", "bfloat16")


def test_quantised_config(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "awq", "bits": 4})
    refused(copy, "quantised", "awq")


def test_values_beyond_float16(copy: Path) -> None:
    weight = load_file(copy / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    edit_tensors(copy, model__layers__0__mlp__up_proj__weight=weight * 1e6)
    refused(copy, "beyond float16", "bfloat16", dtype=torch.float16)


def test_pickles_only(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin", "save_pretrained")


def test_config_only_without_dummy(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(copy, "no safetensors weights", "--load-format dummy")


def test_dtype_that_cannot_run(copy: Path) -> None:
    refused(copy, "torch.int8", "bfloat16", dtype=torch.int8)


def test_an_encoder_has_no_decoder_layers(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32, vocab_size=32).save_pretrained(tmp_path)
    refused(tmp_path, "t5", load_format="dummy")


def test_a_failed_load_frees_its_buffers(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elsa_serve.offload import weights as module

    closed: list[int] = []
    original = module.LayerStore.close
    monkeypatch.setattr(module.LayerStore, "close", lambda self: (closed.append(1), original(self))[1])
    edit_tensors(copy, model__norm__weight=torch.ones(63))
    refused(copy, "[63]")
    assert closed


def test_closing_frees_the_memory_at_once(tmp_path: Path) -> None:
    """Not when the collector comes: the next model in the process needs what this one had on the device."""
    weights = load_model(save(make_model("llama"), tmp_path), dtype="auto", device="cpu", progress=False, resident=(1,))
    model = weights.model  # held on to, as a cycle would
    tensors = [*(p for p in model.parameters() if not p.is_meta), *model.buffers(), weights.store.layers[1]]
    held = [weakref.ref(tensor) for tensor in tensors]
    assert len(held) >= 4
    del tensors
    gc.disable()
    try:
        weights.close()
        assert [ref() for ref in held] == [None] * len(held)
        weights.close()
    finally:
        gc.enable()
