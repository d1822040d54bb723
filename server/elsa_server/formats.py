"""How token events look in the two OpenAI forms: text completions and chat."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from elsa_serve.protocol import PrefillProgress, TokenEvent, TokenLogprob


@dataclass(slots=True)
class Choice:
    """One sequence of an answer as it grows."""

    text: str = ""
    tokens: list[TokenEvent] = field(default_factory=list)  # those with a log-probability
    finish_reason: str | None = None
    cached_tokens: int = 0
    offset: int = 0  # characters of the tokens with a log-probability so far


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every part of one answer carries."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class Format(Protocol):
    """The differences between the endpoints; `logprobs` says whether the client asked for them."""

    kind: str  # the "object" of an answer
    chunk_kind: str
    logprobs: bool

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of a chunk that comes before a sequence's first token."""
        ...

    def delta(self, index: int, text: str, tokens: list[TokenEvent], offset: int) -> dict[str, Any]: ...

    def finish(self, index: int, reason: str) -> dict[str, Any]: ...

    def whole(self, index: int, choice: Choice) -> dict[str, Any]: ...


class CompletionFormat:
    kind = chunk_kind = "text_completion"

    def __init__(self, logprobs: bool) -> None:
        self.logprobs = logprobs

    def opening(self, index: int) -> None:
        return None

    def delta(self, index: int, text: str, tokens: list[TokenEvent], offset: int) -> dict[str, Any]:
        logprobs = self._logprobs(tokens, offset) if self.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def finish(self, index: int, reason: str) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        return self.delta(index, choice.text, choice.tokens, 0) | {"finish_reason": choice.finish_reason}

    @staticmethod
    def _logprobs(tokens: list[TokenEvent], offset: int) -> dict[str, Any]:
        answer: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chosen, top in ((event.logprob, event.top_logprobs) for event in tokens):
            assert chosen is not None  # `tokens` holds only events with one
            answer["tokens"].append(chosen.text)
            answer["token_logprobs"].append(chosen.logprob)
            # The chosen token is always among them, so that there are up to logprobs + 1.
            answer["top_logprobs"].append({t.text: t.logprob for t in (*top, chosen)})
            answer["text_offset"].append(offset)
            offset += len(chosen.text)
        return answer


class ChatFormat:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: bool) -> None:
        self.logprobs = logprobs

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, text: str, tokens: list[TokenEvent], offset: int) -> dict[str, Any]:
        return self._chunk(index, {"content": text}, self._logprobs(tokens) if self.logprobs else None)

    def finish(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk(index, {}) | {"finish_reason": reason}

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens) if self.logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    @classmethod
    def _logprobs(cls, tokens: list[TokenEvent]) -> dict[str, Any]:
        content = []
        for event in tokens:
            assert event.logprob is not None  # `tokens` holds only events with one
            content.append(cls._entry(event.logprob) | {"top_logprobs": [cls._entry(t) for t in event.top_logprobs]})
        return {"content": content, "refusal": None}

    @staticmethod
    def _entry(token: TokenLogprob) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """`cached_tokens`: those of the prompt whose KV was found computed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def progress(index: int, event: PrefillProgress) -> dict[str, int]:
    return {"index": index, "processed_tokens": event.processed_tokens, "total_tokens": event.total_tokens}
