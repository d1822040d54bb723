"""The exceptions of ELSA-Serve. Every message names the offending value and the remedy.

ElsaError
├── UsageError            bad input from a person: exit status 2, HTTP 400
│   ├── CheckpointError   a missing, truncated or unsuitable checkpoint
│   │   └── NoSuchModel   its directory is not there
│   ├── BudgetError       a plan that cannot fit its memory budgets
│   └── ContextTooLong    prompt and output exceed the model's context
├── Overloaded            try again later: HTTP 503 or 429 with Retry-After
│   ├── QueueFull
│   └── EngineDraining
└── EngineFailed          the engine cannot go on: HTTP 500
"""

from __future__ import annotations


class ElsaError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(ElsaError, ValueError):
    pass


class CheckpointError(UsageError):
    pass


class NoSuchModel(CheckpointError):
    def __init__(self, path: object) -> None:
        super().__init__(
            f"no such model directory: {path}; download it first (hf download ORG/NAME --local-dir DIR) and pass DIR"
        )


class BudgetError(UsageError):
    pass


class ContextTooLong(UsageError):
    def __init__(self, limit: int, prompt_tokens: int, max_tokens: int) -> None:
        self.limit, self.prompt_tokens, self.max_tokens = limit, prompt_tokens, max_tokens
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the messages, {max_tokens} in the completion). "
            "Please reduce the length of the messages or completion."
        )


class Overloaded(ElsaError):
    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class QueueFull(Overloaded):
    pass


class EngineDraining(Overloaded):
    pass


class EngineFailed(ElsaError):
    pass
