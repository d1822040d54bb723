"""Checks of prompts and token ids: unions that may hold millions of values.

They are plain Python on purpose. A loop of bytecode lets go of the interpreter lock every few milliseconds, so the
event loop keeps turning; one call into a compiled validator over a million ids would hold it for a tenth of a second.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from elsa_server.settings import MAX_SEQUENCES

MAX_TOKEN_ID = 2**31 - 1


def invalid(message: str, param: str | None = None) -> PydanticCustomError:
    """`param` names the parameter where the check is one of several together."""
    return PydanticCustomError("invalid", "{message}", {"message": message, "param": param})


def check_text(value: str) -> str:
    """Refuse lone surrogates, which JSON can carry in escapes and no tokenizer can encode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid("text must be valid Unicode, without lone surrogates") from None
    return value


def check_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not value:
        raise invalid("expected a non-empty list of token ids")
    for token in value:
        if type(token) is not int or not 0 <= token <= MAX_TOKEN_ID:
            raise invalid("token ids must be non-negative integers of 31 bits")
    return value


def check_prompt(value: Any) -> str | list[Any]:
    if isinstance(value, str) and value:
        return check_text(value)
    if not isinstance(value, list) or not value:
        raise invalid("expected a non-empty string, a list of strings, a list of token ids or a list of such lists")
    if isinstance(value[0], int):
        return check_token_ids(value)
    if len(value) > MAX_SEQUENCES:
        raise invalid(f"at most {MAX_SEQUENCES} prompts in one request")
    for one in value:
        if not one or type(one) is not type(value[0]) or not isinstance(one, str | list):
            raise invalid("prompts must be non-empty and of one kind: all strings, or all lists of token ids")
    return [check_text(one) if isinstance(one, str) else check_token_ids(one) for one in value]


TOKEN_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "maxItems": MAX_SEQUENCES, "items": {"type": "string", "minLength": 1}},
        TOKEN_IDS_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_SEQUENCES, "items": TOKEN_IDS_SCHEMA},
    ]
}
Prompt = Annotated[Any, PlainValidator(check_prompt), WithJsonSchema(PROMPT_SCHEMA)]
TokenIds = Annotated[Any, PlainValidator(check_token_ids), WithJsonSchema(TOKEN_IDS_SCHEMA)]
