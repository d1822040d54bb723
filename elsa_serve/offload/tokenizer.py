"""The tokenizer of a model directory, or a plain one for models of random weights that have none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from elsa_serve.errors import CheckpointError
from elsa_serve.protocol import Tokenizer

BYTES = 256

logger = logging.getLogger(__name__)


class ByteTokenizer:
    """A token a byte, for dummy models: text goes in as UTF-8; ids beyond the bytes come out as <id>."""

    eos_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        pieces = (bytes([i]) if i < BYTES else f"<{i}>".encode() for i in token_ids)
        return b"".join(pieces).decode(errors="replace")

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in conversation)
        text += "assistant: " if kwargs.get("add_generation_prompt") else ""
        return self.encode(text) if kwargs.get("tokenize", True) else text


def load_tokenizer(directory: Path, vocab_size: int, *, dummy: bool) -> Tokenizer:
    """The directory's tokenizer. `dummy` models may lack one. Raises CheckpointError."""
    from transformers import AutoTokenizer

    named = directory if directory.is_dir() else directory.parent
    if any((named / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        try:
            tokenizer = AutoTokenizer.from_pretrained(named, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"transformers cannot read the tokenizer in {named}: {error}") from error
        if len(tokenizer) > vocab_size:
            logger.warning(
                "the tokenizer in %s knows %d tokens and the model %d: prompts with others are refused; is it another "
                "model's?",
                named,
                len(tokenizer),
                vocab_size,
            )
        return cast(Tokenizer, tokenizer)
    if not dummy:
        raise CheckpointError(
            f"{named} has no tokenizer (tokenizer.json or tokenizer.model): download it with the model"
        )
    if vocab_size < BYTES:
        raise CheckpointError(
            f"a dummy model without a tokenizer needs a vocabulary of at least {BYTES}, not {vocab_size}"
        )
    return ByteTokenizer()
