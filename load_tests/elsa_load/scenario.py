"""Scenarios as data: a YAML file says what arrives and when, a seed makes it concrete, a JSONL file replays it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from tqdm import tqdm

from elsa_load.measures import Objective
from elsa_load.prompts import Form, PromptMaker
from elsa_load.records import Request
from elsa_serve.errors import UsageError

Kind = Literal["closed", "constant", "poisson", "gamma", "ramp"]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come. Rates are per second; `concurrency` is of "closed".

    "gamma" spreads the gaps by `burstiness`, the shape: 1 is Poisson, less is burstier. "ramp" is Poisson with a rate
    that grows linearly from `rate` to `rate_end` over the scenario.
    """

    kind: Kind = "closed"
    concurrency: int = 1
    rate: float = 1.0
    rate_end: float | None = None
    burstiness: float = 1.0

    def times(self, count: int, rng: random.Random) -> list[float | None]:
        """When each of `count` requests is due, in seconds; None: as soon as there is room."""
        if self.kind == "closed":
            return [None] * count
        if self.kind == "constant":
            return [i / self.rate for i in range(count)]
        if self.kind == "ramp":
            return list(self._ramp(count, rng))
        shape = self.burstiness if self.kind == "gamma" else 1.0
        at, times = 0.0, []
        for _ in range(count):
            times.append(at)
            at += rng.gammavariate(shape, 1 / (shape * self.rate))
        return list(times)

    def _ramp(self, count: int, rng: random.Random) -> Iterator[float]:
        """Arrivals of a rate r(t) = a + (b − a) t / T: unit-rate arrivals through the inverse of its integral."""
        first, last = self.rate, self.rate_end if self.rate_end is not None else self.rate
        length = 2 * count / (first + last)
        slope = (last - first) / length
        passed = 0.0
        for _ in range(count):
            root = math.sqrt(max(0.0, first * first + 2 * slope * passed))
            yield (root - first) / slope if slope else passed / first
            passed += rng.expovariate(1.0)


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of request in the mix. `turns` > 1: a document with follow-up questions, one after the other.

    `cancel_fraction` of them are hung up by the client between `cancel_after_s` seconds after sending.
    """

    weight: float = 1.0
    prompt_tokens: int = 512
    output_tokens: int = 32
    turns: int = 1
    cancel_fraction: float = 0.0
    cancel_after_s: tuple[float, float] = (0.05, 1.0)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a scenario file holds. `documents`: how many different ones there are of each length (0: one a request).

    `patience_s`: how long clients try a refused request again. `restart_at_s`: when a server that we started ourselves
    is stopped and started again.
    """

    name: str
    about: str = ""
    requests: int = 16
    seed: int = 1
    form: Form = "tokens"
    ignore_eos: bool = True
    documents: int = 0
    patience_s: float = 0.0
    restart_at_s: tuple[float, ...] = ()
    arrivals: Arrivals = field(default_factory=Arrivals)
    objective: Objective = field(default_factory=Objective)
    mix: tuple[Part, ...] = (Part(),)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its output; follow-ups add to it."""
        return max(part.prompt_tokens + part.output_tokens for part in self.mix)

    def scaled(self, factor: float) -> Scenario:
        """The same with every prompt `factor` times as long, to try a long scenario on a small machine."""
        if factor == 1:
            return self
        mix = tuple(changed(part, prompt_tokens=max(128, round(part.prompt_tokens * factor))) for part in self.mix)
        return changed(self, mix=mix)


def names() -> list[str]:
    """The scenarios that come with the package."""
    folder = files("elsa_load") / "scenarios"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load(name: str) -> Scenario:
    """A scenario by its name or its file. Raises UsageError."""
    try:
        if name in names():
            text = (files("elsa_load") / "scenarios" / f"{name}.yaml").read_text()
        else:
            text = Path(name).read_text()
        data = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"no scenario {name!r} ({error}); there are {', '.join(names())}, or give a file") from error
    return parse(data if isinstance(data, dict) else {})


def parse(data: dict[str, Any]) -> Scenario:
    """A scenario from plain data. Raises UsageError, naming the key."""
    scenario = _build(Scenario, data, "scenario")
    for part in scenario.mix:
        if min(part.weight, part.prompt_tokens, part.output_tokens, part.turns) <= 0:
            raise UsageError(f"scenario {scenario.name}: weight, tokens and turns must be more than 0")
    arrivals = scenario.arrivals
    if arrivals.kind not in get_args(Kind) or scenario.form not in get_args(Form):
        raise UsageError(
            f"scenario {scenario.name}: kind is one of {', '.join(get_args(Kind))}, form of {', '.join(get_args(Form))}"
        )
    if min(arrivals.rate, arrivals.concurrency, arrivals.burstiness, scenario.requests) <= 0:
        raise UsageError(f"scenario {scenario.name}: rates, concurrency and requests must be more than 0")
    return scenario


def _build(kind: type, data: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(kind)}
    if not isinstance(data, dict) or set(data) - known:
        raise UsageError(f"{where}: expected a mapping with keys of {', '.join(sorted(known))}; found {data!r:.80}")
    data = dict(data)
    nested = {"arrivals": Arrivals, "objective": Objective}
    for key in nested.keys() & data.keys():
        data[key] = _build(nested[key], data[key], key)
    if "mix" in data:
        data["mix"] = tuple(_build(Part, part, "mix") for part in data["mix"])
    for key in ("cancel_after_s", "restart_at_s"):
        if key in data:
            data[key] = tuple(data[key])
    try:
        return kind(**data)
    except TypeError as error:
        raise UsageError(f"{where}: {error}") from error


def changed(item: Any, **changes: Any) -> Any:
    """A copy of a frozen record with some fields replaced."""
    return type(item)(**{f.name: getattr(item, f.name) for f in fields(item)} | changes)


def plan(scenario: Scenario, make: PromptMaker, *, progress: bool = False) -> list[Request]:
    """Every request of the scenario. The same scenario, seed and tokenizer give the same requests."""
    rng = random.Random(f"{scenario.name}-{scenario.seed}")
    cache: dict[tuple[int, int, int], list[Any]] = {}
    requests: list[Request] = []
    bar = tqdm(total=scenario.requests, desc="prompts", disable=not progress)
    session = 0
    while len(requests) < scenario.requests:
        (part,) = rng.choices(scenario.mix, [p.weight for p in scenario.mix])
        number = session % scenario.documents if scenario.documents else session
        key = (part.prompt_tokens, part.turns, number)
        if key not in cache:
            seed = scenario.seed * 1_000_003 + number
            cache[key] = make.prompts(part.prompt_tokens, seed, form=scenario.form, turns=part.turns)
        for turn, asked in enumerate(cache[key][: scenario.requests - len(requests)]):
            hangs_up = rng.random() < part.cancel_fraction
            requests.append(
                Request(
                    id=f"{scenario.name}-{scenario.seed}-{len(requests)}",
                    prompt=asked.prompt,
                    prompt_tokens=asked.tokens,
                    max_tokens=part.output_tokens,
                    session=session if part.turns > 1 else None,
                    turn=turn,
                    cancel_after_s=rng.uniform(*part.cancel_after_s) if hangs_up else None,
                    # With a forced length a model goes on after its answer, which is still in the text.
                    expected=asked.expected if scenario.form == "chat" else None,
                    ignore_eos=scenario.ignore_eos,
                )
            )
            bar.update()
        session += 1
    bar.close()
    times = scenario.arrivals.times(len(requests), random.Random(f"arrivals-{scenario.seed}"))
    return [changed(request, at_s=at) for request, at in zip(requests, times)]


def save(requests: list[Request], file: Path) -> None:
    """One JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for request in requests:
            out.write(json.dumps(asdict(request), separators=(",", ":")) + "\n")


def replay(file: Path) -> list[Request]:
    """The requests of a saved plan. Raises UsageError."""
    try:
        return [Request(**json.loads(line)) for line in file.read_text().splitlines() if line]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file} is no saved plan: {error}") from error


def tokenizer_of(directory: Path) -> Callable[[str], list[int]]:
    """The encoding of a model directory, without special tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer in {directory}: {error}") from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False)
