"""Everything an engine needs, built in order of cost: refusals first, then the plan, then weights and pools."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elsa_serve.errors import BudgetError, CheckpointError, UsageError
from elsa_serve.offload import attention as attentions
from elsa_serve.offload import device as devices
from elsa_serve.offload import disk_rates, host_rates, machine, measure
from elsa_serve.offload.checkpoint import Checkpoint, load_config
from elsa_serve.offload.file_lane import FileLane
from elsa_serve.offload.fused import Fused, fuse
from elsa_serve.offload.geometry import Geometry, check_rope
from elsa_serve.offload.graphs import slack_bytes
from elsa_serve.offload.host import FileBuffer, HostBuffer
from elsa_serve.offload.in_place import InPlace
from elsa_serve.offload.kv import KVPool, KVShape, RequestKV
from elsa_serve.offload.machine import Rates
from elsa_serve.offload.output import eos_token_ids
from elsa_serve.offload.plan import Plan, make_plan, row_multiple, with_rates
from elsa_serve.offload.predict import in_place_limit
from elsa_serve.offload.ring import WeightStream
from elsa_serve.offload.split import check_linear, split_linears
from elsa_serve.offload.step import Part, PassRunner
from elsa_serve.offload.streams import Streams, make_streams
from elsa_serve.offload.tiers import Tiers
from elsa_serve.offload.tokenizer import load_tokenizer
from elsa_serve.offload.units import aligned, parse_size
from elsa_serve.offload.weights import LoadFormat, ModelWeights, choose_dtype, load_model
from elsa_serve.offload.working import WorkingKV
from elsa_serve.protocol import Tokenizer
from elsa_serve.stats import DiskReads

logger = logging.getLogger(__name__)

TRY_OUT_TOKENS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is set up; None leaves the choice to the planner or the machine.

    Memory sizes are bytes or text such as "24GiB". `weights` are already loaded ones of this very model, dtype and
    `linear` (with `attn_implementation=attention.NAME`), which the engine then uses and leaves alone at its end.
    """

    model_dir: Path
    device: str | torch.device | None = None
    dtype: str | torch.dtype = "auto"
    gpu_memory: str | int | None = None
    host_memory: str | int | None = None
    kv_disk: str | int | None = None  # KV that may lie on disk; None: none
    kv_disk_dir: Path | None = None  # None: the folder for temporary files
    context: int | None = None
    max_batch: int = 8
    resident_layers: int | None = None
    slots: int | None = None
    chunk_tokens: int | None = None
    attention: str = "elsa"
    linear: str = "torch"
    fused: bool | None = None  # layers' elementwise work in fewer kernels; None: on a GPU
    graphs: bool | None = None  # may hold decode passes on a GPU (None: they may)
    prefill_round_tokens: int | None = None
    max_num_batched_tokens: int | None = None
    num_speculative_tokens: int | None = None
    prefix_caching: bool = True
    serial: bool = False
    host_threads: int | None = None  # for attention over KV in host memory; None: all cores but one
    load_format: LoadFormat = "auto"
    seed: int = 0
    progress: bool = True
    weights: ModelWeights | None = None
    rates: Rates | None = None  # to plan with; None: this machine's, measured once


@dataclass(slots=True)
class LoadedModel:
    plan: Plan
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    weights: ModelWeights
    owns_weights: bool
    streams: Streams
    stream: WeightStream
    pool: KVPool
    tiers: Tiers
    host_buffer: HostBuffer
    runner: PassRunner
    fused: Fused | None
    allocator_bytes: int  # what torch's allocator may reserve on the device

    @property
    def layers(self) -> int:
        return len(self.weights.decoder_layers)

    @property
    def vocab_size(self) -> int:
        return int(self.plan.geometry.vocab)

    def close(self) -> None:
        """Free everything, the device's budget included."""
        device = self.weights.device
        self.runner.close()
        if self.fused is not None:
            self.fused.restore()
        self.stream.close()
        self.streams.close()
        self.pool.close()
        self.tiers.close()
        self.host_buffer.close()
        if self.owns_weights:
            self.weights.close()
        devices.unlimit_memory(device)


def load(options: EngineOptions) -> LoadedModel:
    """Raises CheckpointError, BudgetError or UsageError before anything large is read, where it can."""
    _check_threads(options)
    device = devices.indexed(machine.choose_device(options.device))
    config = options.weights.config if options.weights else load_config(options.model_dir)
    attentions.check_model(config, options.attention)
    dtype = options.weights.dtype if options.weights else _dtype(options, config, _checkpoint(options))
    check_linear(options.linear, dtype)
    plan = _plan(options, device, config, dtype)
    tokenizer = load_tokenizer(options.model_dir, plan.geometry.vocab, dummy=options.load_format == "dummy")
    eos_ids = eos_token_ids(_generation_config(options.model_dir), config, tokenizer)
    allocator_bytes = plan.gpu_budget - plan.gpu_bytes.get("CUDA context", 0)
    devices.limit_memory(device, allocator_bytes)
    weights = options.weights or _weights(options, device, dtype, plan)
    try:
        loaded = _assemble(options, plan, tokenizer, eos_ids, weights, allocator_bytes)
        _try_out(loaded)
        read = weights.drain_disk()
        if options.rates is None:
            loaded.plan = _with_disk_tried(loaded.plan, read)
        return loaded
    except BaseException:
        if options.weights is None:
            weights.close()
        devices.unlimit_memory(device)
        raise


def plan_only(options: EngineOptions) -> Plan:
    """The plan that an engine of these options would have, from config.json alone: the device need not be here.

    Times are predicted from this machine's measured rates where the device is here, else from assumed ones.
    """
    _check_threads(options)
    device = machine.choose_device(options.device, present=False)
    here = device.type != "cuda" or torch.cuda.is_available()
    if not here and options.gpu_memory is None:
        raise UsageError("this machine has no GPU to take the budget from: pass --gpu-memory, such as 24GiB")
    config = load_config(options.model_dir)
    dtype = _dtype(options, config, None)
    check_linear(options.linear, dtype)
    return _plan(options, device, config, dtype, here)


def _check_threads(options: EngineOptions) -> None:
    if options.host_threads is not None and options.host_threads < 1:
        raise UsageError(f"--host-threads {options.host_threads} is too few: at least 1 attends KV in host memory")


def _checkpoint(options: EngineOptions) -> Checkpoint | None:
    return None if options.load_format == "dummy" else Checkpoint(options.model_dir)


def _dtype(options: EngineOptions, config: Any, checkpoint: Checkpoint | None) -> torch.dtype:
    wanted = options.dtype
    if isinstance(wanted, str):
        if wanted != "auto" and wanted not in DTYPES:
            raise UsageError(f"unknown dtype {wanted!r}; choose auto, {', '.join(DTYPES)}")
        wanted = DTYPES.get(wanted, wanted)
    return choose_dtype(wanted, config, checkpoint)  # type: ignore[arg-type]


def _plan(options: EngineOptions, device: torch.device, config: Any, dtype: torch.dtype, here: bool = True) -> Plan:
    """`here`: the device is this machine's, so that rates can be measured."""
    gpu, host = _size(options.gpu_memory), _size(options.host_memory)
    gpu = machine.default_gpu_budget(device) if gpu is None else gpu
    host = machine.default_host_budget(device, gpu) if host is None else host
    geometry = Geometry.from_config(config, dtype)
    rates = options.rates
    if rates is None and here:
        rates = measure.rates(
            device, dtype, attention=options.attention, linear=options.linear, heads=geometry.attention_heads
        )
    disk = options.load_format != "dummy" and options.linear == "torch" and options.weights is None

    def plan(rates: Rates | None) -> Plan:
        return make_plan(
            geometry,
            gpu_budget=gpu,
            host_budget=host,
            context=options.context,
            batch=options.max_batch,
            resident_layers=options.resident_layers,
            slots=options.slots,
            chunk_tokens=options.chunk_tokens,
            device_type=device.type,
            rates=rates,
            disk=disk,
            kv_disk=_size(options.kv_disk) or 0,
            free_host=machine.host_memory().available if here else 0,
            graphs=_may_be_graphs(options),
            linear=options.linear,
            in_place=options.attention in attentions.ATTEND_STATE,
        )

    chosen = plan(rates)
    check_rope(config.get_text_config(), chosen.context)
    if rates is None or not here or options.rates is not None:
        return chosen
    # The rates kept for this machine are those of another folder's disk.
    if chosen.disk_layers:
        rates = replace(rates, disk=disk_rates.checkpoint_rate(options.model_dir) or rates.disk)
    if chosen.kv_disk_bytes:
        run = chosen.chunk_tokens * geometry.head_dim * dtype.itemsize
        written = disk_rates.write_rate(_kv_folder(options), device, chosen.kv_disk_bytes, run)
        rates = replace(rates, disk_write=written)
    return plan(rates) if rates is not chosen.rates else chosen


def _kv_folder(options: EngineOptions) -> Path:
    return options.kv_disk_dir or Path(tempfile.gettempdir())


def _size(size: str | int | None) -> int | None:
    return None if size is None else parse_size(size)


def _weights(options: EngineOptions, device: torch.device, dtype: torch.dtype, plan: Plan) -> ModelWeights:
    attentions.register()
    weights = load_model(
        options.model_dir,
        dtype=dtype,
        device=device,
        load_format=options.load_format,
        attn_implementation=attentions.NAME,
        resident=plan.resident_layers,
        on_disk=plan.disk_layers,
        seed=options.seed,
        progress=options.progress,
    )
    if options.linear == "elsa":
        try:
            split_linears(weights, options.progress)
        except BaseException:
            weights.close()
            raise
    return weights


def _assemble(
    options: EngineOptions,
    plan: Plan,
    tokenizer: Tokenizer,
    eos_ids: frozenset[int],
    weights: ModelWeights,
    allocator_bytes: int,
) -> LoadedModel:
    device, geometry = weights.device, plan.geometry
    _check_interface(weights)
    host_buffer = HostBuffer(aligned(plan.kv_host_bytes), pin=device.type == "cuda")
    # Without a GPU nothing runs beside the host's attention; the twin of one stream is not predicted.
    if device.type == "cuda" and options.rates is None and not options.serial:
        plan = with_rates_now(plan, weights, host_buffer.tensor, options.host_threads)
    streams = make_streams(device, serial=options.serial)
    stream = WeightStream(weights, plan.resident_layers, plan.slots, streams)
    shape = KVShape(geometry.layers, geometry.kv_heads, geometry.head_dim, weights.dtype)
    slack = slack_bytes(geometry.head_dim, weights.dtype)
    gpu_pool = torch.empty(plan.kv_gpu_bytes + slack, dtype=torch.uint8, device=device)[: plan.kv_gpu_bytes]
    disk = FileBuffer(plan.kv_disk_bytes, _kv_folder(options)) if plan.kv_disk_bytes else None
    pool = KVPool(shape, gpu_pool, host_buffer.tensor, host_buffer.mapped(), disk.tensor if disk else None)
    tiers = _tiers(options, plan, shape, streams, FileLane(disk, streams) if disk else None)
    fused = _fuse(options, weights)
    runner = PassRunner(
        weights.model,
        weights.decoder_layers,
        stream,
        tiers,
        streams,
        chunk_tokens=plan.chunk_tokens,
        graphs=plan.graphs,
        multiple=row_multiple(device.type, weights.dtype),
    )
    return LoadedModel(
        plan=plan,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        weights=weights,
        owns_weights=options.weights is None,
        streams=streams,
        stream=stream,
        pool=pool,
        tiers=tiers,
        host_buffer=host_buffer,
        runner=runner,
        fused=fused,
        allocator_bytes=allocator_bytes,
    )


def with_rates_now(plan: Plan, weights: ModelWeights, kv: torch.Tensor, threads: int | None) -> Plan:
    """The plan with times predicted from what the host memory that holds these weights and this KV gives now, where
    the device has room for a slot. Nothing else may use that memory meanwhile."""
    geometry, store = plan.geometry, weights.store
    layer = geometry.kv_layer_bytes(plan.kv_host_tokens)
    if not plan.in_place or not layer or layer > kv.numel():
        return plan
    elsewhere = {*plan.resident_layers, *plan.disk_layers}
    streamed = [store.layers[index] for index in range(geometry.layers) if index not in elsewhere]
    heads = geometry.attention_heads
    try:
        rates = host_rates.rates_of_memory(
            plan.rates, weights.device, weights.dtype, heads, kv, layer, streamed, threads=threads
        )
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        logger.warning("no memory to measure with (%s): times are predicted from the rates of this machine", error)
        return plan
    finally:
        if weights.device.type == "cuda":
            torch.cuda.empty_cache()  # no block of another size stays behind in a budget that is planned to the byte
    return with_rates(plan, rates)


def _fuse(options: EngineOptions, weights: ModelWeights) -> Fused | None:
    wanted = weights.device.type == "cuda" if options.fused is None else options.fused
    if not wanted:
        return None
    fused = fuse(weights.decoder_layers)
    logger.info("fused: %s", fused)
    return fused


def _may_be_graphs(options: EngineOptions) -> bool:
    """Whether CUDA graphs may hold decode passes."""
    return not options.serial and options.graphs is not False and options.attention in attentions.IN_GRAPHS


def _tiers(options: EngineOptions, plan: Plan, shape: KVShape, streams: Streams, file: FileLane | None) -> Tiers:
    on_host = bool(plan.kv_host_bytes or plan.kv_disk_bytes)
    attend_state = attentions.ATTEND_STATE.get(options.attention)
    geometry = plan.geometry
    weights = geometry.streamed_bytes(len(plan.resident_layers))
    multiple = row_multiple(streams.device.type, geometry.dtype)

    def limit(kv: RequestKV) -> int:
        tokens = kv.host_tokens(kv.length)
        flops = 4.0 * geometry.layers * geometry.heads * geometry.head_dim * tokens
        kv_bytes = geometry.kv_bytes(tokens)
        return in_place_limit(plan.rates, weights_bytes=weights, kv_bytes=kv_bytes, flops_per_token=flops)

    return Tiers(
        WorkingKV(shape, streams, capacity=plan.context if on_host else 0, file=file),
        InPlace(streams, options.host_threads) if on_host else None,
        streams,
        attentions.ATTEND[options.attention],
        attend_state,
        limit,
        # With the heads of a group, a tile of so many rows: another one sums in another order.
        max(1, multiple * geometry.kv_heads // geometry.heads) if multiple > 1 else None,
    )


def _check_interface(weights: ModelWeights) -> None:
    model: Any = weights.model
    if not model.is_backend_compatible():
        raise CheckpointError(
            f"{type(model).__name__} does not ask transformers' AttentionInterface for its attention, so its KV cannot "
            "be kept elsewhere; the offload engine runs models that do, such as LLaMA, Mistral, Qwen and Gemma 2"
        )


def _try_out(loaded: LoadedModel) -> None:
    """Two short passes before the first request: kernels are built, and a model that cannot run is refused here."""
    name = type(loaded.weights.model).__name__
    kv = loaded.pool.allocate(min(TRY_OUT_TOKENS + 1, loaded.plan.context))
    if kv is None:
        raise BudgetError(f"the KV pools do not hold {TRY_OUT_TOKENS + 1} tokens; give more with --gpu-memory")
    try:
        for count in (kv.capacity - 1, 1):
            loaded.runner.run([Part(kv, [0] * count)])
    except Exception as error:
        loaded.close()
        if devices.is_out_of_memory(error):
            raise BudgetError(
                f"not even {TRY_OUT_TOKENS} tokens pass the model within --gpu-memory: {error}"
            ) from error
        raise CheckpointError(f"{name} does not run in the offload engine: {type(error).__name__}: {error}") from error
    loaded.pool.free(kv)
    loaded.streams.drain_transfers()


def _with_disk_tried(plan: Plan, read: DiskReads | None) -> Plan:
    """The plan with times predicted from what its first passes read from a disk, for longer than it was read before
    there was a plan: on a shared host it has moods."""
    if read is None or not read.bytes:
        return plan
    return with_rates(plan, replace(plan.rates, disk=read.bytes / read.seconds))


def _generation_config(directory: Path) -> Any:
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if not file.exists():
        return None
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"transformers cannot read {file}: {error}; download it again, or remove it") from error
