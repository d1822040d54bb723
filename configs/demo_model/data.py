"""Training data of the demo model, composed from encoded parts by worker processes while the model trains.

A training sequence is a chat of exactly `length` tokens: text with hidden facts, then turns that ask about them, each
answer repeating the fact. A step's batch holds several segments of SEGMENT tokens; each segment is cut into sequences
of one length, drawn from a mix that the training loop adapts. A token's class (bits 12 and up) says how the loss
treats it.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from build_tokenizer import ASSISTANT, BEGIN, END, SPECIAL, SYSTEM, USER
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from elsa_serve.demo import make_facts, prose_lines, python_files

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SEGMENT = 32768
MAX_FACTS = 64
TOKEN_MASK = 0xFFF
# Classes: ordinary text; digits to retrieve; the other words of an answer; random content that nothing predicts.
TEXT, DIGIT, WORD, CHANCE = 0, 1 << 12, 2 << 12, 3 << 12
DIGIT_SHARE, WORD_SHARE, TEXT_SHARE = 1.0, 0.2, 0.2  # of the loss
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer from the document.", "You answer briefly and exactly.")


class Corpus:
    """Encoded text and the places where a fact may be inserted: before a line, or between two sentences of a line."""

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer) -> None:
        self.tokens = tokens.astype(np.uint16)
        vocabulary = tokenizer.get_vocab()
        spaced = np.zeros(len(vocabulary), dtype=bool)
        spaced[[i for piece, i in vocabulary.items() if piece.startswith("Ġ") and piece[1:2].isalpha()]] = True
        after_line = self.tokens[:-1] == vocabulary["Ċ"]
        after_sentence = (self.tokens[:-1] == vocabulary["."]) & spaced[self.tokens[1:]]
        self.cuts = np.flatnonzero(after_line | after_sentence) + 1
        self.starts_line = after_line[self.cuts - 1]

    @classmethod
    def from_texts(cls, texts: list[str], tokenizer: Tokenizer) -> Corpus:
        encoded = tokenizer.encode_batch_fast([text + "\n" for text in texts], add_special_tokens=False)
        return cls(np.concatenate([np.array(item.ids, dtype=np.uint16) for item in encoded]), tokenizer)


@dataclass(slots=True)
class EncodedFact:
    key: list[int]
    digits: list[int]
    stated: bool = False  # whether the sequence built so far holds it


class Composer:
    """Builds training sequences; one in each worker process."""

    def __init__(self, corpora: list[Corpus], keys: list[list[int]], tokenizer: Tokenizer, seed: int) -> None:
        self.corpora, self.keys = corpora, keys
        self.rng = random.Random(seed)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        self.the, self.the_inline = encode("The"), encode(" The")
        self.code_of, self.is_ = encode(" code of"), encode(" is ")
        self.what, self.question_mark = encode("What is the code of"), encode("?")
        self.dot, self.newline = encode("."), encode("\n")
        self.digit = [encode(str(i))[0] for i in range(10)]
        self.begin, self.user = encode(BEGIN), encode(f"{USER}\n")
        self.assistant, self.end = encode(f"{END}\n{ASSISTANT}\n"), encode(END)
        self.systems = [encode(f"{SYSTEM}\n{prompt}{END}\n") for prompt in SYSTEM_PROMPTS]
        self.vocabulary = tokenizer.get_vocab_size()

    def fact(self) -> EncodedFact:
        rng = self.rng
        digits = 5 if rng.random() < 0.75 else rng.choice((3, 4, 6, 7))
        return EncodedFact(rng.choice(self.keys), [self.digit[int(rng.random() * 10)] for _ in range(digits)])

    def statement(self, fact: EncodedFact, first: list[int]) -> list[int]:
        """The fact's sentence; digits that were stated before are to be retrieved, else they are chance."""
        digit = DIGIT if fact.stated else CHANCE
        fact.stated = True
        key, value = [t | CHANCE for t in fact.key], [t | digit for t in fact.digits]
        return [*first, *self.code_of, *key, *self.is_, *value, *self.dot]

    def turn(self, fact: EncodedFact) -> list[int]:
        """Question and answer, from after the opening of the user's message to after the answer's end."""
        question = [*self.what, *(t | CHANCE for t in fact.key), *self.question_mark, *self.assistant]
        words = [t | WORD for t in (*self.the, *self.code_of, *fact.key, *self.is_)]
        ending = [t | WORD for t in (*self.dot, *self.end)]
        return [*question, *words, *(t | DIGIT for t in fact.digits), *ending, *self.newline]

    def body(self, size: int, n_places: int) -> tuple[np.ndarray, list[tuple[int, bool]]]:
        """`size` tokens of text, and `n_places` sorted places in it with whether each is at the start of a line."""
        rng = self.rng
        kind = rng.choices((0, 1, 2), (0.45, 0.45, 0.1))[0]
        if kind == 2:  # random tokens: nothing but the facts can be understood
            noise = np.random.default_rng(rng.getrandbits(32))
            body = noise.integers(len(SPECIAL), self.vocabulary, size, dtype=np.uint16)
            return body, sorted((int(rng.random() * (size + 1)), False) for _ in range(n_places))
        corpus = self.corpora[kind]
        start = int(rng.random() * (len(corpus.tokens) - size))
        low, high = np.searchsorted(corpus.cuts, (start + 1, start + size))
        chosen = sorted(int(low + rng.random() * (high - low)) for _ in range(n_places)) if high > low else []
        places = [(int(corpus.cuts[i]) - start, bool(corpus.starts_line[i])) for i in chosen]
        return corpus.tokens[start : start + size], places or [(0, True)] * n_places

    def text(self, size: int, facts: list[EncodedFact]) -> list[np.ndarray]:
        """Parts that make `size` tokens of text with the facts' sentences between them."""
        body, places = self.body(size, len(facts))
        parts, taken = [], 0
        for fact, (place, on_line) in zip(facts, places):
            sentence = self.statement(fact, self.the if on_line else self.the_inline)
            sentence += self.newline if on_line else []
            parts += [body[taken:place], np.array(sentence, dtype=np.uint16)]
            taken = place
        return [*parts, body[taken:]]

    def plan(self, length: int) -> tuple[list[list[EncodedFact]], list[list[EncodedFact]]]:
        """Which facts each part of the text states, and which are asked after it."""
        rng = self.rng
        limit = max(1, min(MAX_FACTS, length // 70))
        count = limit if rng.random() < 0.3 else min(limit, int(math.exp(rng.random() * math.log(limit + 1))))
        facts = [self.fact() for _ in range(count)]
        n_asked = count if rng.random() < 0.75 else rng.randint(1, count)
        n_parts = 1 if rng.random() < 0.6 else min(n_asked, rng.randint(2, 4))
        stated: list[list[EncodedFact]] = [[] for _ in range(n_parts)]
        asked: list[list[EncodedFact]] = [[] for _ in range(n_parts)]
        for i, fact in enumerate(facts):
            part = rng.randrange(n_parts)
            stated[part].append(fact)
            if i < n_asked:  # the first is asked last, so that the sequence ends with a turn
                asked[rng.randint(part, n_parts - 1) if i else -1].append(fact)
        if length >= 512 and rng.random() < 0.2:  # some sentences stand twice
            for fact in rng.sample(facts, min(count, 4)):
                stated[rng.randrange(n_parts)].append(fact)
        for group in (*stated, *asked):
            rng.shuffle(group)
        return stated, asked

    def sequence(self, length: int) -> np.ndarray:
        """[length] uint16, token | class: a chat whose text fills what its facts and turns leave of the length."""
        rng = self.rng
        stated, asked = self.plan(length)
        opening = self.begin + (rng.choice(self.systems) if rng.random() < 0.1 else [])
        cost = sum(len(f.key) + len(f.digits) + 8 for group in stated for f in group)
        cost += sum(2 * len(f.key) + len(f.digits) + 22 for group in asked for f in group)
        room = max(0, length - cost - len(opening) - 6 * len(stated))
        edges = [0, *sorted(int(rng.random() * room) for _ in stated[1:]), room]
        parts: list[np.ndarray] = []
        tokens = [*opening, *self.user]
        for i, (facts, questions) in enumerate(zip(stated, asked)):
            parts += [np.array(tokens, dtype=np.uint16), *self.text(edges[i + 1] - edges[i], facts)]
            tokens = self.newline * 2
            for fact in questions:
                tokens += self.turn(fact) + self.user
        tail = self.corpora[0].tokens[: max(0, length - sum(map(len, parts)) - len(tokens))]
        return np.concatenate([*parts, np.array(tokens, dtype=np.uint16), tail])[:length]


class BatchStream(IterableDataset):
    """Endless batches; each is a dict of tensors made for one step of one process.

    tokens [S * SEGMENT] int32; positions [S * SEGMENT] int32; lengths [S] (the sequences' length in each segment);
    index [K] int32 where the loss is taken, target [K] int64, weight [K] float32, and bucket [K] int64, the index in
    LENGTHS for digits to retrieve, len(LENGTHS) elsewhere. Weights of each kind sum to a constant in every segment, so
    that short and long sequences count the same.
    """

    def __init__(self, composer_inputs: tuple, mix: torch.Tensor, segments: int, seed: int) -> None:
        self.composer_inputs, self.mix, self.segments, self.seed = composer_inputs, mix, segments, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked after the parent used its threads
        composer = Composer(*self.composer_inputs, seed=hash((self.seed, first)))
        for step in itertools.count(first, stride):
            yield self.batch(composer, step)

    def draw_buckets(self, step: int) -> np.ndarray:
        """Stratified draw from the mix, the same in every process of a step, so that all have equal work."""
        rng = np.random.default_rng(step)
        places = (np.arange(self.segments) + rng.random(self.segments)) / self.segments
        edges = np.cumsum(self.mix.numpy())
        return np.minimum(np.searchsorted(edges / edges[-1], places), len(LENGTHS) - 1)

    def batch(self, composer: Composer, step: int) -> dict[str, torch.Tensor]:
        buckets = self.draw_buckets(step)
        coded = np.concatenate(
            [composer.sequence(LENGTHS[b]) for b in buckets for _ in range(SEGMENT // LENGTHS[b])], dtype=np.uint16
        )
        positions = np.concatenate([np.tile(np.arange(LENGTHS[b]), SEGMENT // LENGTHS[b]) for b in buckets])
        fields = loss_fields(coded, positions, buckets, np.random.default_rng(composer.rng.getrandbits(32)))
        fields |= {
            "tokens": (coded & TOKEN_MASK).astype(np.int32),
            "positions": positions.astype(np.int32),
            "lengths": np.array([LENGTHS[b] for b in buckets]),
        }
        return {name: torch.from_numpy(value) for name, value in fields.items()}


def loss_fields(
    coded: np.ndarray, positions: np.ndarray, buckets: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Where the loss is taken: all digits and words of answers, and a random part of the ordinary text."""
    size = len(coded) // 4
    kinds = np.where(positions == 0, CHANCE, coded & ~np.uint16(TOKEN_MASK))  # a first token is not predicted
    segment = np.arange(len(coded)) // SEGMENT
    weight = np.zeros(len(coded), dtype=np.float32)
    for kind, share in ((DIGIT, DIGIT_SHARE), (WORD, WORD_SHARE)):
        for i in range(len(buckets)):
            chosen = np.flatnonzero((kinds == kind) & (segment == i))
            weight[chosen] = share / (max(1, len(chosen)) * len(buckets))
    answers = np.flatnonzero(weight)[:size]
    text = rng.choice(np.flatnonzero(kinds == TEXT), size - len(answers), replace=False)
    weight[text] = TEXT_SHARE / max(1, len(text))
    targets = np.sort(np.concatenate([answers, text]))
    digit_buckets = np.where(kinds == DIGIT, buckets[segment], len(LENGTHS))
    return {
        "index": (targets - 1).astype(np.int32),
        "target": (coded[targets] & TOKEN_MASK).astype(np.int64),
        "weight": weight[targets],
        "bucket": digit_buckets[targets].astype(np.int64),
    }


def composer_inputs(tokenizer: Tokenizer, seed: int = 0, keys: int = 200_000) -> tuple:
    """What a Composer needs: encoded training modules and prose, and encoded words that are not held out."""
    rng = random.Random(seed)
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in python_files(held_out=False)]
    paragraphs = ["\n".join(itertools.islice(prose_lines(rng), 200)) for _ in range(200)]
    corpora = [Corpus.from_texts(texts, tokenizer) for texts in (sources, paragraphs)]
    words = [f" {fact.key}" for fact in make_facts(keys, rng, held_out=False)]
    encoded = tokenizer.encode_batch_fast(words, add_special_tokens=False)
    return corpora, [item.ids for item in encoded], tokenizer
