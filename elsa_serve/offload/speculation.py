"""Prompt lookup: what followed the last tokens when they occurred before is a guess at what follows them now.

Answers about a document quote it, and edits of a text repeat it. A guess costs nothing to make, and one pass over the
weights verifies all of it: `Sequence.take` draws each token from the model's own logits as ever and stops at the first
that differs from the guess, so tokens are those of a run without guesses, greedy and sampled alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MIN_MATCH = 2  # tokens that must have occurred before; a single one says too little
MAX_MATCH = 32  # beyond this, a longer match says nothing more
FIRST_DRAFT = 4  # tokens of the first guess; it then doubles or shrinks with what is accepted


class PromptLookup:
    """One request's guesses, from its own prompt and output."""

    def __init__(self, prompt: Sequence[int], max_tokens: int, longest: int) -> None:
        """`max_tokens`: of output; `longest`: tokens of a guess at most."""
        self._tokens: npt.NDArray[np.int32] = np.empty(len(prompt) + max_tokens, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._count = len(prompt)
        self._longest = longest
        self._length = min(FIRST_DRAFT, longest)

    def append(self, token: int) -> None:
        self._tokens[self._count] = token
        self._count += 1

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may come next; none where nothing matches."""
        size = min(limit, self._length)
        if size < 1 or self._count <= MIN_MATCH:
            return []
        follow = self._longest_match()
        if not follow:
            return []
        # A match that reaches into the end itself is a repetition, which goes on.
        places = follow + np.arange(size) % (self._count - follow)
        return self._tokens[places].tolist()

    def _longest_match(self) -> int:
        """Where the text goes on after the latest of the longest earlier occurrences of its end; 0 for none."""
        tokens, count = self._tokens, self._count
        ends = np.flatnonzero(tokens[: count - 1] == tokens[count - 1]) + 1
        matched, best = 1, ends
        while len(ends) and matched < MAX_MATCH:
            ends = ends[ends > matched]
            ends = ends[tokens[ends - matched - 1] == tokens[count - matched - 1]]
            if len(ends):
                matched, best = matched + 1, ends
        return int(best[-1]) if matched >= MIN_MATCH and len(best) else 0

    def verified(self, drafted: int, accepted: int) -> None:
        """Learn from a guess: longer ones while they hold, shorter ones when they fail early."""
        if accepted == drafted:
            self._length = min(self._longest, 2 * max(self._length, drafted))
        else:
            self._length = max(1, accepted + 1)
