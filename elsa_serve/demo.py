"""Long documents with hidden facts, for the embedded demo model: its training, its evaluation, the demo and the tests.

A fact is the sentence "The code of WORD is DIGITS." with a made-up word and random digits. A document is ordinary
text (English-like prose from a small grammar, or sources of the running interpreter's standard library) with one or
more such sentences hidden in it. Nobody can guess an answer: a model either reads it from the right place or is wrong,
so a fault in attention, in the KV cache or in the weights that were streamed shows as a wrong answer and not as a
plausible one.

Words and modules are divided into a training part and a held-out part by a checksum, so that what the model is asked
about was never seen in training. Everything depends on the seed alone (and for Python sources on the interpreter).
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = [
    "Document",
    "Fact",
    "hide_facts",
    "is_held_out",
    "make_document",
    "make_facts",
    "prose_lines",
    "python_files",
]

CONSONANTS = "bdfgjklmnprstvz"
VOWELS = "aeiou"
CODAS = ("", "", "", "n", "r", "s", "l", "k")


def _split(words: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(separator))


ADJECTIVES = _split(
    """
    old quiet narrow bright heavy patient distant wooden early careful broken empty gentle northern curious plain
    silver crowded honest pale steep warm foreign modest sudden dusty familiar hollow loyal restless
    """,
)
PLACES = _split(
    """
    harbour village library orchard station market valley mill bridge garden workshop tower river school chapel
    meadow quarry island theatre kitchen warehouse courtyard lighthouse forest hospital museum canal bakery cellar
    """,
)
PEOPLE = _split(
    """
    miller teacher captain gardener clerk painter doctor fisherman widow engineer shepherd printer traveller baker
    musician judge carpenter nurse merchant student porter weaver astronomer ferryman
    """,
)
THINGS = _split(
    """
    letter lantern map clock basket ladder blanket kettle violin ledger compass key table coat bell wheel book
    photograph umbrella hammer candle parcel mirror rope anchor chair notebook telescope
    """,
)
VERBS = _split(
    """
    carried repaired forgot described borrowed painted counted found examined hid sold remembered dropped measured
    admired polished ordered delivered copied abandoned collected lifted
    """,
)
TIMES = _split(
    """
    in the morning| after the rain| before the harvest| late in autumn| on the third day| during the long winter|
    at noon| when the bells rang| without a word| for the second time| a week later| as the lamps were lit|
    by the following spring
    """,
    "|",
)
LINKS = ("and", "but", "while", "because", "although", "so that", "until")


@dataclass(frozen=True, slots=True)
class Fact:
    key: str
    value: str

    @property
    def statement(self) -> str:
        return f"The code of {self.key} is {self.value}."

    @property
    def question(self) -> str:
        return f"What is the code of {self.key}?"

    @property
    def answer(self) -> str:
        """The right answer in full: the statement again, so that the value continues a repeated sentence."""
        return self.statement


@dataclass(frozen=True, slots=True)
class Document:
    """A text with hidden facts, and one of them to ask about."""

    text: str
    facts: tuple[Fact, ...]
    asked: Fact
    depth: float  # where the asked fact stands: 0 at the beginning of the text, 1 at its end

    @property
    def question(self) -> str:
        return self.asked.question

    @property
    def answer(self) -> str:
        return self.asked.answer

    @property
    def prompt(self) -> str:
        """The content of the user's message: the text, an empty line, the question."""
        return f"{self.text}\n\n{self.question}"


def is_held_out(name: str) -> bool:
    """Whether a word or a module belongs to the eighth that training never sees."""
    return zlib.crc32(name.lower().encode()) % 8 == 0


def _word(rng: random.Random) -> str:
    syllables = rng.choice((2, 3, 3, 3, 4))
    word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)
    return word.capitalize() if rng.random() < 0.25 else word


def make_facts(count: int, rng: random.Random, *, held_out: bool = True, digits: int = 5) -> list[Fact]:
    """`count` facts about different words; held-out words unless `held_out` is False."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        word = _word(rng)
        if is_held_out(word) == held_out and word.lower() not in facts:
            value = str(rng.randrange(10 ** (digits - 1), 10**digits))
            facts[word.lower()] = Fact(word, value)
    return list(facts.values())


def _clause(rng: random.Random) -> str:
    subject = f"the {rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)}"
    clause = f"{subject} {rng.choice(VERBS)} the {rng.choice(THINGS)}"
    if rng.random() < 0.5:
        clause += f" in the {rng.choice(PLACES)}"
    if rng.random() < 0.4:
        clause += " " + rng.choice(TIMES)
    return clause


def _sentence(rng: random.Random) -> str:
    sentence = _clause(rng)
    if rng.random() < 0.4:
        sentence += f", {rng.choice(LINKS)} {_clause(rng)}"
    return sentence[0].upper() + sentence[1:] + "."


def prose_lines(rng: random.Random) -> Iterator[str]:
    """Endless paragraphs of two to six sentences, one a line."""
    while True:
        yield " ".join(_sentence(rng) for _ in range(rng.randint(2, 6)))


@cache
def python_files(held_out: bool = True) -> tuple[Path, ...]:
    """Modules of the running interpreter's standard library, tests left out; a clear error where none are installed."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    modules = (path.relative_to(root) for path in sorted(root.rglob("*.py")))
    names = [name for name in modules if not skipped & set(name.parts) and is_held_out(name.as_posix()) == held_out]
    if not names:
        raise FileNotFoundError(f"no Python sources under {root}; use source='prose'")
    return tuple(root / name for name in names)


def _python_lines(rng: random.Random, held_out: bool) -> Iterator[str]:
    while True:
        path = rng.choice(python_files(held_out))
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def hide_facts(lines: Sequence[str], facts: Sequence[Fact], rng: random.Random) -> tuple[list[str], list[int]]:
    """Put each fact on a line of its own at a random place between `lines`.

    Returns the new lines and, for each fact in order, the index of its line.
    """
    places = [rng.randint(0, len(lines)) for _ in facts]
    order = sorted(range(len(facts)), key=lambda i: places[i])
    merged: list[str] = []
    where, taken = [0] * len(facts), 0
    for i in order:
        merged += lines[taken : places[i]]
        taken = places[i]
        where[i] = len(merged)
        merged.append(facts[i].statement)
    return merged + list(lines[taken:]), where


def make_document(
    size: int,
    seed: int,
    *,
    n_facts: int = 8,
    depth: float | None = None,
    source: str = "prose",
    measure: Callable[[str], int] = len,
    held_out: bool = True,
) -> Document:
    """A document of at most `size` units with `n_facts` hidden facts about different words, one of which is asked.

    `measure` gives a line's size, newline included: `len` counts characters; a tokenizer's count of tokens fits a
    document to a context exactly. `depth` in [0, 1] is where the asked fact stands (None: anywhere). `source` is
    "prose" (the same on every machine) or "python". Raises ValueError where the facts alone do not fit.
    """
    if source not in ("prose", "python"):
        raise ValueError(f"source is 'prose' or 'python', not {source!r}")
    if n_facts < 1:
        raise ValueError(f"a document needs at least one fact, not {n_facts}")
    rng = random.Random(f"{source}-{seed}-{held_out}")
    asked, *others = make_facts(n_facts, rng, held_out=held_out)
    room = size - sum(measure(fact.statement + "\n") for fact in (asked, *others))
    if room < 0:
        raise ValueError(f"{n_facts} facts do not fit in a document of size {size}; use fewer facts or a larger size")
    stream = prose_lines(rng) if source == "prose" else _python_lines(rng, held_out)
    lines = _take_lines(stream, room, measure, rng)
    lines, _ = hide_facts(lines, others, rng)
    depth = rng.random() if depth is None else depth
    lines.insert(round(depth * len(lines)), asked.statement)
    return Document("\n".join(lines), (asked, *others), asked, depth)


def _take_lines(stream: Iterator[str], room: int, measure: Callable[[str], int], rng: random.Random) -> list[str]:
    """Lines of `stream` that fill `room`; Python sources start at a random line so that headers do not dominate."""
    for _ in range(rng.randrange(200)):
        next(stream)
    lines: list[str] = []
    misses = 0
    while misses < 8:  # eight lines in a row too long for what is left: full enough
        line = next(stream)
        cost = measure(line + "\n")
        if cost <= room:
            lines.append(line)
            room -= cost
            misses = 0
        else:
            misses += 1
    return lines
