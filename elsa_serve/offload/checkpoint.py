"""Reading a Hugging Face checkpoint directory: its config, its files, its tensors, and what is wrong with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from elsa_serve.errors import CheckpointError, NoSuchModel
from elsa_serve.offload.units import format_size

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READABLE = tuple(STORED.values())

logger = logging.getLogger(__name__)
_GIT_LFS = b"version https://git-lfs"


def load_config(source: Path | str) -> Any:
    """transformers' config of a checkpoint directory, or of a config.json. Raises CheckpointError."""
    from transformers import AutoConfig

    path = Path(source)
    if not path.exists():
        raise NoSuchModel(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json; pass the directory of a Hugging Face checkpoint")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); download it again") from error
    try:
        config = AutoConfig.from_pretrained(file, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"transformers cannot read {file}: {error}") from error
    check_not_quantised(config, file)
    config = _text_part(config)
    config.name_or_path = file.resolve().parent.name
    return config


def _text_part(config: Any) -> Any:
    """The language model's config of a multimodal model (Gemma 3 with vision, LLaVA), whose text is all that is served;
    other configs as they are."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config()
    if text is config or text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return config
    logger.warning("a %s model is served by its language model alone (%s)", config.model_type, text.model_type)
    for name in ("dtype", "eos_token_id"):
        if getattr(text, name, None) is None:
            setattr(text, name, getattr(config, name, None))
    return text


def check_not_quantised(config: Any, file: Path) -> None:
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise CheckpointError(
            f"{file} describes a quantised model (quant_method {method}), which the offload engine does not read; "
            "use the original checkpoint in float32, bfloat16 or float16"
        )


class Checkpoint:
    """The safetensors files of a directory and the tensors in each. Opening checks that every file is whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, Path] = {}  # tensor name -> file
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        for file in _weight_files(directory):
            with _open(file) as handle:
                self.files.update(dict.fromkeys(handle.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def tensors(self, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors, file by file: views of the mapped file, to be copied out before the next is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in sorted(names):
            by_file.setdefault(self.files[name], []).append(name)
        for file, wanted in by_file.items():
            with _open(file) as handle:
                for name in wanted:
                    tensor = handle.get_tensor(name)
                    _check_readable(tensor, name, file)
                    yield name, tensor

    def place_of(self, name: str) -> tuple[Path, int, int, torch.dtype, tuple[int, ...]]:
        """(file, first byte, bytes, dtype, shape) of a tensor, so that it can be read past safetensors."""
        file = self.files[name]
        if file not in self._headers:
            self._headers[file] = _header(file)
        base, entries = self._headers[file]
        entry = entries[name]
        if entry["dtype"] not in STORED:
            _refuse_dtype(entry["dtype"], name, file)
        first, last = entry["data_offsets"]
        return file, base + first, last - first, STORED[entry["dtype"]], tuple(entry["shape"])

    def stored_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint's first weight matrix."""
        for name, file in self.files.items():
            if name.endswith("weight"):
                with _open(file) as handle:
                    tensor = handle.get_tensor(name)
                _check_readable(tensor, name, file)
                return tensor.dtype
        raise CheckpointError(f"{self.directory} holds no weights; download the checkpoint again")


def _weight_files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a checkpoint directory, so it has no weights; "
            "pass the directory, or --load-format dummy for random weights"
        )
    index = directory / INDEX
    if index.is_file():
        return _indexed_files(index)
    files = sorted(directory.glob("*.safetensors"))
    if (directory / SINGLE) in files:
        return [directory / SINGLE]
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(
            f"{directory} has {len(files)} safetensors shards but no {INDEX}; download the checkpoint again"
        )
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({pickled[0]}), which can run code when opened; convert them: "
            'AutoModelForCausalLM.from_pretrained("…").save_pretrained("…") writes safetensors'
        )
    raise CheckpointError(
        f"{directory} holds no safetensors weights; download them, or pass --load-format dummy for random weights"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not a valid safetensors index ({error!r}); download it again") from error
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards named by {INDEX}, such as {missing[0]}; "
            "download the missing files"
        )
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as stream:
            head = stream.read(len(_GIT_LFS))
        if head == _GIT_LFS:
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull") from error
        size = format_size(file.stat().st_size)
        raise CheckpointError(f"{file} ({size}) is truncated or damaged: {error}; download it again") from error


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's data begin, and its table of tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


def _check_readable(tensor: torch.Tensor, name: str, file: Path) -> None:
    if tensor.dtype not in READABLE:
        _refuse_dtype(str(tensor.dtype).removeprefix("torch."), name, file)


def _refuse_dtype(dtype: str, name: str, file: Path) -> NoReturn:
    raise CheckpointError(
        f"{name} in {file.name} is stored as {dtype}, which the offload engine does not read (quantised?); "
        "use a checkpoint in float32, bfloat16 or float16"
    )
