"""A checkpoint as transformers' own model on the meta device, each decoder layer's weights in one flat host buffer.

One buffer a layer means one copy a layer. The model keeps transformers' modules and code; only where a parameter's
bytes lie is ours: embeddings, final norm and head stay on the device, a decoder layer's parameters are bound to device
memory while the layer runs (`LayerBinding`) and are meta tensors otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from elsa_serve.errors import CheckpointError
from elsa_serve.offload.checkpoint import Checkpoint, load_config
from elsa_serve.offload.disk_layers import DiskLayers, Extent
from elsa_serve.offload.host import HostBuffer
from elsa_serve.offload.units import aligned, format_size
from elsa_serve.stats import DiskReads

LoadFormat = Literal["auto", "safetensors", "dummy"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a parameter lies in its layer's flat buffer. `offset` in bytes, a multiple of `units.ALIGNMENT`."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


Layout = Mapping[str, TensorSpec]  # by the parameter's name inside its layer, such as "self_attn.q_proj.weight"


def make_layout(layer: nn.Module) -> tuple[dict[str, TensorSpec], int]:
    """The layout of a layer's parameters in order of definition, and the bytes it takes."""
    layout: dict[str, TensorSpec] = {}
    end = 0
    for name, parameter in layer.named_parameters():
        spec = TensorSpec(end, parameter.shape, parameter.dtype)
        layout[name] = spec
        end = spec.offset + aligned(spec.nbytes)
    return layout, end


def flat_views(flat: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """The parameters inside a flat uint8 buffer, without copying."""
    return {
        name: flat[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).view(spec.shape)
        for name, spec in layout.items()
    }


class LayerBinding:
    """Puts parameters into a decoder layer's modules and takes them out again."""

    def __init__(self, layer: nn.Module) -> None:
        meta = dict(layer.named_parameters())
        names = {id(parameter): name for name, parameter in meta.items()}  # one name for a shared parameter
        self._places = [
            (module._parameters, leaf, names[id(parameter)])
            for module in layer.modules()
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._meta = meta

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for slots, leaf, name in self._places:
            slots[leaf] = parameters[name]

    def unbind(self) -> None:
        self.bind(self._meta)


class LayerStore:
    """The decoder layers' weights: one flat uint8 tensor a layer, in host memory, page-locked where there is a GPU.

    The `resident` layers lie on the device instead, those `on_disk` in the checkpoint's files: neither takes host
    memory, and the latter's tensors here are meta. `nbytes` counts all, `host_nbytes` what lies in host memory.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        sizes: Sequence[int],
        device: torch.device,
        resident: Collection[int] = (),
        on_disk: Collection[int] = (),
    ) -> None:
        self.layouts = tuple(layouts)
        self.pinned = device.type == "cuda"
        self.resident, self.on_disk = frozenset(resident), frozenset(on_disk)
        self.nbytes = sum(sizes)
        self._buffers: list[HostBuffer] = []
        layers = []
        try:
            for index, size in enumerate(sizes):
                if index in self.resident:
                    layers.append(torch.zeros(size, dtype=torch.uint8, device=device))
                elif index in self.on_disk:
                    layers.append(torch.empty(size, dtype=torch.uint8, device="meta"))
                else:
                    self._buffers.append(HostBuffer(size, pin=self.pinned))
                    layers.append(self._buffers[-1].tensor)
        except BaseException:
            self.close()
            raise
        self.layers: tuple[torch.Tensor, ...] = tuple(layers)

    @property
    def host_nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def views(self, index: int) -> dict[str, torch.Tensor]:
        return flat_views(self.layers[index], self.layouts[index])

    def close(self) -> None:
        """Unlock and free the buffers. Idempotent."""
        self.layers = ()
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []


@dataclass(slots=True)
class ModelWeights:
    """A model whose decoder layers' weights lie in a store (parameters on meta), and whose rest lies on `device`."""

    model: nn.Module  # transformers' CausalLM, in eval mode
    config: Any
    decoder_layers: Sequence[nn.Module]
    store: LayerStore
    device: torch.device
    dtype: torch.dtype
    device_nbytes: int  # embeddings, final norm, head, buffers
    disk: DiskLayers | None = None  # the layers that are read from files

    def drain_disk(self) -> DiskReads | None:
        """What was read from disk since the last call; None without layers on disk."""
        return self.disk.drain() if self.disk is not None else None

    def close(self) -> None:
        """Free host buffers and device memory; the model can no longer run. Idempotent."""
        if self.disk is not None:
            self.disk.close()
        self.store.close()
        self.decoder_layers = ()
        # Modules hold each other in cycles, which live until the collector comes: they must not hold memory.
        self.model.to("meta")


def load_model(
    source: Path | str,
    *,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device | str,
    load_format: LoadFormat = "auto",
    attn_implementation: str | None = None,
    resident: Collection[int] = (),
    on_disk: Collection[int] = (),
    seed: int = 0,
    progress: bool = True,
) -> ModelWeights:
    """Load a Hugging Face checkpoint directory, tensor by tensor, straight into its place.

    The decoder layers in `resident` go to the device and take no host memory; those `on_disk` stay in their files.

    dtype "auto" keeps the checkpoint's own. load_format "dummy" draws random weights of any config.json, as
    transformers would initialise them. Raises CheckpointError naming the value and the remedy.
    """
    device = torch.device(device)
    config = load_config(source)
    checkpoint = None if load_format == "dummy" else Checkpoint(Path(source))
    chosen = choose_dtype(dtype, config, checkpoint)
    model = build_meta_model(config, chosen, attn_implementation)
    layers = find_decoder_layers(model)
    layouts, sizes = zip(*(make_layout(layer) for layer in layers))
    # transformers' rule for buffers writes a module's weights too, so it runs while those are still meta tensors
    materialise_buffers(model, device)
    device_nbytes = _materialise_outside(model, layers, device)
    if on_disk and checkpoint is None:
        raise CheckpointError("random weights (--load-format dummy) lie in no file, so no layer can stay on disk")
    store = LayerStore(layouts, sizes, device, resident, on_disk)
    weights = ModelWeights(model, config, layers, store, device, chosen, device_nbytes)
    try:
        if checkpoint is None:
            _fill_random(weights, seed, progress)
        else:
            _fill_from(checkpoint, weights, progress)
    except BaseException:
        weights.close()
        raise
    return weights


def choose_dtype(wanted: torch.dtype | Literal["auto"], config: Any, checkpoint: Checkpoint | None) -> torch.dtype:
    """The dtype asked for, else the config's, else the stored one, else float32."""
    if isinstance(wanted, torch.dtype):
        chosen = wanted
    elif isinstance(config.dtype, torch.dtype):
        chosen = config.dtype
    else:
        chosen = checkpoint.stored_dtype() if checkpoint is not None else torch.float32
    if chosen not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(f"cannot run in {chosen}; choose --dtype float32, bfloat16 or float16")
    return chosen


def build_meta_model(config: Any, dtype: torch.dtype, attn_implementation: str | None = None) -> nn.Module:
    """transformers' causal language model of this config, without a byte of weights."""
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (ValueError, KeyError, ImportError) as error:
        reason = str(error).partition("\n")[0]  # the lines after it list all models there are
        raise CheckpointError(
            f"transformers cannot build a causal model of type {config.model_type!r}: {reason}"
        ) from error
    return model.eval().requires_grad_(False)


def find_decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers in order: the longest list of modules that transformers says must not be split."""
    unsplit = set(model._no_split_modules or ())
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(m).__name__ in unsplit for m in module)
    ]
    if not lists:
        raise CheckpointError(
            f"found no decoder layers in {type(model).__name__}; the offload engine runs decoder-only models "
            "whose layers are a ModuleList"
        )
    return max(lists, key=len)


def materialise_buffers(model: Any, device: torch.device) -> None:
    """Give every buffer (rotary frequencies, embedding scales) memory on `device` and transformers' value for it."""
    for module in model.modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in names:
            buffer = torch.zeros_like(module._buffers[name], device=device)
            module._buffers[name] = buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer
        if names:
            with torch.no_grad():
                model._init_weights(module)
        for name in names:
            if name in module._non_persistent_buffers_set and bool(module._buffers[name].isnan().any()):
                raise CheckpointError(
                    f"transformers does not say how to make buffer {name!r} of {type(module).__name__}; "
                    "this architecture cannot be offloaded yet"
                )


def _materialise_outside(model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> int:
    """Zeroed device memory for every parameter outside the decoder layers, tied ones once. Bytes, with buffers."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    made: dict[int, nn.Parameter] = {}
    meta: list[nn.Parameter] = []  # keeps the old parameters alive, so that no id is used twice
    for module in model.modules():
        if id(module) in inside:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                meta.append(parameter)
                made[id(parameter)] = nn.Parameter(torch.zeros_like(parameter, device=device), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
    tensors = [*made.values(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- filling ------------------------------------------------------------------------------------------------------


def _destinations(weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Where every tensor of the state dict goes, by its name in the model. Tied names share a tensor."""
    prefixes = {id(module): name for name, module in weights.model.named_modules()}
    places: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(weights.decoder_layers):
        prefix = prefixes[id(layer)]
        places |= {f"{prefix}.{name}": view for name, view in weights.store.views(index).items()}
    for name, tensor in weights.model.state_dict(keep_vars=True).items():
        if not tensor.is_meta:
            places[name] = tensor.data
    return places


def _fill_from(checkpoint: Checkpoint, weights: ModelWeights, progress: bool) -> None:
    places = _destinations(weights)
    sources = _match_names(checkpoint, places, weights)
    if weights.store.on_disk:
        weights.disk = _disk_layers(checkpoint, weights, {name: source for source, name in sources.items()})
        sources = {source: name for source, name in sources.items() if not places[name].is_meta}
    total = sum(places[name].numel() * places[name].element_size() for name in sources.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=not progress) as bar:
        announced = False
        for source, tensor in checkpoint.tensors(set(sources)):
            name = sources[source]
            place = places[name]
            if tensor.dtype != place.dtype and not announced:
                announced = True
                logger.warning("converting weights from %s to %s", _name(tensor.dtype), _name(place.dtype))
            _copy_checked(place, tensor, source)
            bar.update(place.numel() * place.element_size())


def _disk_layers(checkpoint: Checkpoint, weights: ModelWeights, sources: Mapping[str, str]) -> DiskLayers:
    """Where the tensors of the layers on disk lie in the checkpoint's files. `sources`: model name -> stored name."""
    prefixes = {id(module): name for name, module in weights.model.named_modules()}
    extents: dict[int, list[Extent]] = {}
    for index in sorted(weights.store.on_disk):
        prefix = prefixes[id(weights.decoder_layers[index])]
        for name, spec in weights.store.layouts[index].items():
            source = sources[f"{prefix}.{name}"]
            file, start, nbytes, stored, shape = checkpoint.place_of(source)
            _check_shape(source, shape, spec.shape)
            extent = Extent(source, file, start, nbytes, stored, spec.offset, spec.dtype)
            extents.setdefault(index, []).append(extent)
    sizes = {index: weights.store.layers[index].numel() for index in extents}
    logger.warning(
        "%d of %d layers stay on disk and are read again every pass (%s)",
        len(extents),
        len(weights.decoder_layers),
        format_size(sum(extent.nbytes for parts in extents.values() for extent in parts)),
    )
    return DiskLayers(extents, sizes, pinned=weights.store.pinned)


def _check_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if list(shape) != list(expected):
        raise CheckpointError(
            f"{name} has shape {list(shape)}, but config.json makes it {list(expected)}; "
            "the weights belong to another model or revision: download both again"
        )


def _copy_checked(place: torch.Tensor, tensor: torch.Tensor, name: str) -> None:
    _check_shape(name, tensor.shape, place.shape)
    place.copy_(tensor)
    narrower = place.dtype == torch.float16 and tensor.dtype != torch.float16
    if narrower and not bool(place.isfinite().all()) and bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"{name} has values beyond float16's 65504 (it is stored as {_name(tensor.dtype)}); "
            "use --dtype bfloat16 or float32"
        )


def _match_names(checkpoint: Checkpoint, places: Mapping[str, torch.Tensor], weights: ModelWeights) -> dict[str, str]:
    """Checkpoint name -> model name. A base model's checkpoint lacks its prefix; tied weights may be stored once."""
    stored = _StoredNames(checkpoint, places, weights.model)
    sources: dict[str, str] = {}
    filled: set[int] = set()
    for name, place in places.items():
        if stored(name) in checkpoint and _identity(place) not in filled:
            sources[stored(name)] = name
            filled.add(_identity(place))
    persistent = {name for name, _ in weights.model.named_buffers()}
    missing = [n for n, p in places.items() if _identity(p) not in filled and p.numel() and n not in persistent]
    if missing:
        raise CheckpointError(
            f"the checkpoint in {checkpoint.directory} lacks {len(missing)} of {len(places)} tensors of "
            f"{type(weights.model).__name__}, such as {missing[0]} (stored as {stored(missing[0])}); it is incomplete, "
            "or of an architecture (such as a mixture of experts) whose tensors transformers renames or merges while "
            "loading, which the offload engine does not do yet"
        )
    known = {stored(name) for name in places}
    extra = [name for name in checkpoint.files if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        logger.warning("%d tensors of the checkpoint are not used by this model, such as %s", len(extra), extra[0])
    return sources


def _identity(place: torch.Tensor) -> int:
    """Equal for tied tensors. A layer on disk has no memory, and shares none."""
    return id(place) if place.is_meta else place.data_ptr()


class _StoredNames:
    """Maps a model's tensor name to the checkpoint's, after looking which prefix the checkpoint uses."""

    def __init__(self, checkpoint: Checkpoint, places: Mapping[str, torch.Tensor], model: Any) -> None:
        base = f"{model.base_model_prefix}."
        schemes = (("", ""), (base, ""), ("", base), ("", "language_model."))
        self._old, self._new = max(schemes, key=lambda s: sum(_renamed(n, *s) in checkpoint for n in places))

    def __call__(self, name: str) -> str:
        return _renamed(name, self._old, self._new)


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old)


def _fill_random(weights: ModelWeights, seed: int, progress: bool) -> None:
    """transformers' own initialisation. On a GPU drawn there and copied down, a layer at a time."""
    model: Any = weights.model
    on_gpu = weights.device.type == "cuda"
    layers = [*weights.decoder_layers]
    inside = {id(module) for layer in layers for module in layer.modules()}
    with (
        torch.random.fork_rng(devices=[weights.device] if on_gpu else []),
        torch.no_grad(),
        tqdm(total=weights.store.nbytes, unit="B", unit_scale=True, desc="random weights", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for module in _with_parameters(model):
            if id(module) not in inside:
                model._init_weights(module)
        for index, layer in enumerate(layers):
            home = weights.store.layers[index]
            flat = torch.zeros_like(home, device=weights.device) if on_gpu and not home.is_cuda else home
            _init_layer(model, layer, flat, weights.store.layouts[index])
            if flat is not home:
                home.copy_(flat)
            bar.update(home.numel())


def _init_layer(model: Any, layer: nn.Module, flat: torch.Tensor, layout: Layout) -> None:
    binding = LayerBinding(layer)
    binding.bind({name: nn.Parameter(view, requires_grad=False) for name, view in flat_views(flat, layout).items()})
    try:
        for module in _with_parameters(layer):
            model._init_weights(module)
    finally:
        binding.unbind()


def _with_parameters(root: nn.Module) -> Iterator[nn.Module]:
    return (module for module in root.modules() if any(p is not None for p in module._parameters.values()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
