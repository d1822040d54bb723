"""Prompts of an exact number of tokens: long documents with hidden facts and questions about them.

The text is that of `elsa_serve.demo`, so an answer is right or wrong and nothing is downloaded. A prompt is sent as
token ids (exact by construction), as text (fitted until its own encoding has the length), or as a chat (the length is
that of the content; the template of the model adds its own tokens, which the endpoint's usage shows).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

from elsa_load.records import Prompt
from elsa_serve.demo import Document, Fact, make_document, prose_lines
from elsa_serve.errors import UsageError

Form = Literal["tokens", "text", "chat"]
Encode = Callable[[str], list[int]]
FACT_TOKENS = 64  # room that a fact and a question need, generously
ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, its length in tokens as fitted, and a text that the right answer holds."""

    prompt: Prompt
    tokens: int
    expected: str


class PromptMaker:
    """Makes prompts for one tokenizer. `encode` is without special tokens."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        sample = "\n".join(_take(prose_lines(random.Random(0)), 40))
        self._chars_per_token = len(sample) / max(1, len(encode(sample)))

    def prompts(self, tokens: int, seed: int, *, form: Form = "tokens", turns: int = 1) -> list[Asked]:
        """A document of about `tokens` tokens and its questions: turn t repeats the earlier turns and asks one more.

        The first prompt has exactly `tokens` tokens; later ones grow by the earlier questions and their right answers,
        whatever the server said, so that a run can be replayed. Raises UsageError for impossible lengths.
        """
        document = self._document(tokens, seed, turns)
        facts = [document.asked, *(fact for fact in document.facts if fact is not document.asked)][:turns]
        text = self._fitted(document.text, facts[0], tokens, seed)
        return [self._asked(text, facts, turn, form, tokens) for turn in range(turns)]

    def _document(self, tokens: int, seed: int, turns: int) -> Document:
        facts = max(turns, min(8, tokens // 1024), 1)
        size = int((tokens - FACT_TOKENS) * self._chars_per_token * 0.9)
        try:
            return make_document(size, seed, n_facts=facts)
        except ValueError as error:
            raise UsageError(f"a prompt of {tokens} tokens with {turns} questions is too short: {error}") from error

    def _fitted(self, text: str, fact: Fact, tokens: int, seed: int) -> str:
        """The document with filler before it, so that with the first question it has exactly `tokens` tokens."""
        filler = " ".join(_take(prose_lines(random.Random(f"filler-{seed}")), 4 + tokens // 400))
        tail = f"\n{text}\n\n{fact.question}"
        ratio, best = self._chars_per_token, ""
        size = int(ratio * max(0, tokens - len(self._encode(tail))))
        low, high = 0, len(filler)
        for _ in range(ROUNDS):
            size = min(max(size, low), high)
            best = filler[:size]
            missing = tokens - len(self._encode(best + tail))
            if missing == 0:
                break
            low, high = (size + 1, high) if missing > 0 else (low, size - 1)
            if low > high:  # no cut of the filler gives the length; words of one token each fill the rest
                return self._padded(best, tail, tokens)
            size += int(missing * ratio) or (1 if missing > 0 else -1)
        return f"{best}\n{text}"

    def _padded(self, start: str, tail: str, tokens: int) -> str:
        """Shorten until there is room, then fill it with line breaks and marks that stay single tokens."""
        while start and len(self._encode(start + tail)) > tokens:
            start = start[:-1]
        for mark in (" a", ".", "\n", " 1", "x\n"):
            padded = start
            while (missing := tokens - len(self._encode(padded + tail))) > 0:
                padded = mark * missing + padded
            if missing == 0:
                return f"{padded}{tail.rpartition(chr(10) * 2)[0]}"
        return f"{start}{tail.rpartition(chr(10) * 2)[0]}"

    def _asked(self, text: str, facts: Sequence[Fact], turn: int, form: Form, tokens: int) -> Asked:
        expected = facts[turn].value
        if form == "chat":
            messages = [{"role": "user", "content": f"{text}\n\n{facts[0].question}"}]
            for before, fact in pairwise(facts[: turn + 1]):
                messages.append({"role": "assistant", "content": before.answer})
                messages.append({"role": "user", "content": fact.question})
            return Asked(messages, sum(len(self._encode(m["content"])) for m in messages), expected)
        prompt = f"{text}\n\n{facts[0].question}"
        for before, fact in pairwise(facts[: turn + 1]):
            prompt += f"\n{before.answer}\n{fact.question}"
        ids = self._encode(prompt)
        if turn == 0 and form == "tokens":
            ids = ids[-tokens:]  # where no text has exactly this many tokens, its ids still do
        return Asked(ids if form == "tokens" else prompt, len(ids), expected)


def _take(lines: Iterator[str], count: int) -> list[str]:
    return list(islice(lines, count))
