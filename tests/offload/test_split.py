"""FP32-accurate linear layers in the engine: the same tokens, streamed and resident, in the same bytes."""

import pytest
import torch
from engine_models import generate, make_engine, prompt_of, save_checkpoint, tokens_of

from elsa_serve.errors import CheckpointError, UsageError
from elsa_serve.fp32_linear import SplitLinear


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint("llama", tmp_path_factory.mktemp("models") / "llama")


def tokens(directory, **options):
    engine = make_engine(directory, **options)
    try:
        weights = engine._loaded.weights
        split = [m for layer in weights.decoder_layers for m in layer.modules() if isinstance(m, SplitLinear)]
        return tokens_of(generate(engine, prompt_of(40), max_tokens=12)), len(split), weights.store.nbytes
    finally:
        engine.shutdown()


@pytest.mark.parametrize("resident", [0, 2, 5])
def test_tokens_are_those_of_torchs_layers(checkpoint, resident):
    expected, none, nbytes = tokens(checkpoint, resident_layers=resident)
    assert none == 0
    ours, split, split_nbytes = tokens(checkpoint, resident_layers=resident, linear="elsa")
    assert ours == expected
    assert split == 5 * 7  # q, k, v, o, gate, up and down of every layer
    assert split_nbytes == nbytes


def test_other_dtypes_are_refused_with_the_remedy(checkpoint):
    with pytest.raises(UsageError, match="--dtype float32"):
        make_engine(checkpoint, dtype="bfloat16", linear="elsa")


def test_unknown_choice_is_named(checkpoint):
    with pytest.raises(UsageError, match="'tf32'"):
        make_engine(checkpoint, linear="tf32")


def test_weight_with_nan_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = save_checkpoint("llama", tmp_path / "broken")
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.3.mlp.up_proj.weight"][7, 7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 3, mlp\.up_proj: .*row 7"):
        make_engine(directory, linear="elsa")
