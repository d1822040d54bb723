"""From tokens to text, as it is generated: whole characters only, and no text that a stop string would take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from elsa_serve.protocol import Tokenizer

PREFIX_TOKENS = 8  # of the past, decoded again with each token, so that spacing comes out as in the whole text
WINDOW_TOKENS = 48  # when the window grows beyond this, its past is cut back to about PREFIX_TOKENS
CHARACTER_TOKENS = 4  # a character is at most four bytes, and a token at least one
INCOMPLETE = "\ufffd"  # what a decoder writes for the first bytes of an unfinished character


class Detokenizer:
    """Incremental decoding. The pieces, joined, are the decoded whole (where the decoder is a homomorphism at all)."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-PREFIX_TOKENS - CHARACTER_TOKENS :])
        self._printed = self._decode(self._window)
        self._shorten(self._printed)

    def _decode(self, tokens: Sequence[int]) -> str:
        return cast(str, self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # Some decoders write one replacement character a byte, and one for every byte of a run that is incomplete.
        piece = self._advance(text.rstrip(INCOMPLETE))
        if len(self._window) > WINDOW_TOKENS and not text.endswith(INCOMPLETE):
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """What is still held: replacement characters, of an unfinished character or of bytes that are none."""
        return self._advance(self._decode(self._window))

    def _shorten(self, text: str) -> None:
        """Cut the window's past back, at a token where no character is cut in two."""
        for size in range(PREFIX_TOKENS, PREFIX_TOKENS + CHARACTER_TOKENS):
            tail = self._decode(self._window[-size:])
            if INCOMPLETE not in tail and text.endswith(tail.lstrip()):
                self._window, self._printed = self._window[-size:], tail
                return

    def _advance(self, text: str) -> str:
        if len(text) <= len(self._printed):
            return ""
        piece, self._printed = text[len(self._printed) :], text
        return piece


class StopStrings:
    """Ends the text before the first stop string, wherever token bounds fall."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met). A possible beginning of one is held back."""
        self._held += piece
        hits = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if hits:
            shown, self._held = self._held[: min(hits)], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, shorter than `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class OutputText:
    """Detokenisation and stop strings of one request. Stop strings count from token `min_tokens` on."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str], min_tokens: int) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._min_tokens, self._count = min_tokens, 0

    def push(self, token_id: int, last: bool) -> tuple[str, bool]:
        """(text to show, whether a stop string ended it). With `last`, everything held is released."""
        self._count += 1
        piece = self._detokenizer.push(token_id)
        if last:
            piece += self._detokenizer.flush()
        if self._count <= self._min_tokens and not last:
            return self._stops.flush() + piece, False
        shown, stopped = self._stops.push(piece)
        if last and not stopped:
            shown += self._stops.flush()
        return shown, stopped

    def flush(self) -> str:
        """What is held when a request ends without another token."""
        shown, stopped = self._stops.push(self._detokenizer.flush())
        return shown if stopped else shown + self._stops.flush()


def eos_token_ids(generation_config: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """The end-of-sequence ids: of the generation config, else of the model's config; and the tokenizer's own, which
    ends a turn where chat models have configs older than their templates (vLLM counts it too)."""
    ids: frozenset[int] = frozenset()
    for source in (tokenizer, generation_config, config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            ids = ids.union([found] if isinstance(found, int) else found)
            if source is not tokenizer:
                break
    return ids
