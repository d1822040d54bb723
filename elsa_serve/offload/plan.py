"""What lies where: the planner takes a geometry, budgets and rates, and returns one frozen Plan or refuses.

Order on the device: what every plan needs (layer slots, activations of a prompt chunk, hidden states), then resident
layers and KV. A byte of either on the device saves a byte of host memory a pass, but not on the same pipe: weights come
over PCIe, while the host attends its KV itself. So every number of resident layers is tried, and the one whose pass is
predicted to be the fastest wins. What does not fit goes to page-locked host memory, and layers beyond that memory stay
in the checkpoint's files.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from elsa_serve.errors import BudgetError
from elsa_serve.offload.disk_layers import BUFFERS
from elsa_serve.offload.file_lane import staging_bytes
from elsa_serve.offload.geometry import Geometry, whole_waves
from elsa_serve.offload.machine import Rates, assumed_rates
from elsa_serve.offload.predict import Share, pass_time
from elsa_serve.offload.rounds import rounds_of
from elsa_serve.offload.units import ALIGNMENT, format_size

MIN_CHUNK, SMALL_CHUNK = 64, 4096  # tokens; up to the larger, matrix products gain much
DECODE_SHARE = 100  # still larger chunks may slow a token down by one part in so many
ROUND_TOKENS = 32768  # prompt tokens of a pass: all their hidden states lie on the device
CHUNK_SHARE = 8  # a chunk's activations may take one part in so many of the device budget
THIRD_SLOT_SHARE = 10  # a third slot evens out the copying where three take no more than one part in so many
CUDA_CONTEXT = int(0.85 * 2**30)  # the context and kernels' code, outside torch's allocator: 0.81 GiB seen on an H200
HOST_PROCESS = int(1.6 * 2**30)  # of host memory, beside a GPU: libraries, CUDA's own, kernels: 1.5 GiB seen
CUBLAS_WORKSPACE = 32 << 20  # what torch gives cuBLAS on Hopper; less elsewhere
MIB = 1 << 20
ALIKE_ROWS = 16
GRAPHS = 128 << 20  # CUDA graphs of decode passes, and cuBLAS's workspace on the stream that captures them
GRAPHS_GAIN = 1.02  # they are for plans in which a token takes less by so much
ALLOCATOR_SLACK = 10  # the caching allocator's fragmentation: one part in so many of the activations


@dataclass(frozen=True, slots=True)
class Plan:
    """Placement and prediction. Bytes, tokens, seconds.

    The two KV pools together hold `kv_tokens` tokens in all layers; at least one request of `context` tokens fits.
    `kv_gpu_tokens` are the tokens of a request of full length whose KV it keeps on the device, in every layer. Times
    are those of one request: a prompt of `context` tokens, and a token at its end.
    """

    geometry: Geometry
    device_type: str
    context: int
    batch: int
    resident_layers: tuple[int, ...]
    slots: int
    prefetch_depth: int
    disk_layers: tuple[int, ...]  # of the streamed ones, those that are read from the checkpoint's files every pass
    chunk_tokens: int
    round_tokens: int  # of prompts, in one pass at most
    kv_tokens: int
    kv_gpu_bytes: int
    kv_host_bytes: int
    kv_disk_bytes: int
    gpu_budget: int
    host_budget: int
    gpu_bytes: dict[str, int]  # by item, in the order of placing
    host_bytes: dict[str, int]
    rates: Rates
    graphs: bool = False  # decode passes are replayed from CUDA graphs, as far as these can hold them
    in_place: bool = True  # KV off the device is attended by the host where it lies; else it comes to the device
    page_cache: int = 0  # bytes of host memory that this plan leaves to the system, which keeps pages of files there
    ttft_s: float = 0.0
    s_per_token: float = 0.0
    bottleneck: dict[str, str] | None = None  # phase -> the pipe that sets its time
    pipes: dict[str, dict[str, float]] | None = None  # phase -> seconds by pipe

    @property
    def streamed_layers(self) -> int:
        return self.geometry.layers - len(self.resident_layers)

    @property
    def streamed_bytes(self) -> int:
        """Weights copied to the device every pass."""
        return self.geometry.streamed_bytes(len(self.resident_layers))

    @property
    def disk_bytes(self) -> int:
        """Of these, those that are read from disk first."""
        return self.geometry.weights_bytes * len(self.disk_layers) // self.geometry.layers

    @property
    def kv_disk_cached(self) -> bool:
        """Whether the system keeps all KV on disk in memory, too. Of more than fits it would keep the wrong part: every
        pass reads all of it in the same order."""
        return self.kv_disk_bytes <= self.page_cache

    @property
    def kv_pool_tokens(self) -> int:
        """Tokens of all requests whose KV the device holds."""
        return self.geometry.kv_tokens(self.kv_gpu_bytes)

    @property
    def kv_gpu_tokens(self) -> int:
        """Tokens of a request of full length that every layer keeps on the device."""
        return min(self.context, self.geometry.kv_tokens(self.kv_gpu_bytes))

    @property
    def kv_host_tokens(self) -> int:
        """Those that every layer keeps in host memory: the rest, as far as it holds them."""
        rest = self.context - self.kv_gpu_tokens
        return min(rest, self.geometry.kv_tokens(self.kv_host_bytes)) if self.kv_disk_bytes else rest

    @property
    def kv_disk_tokens(self) -> int:
        """Those that every layer keeps on disk."""
        return self.context - self.kv_gpu_tokens - self.kv_host_tokens

    def kv_layer_split(self, tokens: int | None = None) -> tuple[int, int]:
        """Bytes of one layer's keys and values (on the device, in host memory) of one request of `tokens` tokens
        (None: full length), the device filled first."""
        tokens = self.context if tokens is None else tokens
        on_device, token = min(tokens, self.kv_gpu_tokens), self.geometry.kv_token_bytes()
        return on_device * token, (tokens - on_device) * token


@dataclass(frozen=True, slots=True)
class _Request:
    """What the caller asked for, None where the planner chooses."""

    geometry: Geometry
    gpu_budget: int
    host_budget: int
    batch: int
    resident: int | None
    slots: int | None
    chunk_tokens: int | None
    device_type: str
    rates: Rates
    disk: bool
    kv_disk: int
    free_host: int
    graphs: bool
    linear: str
    in_place: bool
    round_tokens: int = ROUND_TOKENS


def make_plan(
    geometry: Geometry,
    *,
    gpu_budget: int,
    host_budget: int,
    context: int | None = None,
    batch: int = 1,
    resident_layers: int | None = None,
    slots: int | None = None,
    chunk_tokens: int | None = None,
    device_type: str = "cuda",
    rates: Rates | None = None,
    disk: bool = False,
    kv_disk: int = 0,
    free_host: int = 0,
    graphs: bool = True,
    linear: str = "torch",
    in_place: bool = True,
) -> Plan:
    """Place a model. Budgets in bytes; context in tokens, prompt and output together (None: the model's maximum).
    `disk`: layers may stay in the checkpoint's files where host memory does not hold them. `kv_disk`: bytes of KV that
    may lie on disk. `free_host`: of host memory that are free now, budget or not; what the plan leaves of them keeps
    pages of files. `graphs`: CUDA graphs may hold decode passes. `linear`: whose linear layers, torch's or elsa's.
    `in_place`: the attention has states to merge, so that the host may attend its KV.

    Raises BudgetError with numbers for what cannot fit, naming the largest context that would.
    """
    for name, value, least in (
        ("context", context, 1), ("max-batch", batch, 1), ("slots", slots, 2), ("chunk-tokens", chunk_tokens, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise BudgetError(f"--{name} {value} is too small; it must be at least {least}")
    if resident_layers is not None and not 0 <= resident_layers <= geometry.layers:
        raise BudgetError(f"--resident-layers {resident_layers} is not in 0 … {geometry.layers}, the model's layers")
    if context is not None and context > geometry.max_context:
        raise BudgetError(
            f"--context {context} exceeds the model's maximum of {geometry.max_context} tokens "
            f"(max_position_embeddings with its rope scaling); use less, or set rope_scaling in config.json"
        )
    request = _Request(
        geometry,
        gpu_budget,
        host_budget,
        batch,
        resident_layers,
        slots,
        chunk_tokens,
        device_type,
        rates or assumed_rates(geometry.dtype),
        disk,
        kv_disk,
        free_host,
        graphs and device_type == "cuda",
        linear,
        in_place,
    )
    wanted = context or geometry.max_context
    try:
        plan = _enlarged(request, _place(request, wanted))
    except BudgetError as error:
        raise BudgetError(f"{error}; {_remedy(request, wanted)}") from None
    if plan.disk_layers and wanted > ROUND_TOKENS:  # every round reads them again: one for all, where that fits
        with suppress(BudgetError):
            larger = replace(request, round_tokens=wanted)
            return _enlarged(larger, _place(larger, wanted))
    return plan


def _remedy(request: _Request, wanted: int) -> str:
    """What would fit, for the end of a refusal."""
    largest = bisect.bisect_left(range(1, wanted), True, key=lambda context: not _fits(request, context))
    if largest:
        return (
            f"the largest context that fits is {largest} tokens: pass --context {largest},"
            f"{_disk_remedy(request, wanted)} or raise the budget"
        )
    fewer = "use fewer --resident-layers, " if request.resident else ""
    return f"no context fits: {fewer}raise the budget, or choose a smaller dtype or model"


def _disk_remedy(request: _Request, wanted: int) -> str:
    """The least --kv-disk with which the context would fit after all; nothing where none helps."""
    most = -(-request.geometry.kv_bytes(wanted) // MIB)
    least = bisect.bisect_left(range(most), True, key=lambda n: _fits(replace(request, kv_disk=n * MIB), wanted))
    return f" keep KV on disk with --kv-disk {least}MiB," if least < most else ""


def _fits(request: _Request, context: int) -> bool:
    try:
        _place(request, context)
    except BudgetError:
        return False
    return True


# --- placing ------------------------------------------------------------------------------------------------------


def _place(request: _Request, context: int) -> Plan:
    """The best plan, in smaller chunks where memory is tight. Raises BudgetError."""
    chunk = request.chunk_tokens or _choose_chunk(request.geometry, request.gpu_budget)
    while True:
        try:
            return _place_chunked(request, context, min(_in_waves(request, chunk), context))
        except BudgetError:
            if request.chunk_tokens or chunk <= MIN_CHUNK:
                raise
            chunk //= 2


def _enlarged(request: _Request, plan: Plan) -> Plan:
    """The plan in the largest chunks that bring a prompt's first token sooner and decode as fast: products on tensor
    cores, which run at the power limit, take fewer joules. For float32 products without them no gain was seen (a layer
    of 32K tokens: 405 ms in chunks of 4096 on an H200, 423 in one, after a phase at the power limit), and the room is
    better KV's."""
    if request.chunk_tokens or request.device_type != "cuda":
        return plan
    if request.geometry.dtype == torch.float32 and request.linear == "torch":
        return plan
    best, chunk = plan, plan.chunk_tokens
    while chunk < plan.round_tokens:
        chunk = min(_in_waves(request, 2 * chunk), plan.round_tokens)
        try:
            larger = _place_chunked(request, plan.context, chunk)
        except BudgetError:
            break
        if larger.s_per_token * DECODE_SHARE > plan.s_per_token * (DECODE_SHARE + 1):
            break
        best = larger if larger.ttft_s < best.ttft_s else best
    return best


def _place_chunked(request: _Request, context: int, chunk: int) -> Plan:
    """The plan of the number of resident layers that decodes fastest; of equal ones, that which reads least from host
    memory."""
    layers, token = request.geometry.layers, request.geometry.layers * request.geometry.kv_token_bytes()
    counts = range(layers + 1) if request.resident is None else [request.resident]
    plans: dict[bool, list[Plan]] = {False: [], True: []}  # without and with CUDA graphs
    refusal: BudgetError | None = None
    for resident, graphs in itertools.product(counts, plans if request.graphs else [False]):
        slots = _slots(request, resident)
        if graphs and request.resident is None and slots and (layers - resident) % slots:
            continue  # every pass would begin in another slot, and take graphs of its own
        try:
            plans[graphs].append(_predict(_place_with(request, context, chunk, resident, graphs)))
        except BudgetError as error:
            refusal = refusal or error  # the first: of a plan with the fewest bytes on the device
    if refusal is not None and not any(plans.values()):
        raise refusal
    best = [
        min(some, key=lambda plan: (plan.s_per_token, plan.streamed_bytes + plan.kv_host_tokens * token))
        for some in plans.values()
        if some
    ]
    return best[-1] if best[-1].s_per_token * GRAPHS_GAIN < best[0].s_per_token else best[0]


def _slots(request: _Request, resident: int) -> int:
    if resident == request.geometry.layers:
        return 0
    return request.slots or _choose_slots(request.geometry, request.gpu_budget)


def _place_with(request: _Request, context: int, chunk: int, resident: int, graphs: bool) -> Plan:
    """The plan with so many resident layers, without predictions. Raises BudgetError."""
    geometry = request.geometry
    items = _fixed_items(request, context, chunk)
    if graphs:
        items["CUDA graphs"] = GRAPHS
    slots = _slots(request, resident)
    free = request.gpu_budget - sum(items.values()) - (slots + resident) * geometry.layer_bytes
    kv_gpu = wanted = geometry.kv_bytes(context) * request.batch
    working = 0
    if free < wanted:
        working = geometry.kv_layer_bytes(context)
        free -= working
        if free < 0:
            raise BudgetError(_device_message(request, items, slots, resident, working))
        kv_gpu = geometry.kv_bytes(geometry.kv_tokens(free))
    least = geometry.kv_bytes(context - min(context, geometry.kv_tokens(kv_gpu)))  # of one request of full length
    least = geometry.kv_bytes(-(-max(0, least - request.kv_disk) // (geometry.layers * geometry.kv_token_bytes())))
    in_memory, staging = _host_layers(request, resident, least)
    weights = geometry.streamed_bytes(geometry.layers - in_memory)
    process = _process_bytes(request)
    room = (request.host_budget - process - weights - staging) // ALIGNMENT * ALIGNMENT
    kv_host = max(least, min(wanted - kv_gpu, room))
    if request.kv_disk:  # whole tokens, so that the rest of a request is what the disk has room for
        kv_host = geometry.kv_bytes(geometry.kv_tokens(kv_host))
    kv_disk = min(request.kv_disk, wanted - kv_gpu - kv_host)
    gpu_bytes = {
        **items,
        "layer slots": slots * geometry.layer_bytes,
        "KV on its way to and from the host": working,
        "KV": kv_gpu,
        "resident layers": resident * geometry.layer_bytes,
    }
    host_bytes = {"weights of streamed layers": weights, "staging for layers on disk": staging, "KV": kv_host}
    host_bytes["this process"] = process if any(host_bytes.values()) else 0  # no budget is refused for it alone
    taken = sum(host_bytes.values()) + (0 if request.device_type == "cuda" else sum(gpu_bytes.values()))
    residents = spread(range(geometry.layers), resident)
    streamed = [index for index in range(geometry.layers) if index not in set(residents)]
    return Plan(
        geometry=geometry,
        device_type=request.device_type,
        context=context,
        batch=request.batch,
        resident_layers=residents,
        slots=slots,
        prefetch_depth=max(0, slots - 1),
        disk_layers=spread(streamed, len(streamed) - in_memory),
        chunk_tokens=chunk,
        round_tokens=min(context, request.round_tokens),
        kv_tokens=(kv_gpu + kv_host + kv_disk) * context // geometry.kv_bytes(context),
        kv_gpu_bytes=kv_gpu,
        kv_host_bytes=kv_host,
        kv_disk_bytes=kv_disk,
        gpu_budget=request.gpu_budget,
        host_budget=request.host_budget,
        gpu_bytes=gpu_bytes,
        host_bytes=host_bytes,
        rates=request.rates,
        graphs=graphs,
        in_place=request.in_place,
        page_cache=max(0, request.free_host - taken),
    )


def _host_layers(request: _Request, resident: int, kv: int) -> tuple[int, int]:
    """(streamed layers that lie in host memory beside so many bytes of KV, staging bytes for the others, on disk).

    Raises BudgetError where the others cannot stay on disk.
    """
    geometry = request.geometry
    streamed = geometry.layers - resident
    budget = max(0, request.host_budget - _process_bytes(request))  # 0 is enough where all lies on the device
    if geometry.streamed_bytes(resident) + kv <= budget:
        return streamed, 0
    staging = BUFFERS * geometry.layer_bytes
    left = budget - kv - staging
    if not request.disk or left < 0:
        raise BudgetError(_host_message(request, resident, kv))
    return min(streamed - 1, left // geometry.layer_bytes), staging


def _process_bytes(request: _Request) -> int:
    """Host memory of this process beside weights and KV; without a GPU it is small, and the budget is what is given to
    them alone."""
    return HOST_PROCESS + staging_bytes(request.kv_disk) if request.device_type == "cuda" else 0


def _fixed_items(request: _Request, context: int, chunk: int) -> dict[str, int]:
    """Device bytes that do not depend on placement."""
    geometry = request.geometry
    hidden = hidden_bytes(geometry, min(context, request.round_tokens))
    activations = chunk_bytes(geometry, chunk, context)
    rows = max(request.batch, row_multiple(request.device_type, geometry.dtype))
    return {
        "CUDA context": CUDA_CONTEXT if request.device_type == "cuda" else 0,
        "cuBLAS workspace": CUBLAS_WORKSPACE if request.device_type == "cuda" else 0,
        "embeddings and head": geometry.outside_bytes,
        "hidden states of the prompt": hidden,
        "activations of a chunk": activations,
        "logits": rows * geometry.vocab * (geometry.dtype.itemsize + 8),
        "allocator slack": (hidden + activations) // ALLOCATOR_SLACK,
    }


def row_multiple(device_type: str, dtype: torch.dtype) -> int:
    """Of which the rows of decode passes are. A library's product of one row may round otherwise than that of several,
    and in 16 bits that is enough for another token, which must depend neither on what is drafted nor on who shares the
    pass. A GPU's product of 16 rows reads the same bytes; in float32 it takes twice as long, and rounding decides
    nothing."""
    return ALIKE_ROWS if device_type == "cuda" and dtype.itemsize < 4 else 1


def hidden_bytes(geometry: Geometry, context: int) -> int:
    """The prompt's hidden states twice (transformers' embedding scaling makes a copy), and rotary tables in FP32."""
    hidden = 2 * context * geometry.hidden * geometry.dtype.itemsize
    tables = context * geometry.head_dim * (2 * geometry.dtype.itemsize + 16)
    return hidden + tables


def chunk_bytes(geometry: Geometry, chunk: int, context: int) -> int:
    """Activations alive at once while a chunk passes a layer, as transformers' decoder layers make them.

    Norms run in FP32 (a copy, its square, the result) beside residual and output. Attention holds queries, their
    rotated form and two temporaries, the output and its transpose, the same for keys; FP32 attention also splits every
    operand into planes of its own size. The MLP holds gate, its activation, up and their product.
    """
    size = geometry.dtype.itemsize
    queries, keys = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    norm = chunk * geometry.hidden * (8 + 3 * size)
    attention = chunk * size * (6 * queries + 5 * keys)
    if geometry.dtype == torch.float32:
        attention += 4 * (chunk * queries + 2 * context * keys)
    mlp = chunk * size * 4 * geometry.ffn
    return norm + max(attention, mlp)


def _choose_chunk(geometry: Geometry, gpu_budget: int) -> int:
    """The largest power of two, or about that, whose own activations stay a small part of the budget."""
    chunk = SMALL_CHUNK
    while chunk > MIN_CHUNK and chunk_bytes(geometry, chunk, 0) > gpu_budget // CHUNK_SHARE:
        chunk //= 2
    return chunk


def _in_waves(request: _Request, chunk: int) -> int:
    if request.chunk_tokens or request.device_type != "cuda":
        return chunk
    return whole_waves(chunk, request.geometry.heads, request.rates.multiprocessors)


def _choose_slots(geometry: Geometry, gpu_budget: int) -> int:
    return 3 if geometry.layers > 3 and 3 * geometry.layer_bytes * THIRD_SLOT_SHARE <= gpu_budget else 2


def _device_message(request: _Request, items: dict[str, int], ring: int, resident: int, working: int) -> str:
    layer = request.geometry.layer_bytes
    needed = {
        **items,
        f"{ring} layer slots": ring * layer,
        f"{resident} resident layers": resident * layer,
        "KV on its way": working,
    }
    parts = ", ".join(f"{name} {format_size(n)}" for name, n in needed.items() if n)
    return (
        f"a budget of {format_size(request.gpu_budget)} on the device (--gpu-memory) is too small: "
        f"{format_size(sum(needed.values()))} are needed at least ({parts})"
    )


def _host_message(request: _Request, resident: int, kv: int) -> str:
    geometry = request.geometry
    weights, what, process = geometry.streamed_bytes(resident), "weights", _process_bytes(request)
    if request.disk:
        weights, what = BUFFERS * geometry.layer_bytes, "staging for layers on disk"
    return (
        f"a budget of {format_size(request.host_budget)} in host memory (--host-memory, or the container's limit) is "
        f"too small: {format_size(process + weights + kv)} are needed ({what} {format_size(weights)}, KV "
        f"{format_size(kv)}{f', this process {format_size(process)}' if process else ''})"
    )


def spread(items: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the items, evenly spaced, so that the copying in between is even too."""
    return tuple(items[i * len(items) // count] for i in range(count)) if count else ()


def with_rates(plan: Plan, rates: Rates) -> Plan:
    """The same placement, with times predicted from other rates."""
    return _predict(replace(plan, rates=rates))


def _predict(plan: Plan) -> Plan:
    """With the times of one request of full length: its prompt, and a token at its end."""
    decode = pass_time(plan, [Share(max(0, plan.context - 1), 1)])
    rounds = [pass_time(plan, [share]) for share in rounds_of(plan, plan.context)]
    names = {name: None for one in rounds for name in one.pipes}  # in their order
    prefill = {name: sum(one.pipes.get(name, 0.0) for one in rounds) for name in names}
    slowest = {name: sum(one.seconds for one in rounds if one.bottleneck == name) for name in names}
    return replace(
        plan,
        ttft_s=sum(one.seconds for one in rounds),
        s_per_token=decode.seconds,
        bottleneck={"prefill": max(slowest, key=slowest.__getitem__), "decode": decode.bottleneck},
        pipes={"prefill": prefill, "decode": decode.pipes},
    )
