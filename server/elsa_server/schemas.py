"""Requests of the HTTP interface, typed. Bounds are those of the OpenAI specification.

Parameters of that specification that this server does not act on are listed all the same: their neutral values are
accepted, any other is refused by name. Unknown parameters are refused too, so nothing is ever silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from elsa_server.prompts import MAX_TOKEN_ID, Prompt, TokenIds, check_text, invalid
from elsa_server.settings import MAX_SEQUENCES

MAX_MESSAGES = 2048
MAX_PARTS = 8192  # content parts of all messages together
INT64 = 2**63


class Neutral:
    """A parameter without effect here: only the values that ask for nothing, and null, are accepted."""

    def __init__(self, *allowed: Any) -> None:
        self.values = [None, *allowed]

    def check(self, value: Any) -> Any:
        # True equals 1 in Python but not in JSON.
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in self.values):
            shown = " or ".join("null" if v is None else repr(v) for v in self.values)
            message = "not supported by this server, only {shown} is accepted"
            raise PydanticCustomError("unsupported_parameter", message, {"shown": shown})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": self.values, "description": "Not supported: neutral values only."}


Text = Annotated[str, AfterValidator(check_text)]
NoNumber = Annotated[Any, Neutral(0)]
NoFlag = Annotated[Any, Neutral(False)]
NoList = Annotated[Any, Neutral([])]
NoObject = Annotated[Any, Neutral({})]
Nothing = Annotated[Any, Neutral()]
Hint = Annotated[str, StringConstraints(max_length=512)] | None  # who asks: by definition without effect on the answer
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIdText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]  # JSON has no other keys than texts
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(check_text)]


class Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="Extension, as vLLM's: usage so far in every chunk.")
    include_obfuscation: NoFlag = None
    include_progress: bool | None = Field(None, description="Extension: chunks that tell how far the prompt has come.")


def needs_stream(schema: dict[str, Any]) -> None:
    """What `GenerationOptions.check_together` demands, said in the schema too."""
    schema["if"] = {"required": ["stream_options"], "properties": {"stream_options": {"type": "object"}}}
    schema["then"] = {"required": ["stream"], "properties": {"stream": {"const": True}}}


def needs_logprobs(schema: dict[str, Any]) -> None:
    """What `ChatCompletionRequest.check_logprobs` demands, said in the schema too."""
    needs_stream(schema)
    condition = {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer"}}}
    schema["allOf"] = [
        {"if": condition, "then": {"required": ["logprobs"], "properties": {"logprobs": {"const": True}}}}
    ]


class GenerationOptions(Model):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=needs_stream)

    model: str = Field(min_length=1, max_length=512)
    n: int | None = Field(1, ge=1, le=128, description=f"Choices a prompt; prompts × n may be {MAX_SEQUENCES} at most.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[TokenIdText, Bias], Field(max_length=1024)] | None = None
    repetition_penalty: float | None = Field(
        1.0, gt=0, le=10, description="Extension: over 1, tokens of prompt and output become less likely; 1 is off."
    )
    min_p: float | None = Field(
        0.0, ge=0, le=1, description="Extension: keep tokens of this share of the best one's probability; 0 is off."
    )
    top_k: int | None = Field(0, ge=-1, lt=INT64, description="Extension: keep the k best tokens; 0 and -1 are off.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = Field(
        None, description="Extension: tokens that end the text, with ignore_eos too; they are no part of it."
    )
    min_tokens: int | None = Field(0, ge=0, lt=INT64, description="Extension: no end of text before this many tokens.")
    ignore_eos: bool | None = Field(False, description="Extension: go on after the end of text, to max_tokens.")
    user: Hint = None
    # vLLM's, which its clients send with these values
    include_stop_str_in_output: NoFlag = None
    length_penalty: Annotated[Any, Neutral(1.0)] = None
    priority: NoNumber = None
    prompt_logprobs: Nothing = None
    skip_special_tokens: Annotated[Any, Neutral(True)] = None
    spaces_between_special_tokens: Annotated[Any, Neutral(True)] = None
    truncate_prompt_tokens: Nothing = None
    use_beam_search: NoFlag = None

    @model_validator(mode="after")
    def check_together(self) -> GenerationOptions:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed with stream: true", param="stream_options")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationOptions):
    prompt: Prompt
    max_tokens: int | None = Field(16, ge=0, lt=INT64)
    logprobs: int | None = Field(None, ge=0, le=5)
    add_special_tokens: bool | None = Field(True, description="Extension: what the tokenizer puts around a text.")
    best_of: Annotated[Any, Neutral(1)] = None
    echo: NoFlag = None
    suffix: Annotated[Any, Neutral("")] = None


class TextPart(Model):
    type: Literal["text"]
    text: Text


def only_text(value: Any) -> Any:
    """Name the kind of a content part that is not text: it is the mistake people make."""
    for part in value if isinstance(value, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise invalid(
                "only content parts of type 'text' are supported; this server takes text alone and opens no URL"
            )
    return value


Content = Annotated[
    Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)], BeforeValidator(only_text)
]


class ChatMessage(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(check_text)] | None = None
    refusal: Nothing = None
    audio: Nothing = None
    tool_calls: NoList = None
    function_call: Nothing = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it: one string, and the older name of the developer's role."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message | ({"name": self.name} if self.name else {})


def few_parts(value: Any) -> Any:
    """Bound the work of validation, which holds the interpreter lock: parts of all messages together."""
    if isinstance(value, list) and len(value) <= MAX_MESSAGES:
        contents = (message.get("content") for message in value if isinstance(message, dict))
        if sum(len(content) for content in contents if isinstance(content, list)) > MAX_PARTS:
            raise invalid(f"at most {MAX_PARTS} content parts in one request")
    return value


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), BeforeValidator(few_parts)
]


class TextFormat(Model):
    type: Literal["text"]


class TemplateOptions(Model):
    """Extensions, as vLLM's: what the chat template is told besides the messages."""

    add_generation_prompt: bool | None = Field(
        None, description="End with the opening of an answer (default: unless continue_final_message)."
    )
    continue_final_message: bool | None = Field(False, description="Leave the last message open, to be continued.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's template, such as enable_thinking."
    )

    @model_validator(mode="after")
    def check_opening(self) -> TemplateOptions:
        if self.add_generation_prompt and self.continue_final_message:
            param = "continue_final_message"
            raise invalid("a final message is continued, or an answer to it opened, not both", param=param)
        return self

    def template_arguments(self) -> dict[str, Any]:
        opened = self.add_generation_prompt
        return {
            "add_generation_prompt": not self.continue_final_message if opened is None else opened,
            "continue_final_message": bool(self.continue_final_message),
        }


class ChatCompletionRequest(GenerationOptions, TemplateOptions):
    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra=needs_logprobs)

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    audio: Nothing = None
    function_call: Annotated[Any, Neutral("none", "auto")] = None
    functions: NoList = None
    metadata: NoObject = None
    modalities: Annotated[Any, Neutral(["text"])] = None
    moderation: Nothing = None
    parallel_tool_calls: Annotated[Any, Neutral(True, False)] = None
    prediction: Nothing = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Nothing = None
    reasoning_effort: Annotated[Any, Neutral("none")] = None
    safety_identifier: Hint = None
    service_tier: Annotated[Any, Neutral("auto", "default")] = None
    store: NoFlag = None
    tool_choice: Annotated[Any, Neutral("none", "auto")] = None
    tools: NoList = None
    verbosity: Annotated[Any, Neutral("medium")] = None
    web_search_options: Nothing = None

    @model_validator(mode="after")
    def check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is only allowed with logprobs: true", param="top_logprobs")
        return self


class TokenizeRequest(TemplateOptions):
    """Either a prompt or messages; messages pass the chat template."""

    model_config = ConfigDict(
        strict=True, extra="forbid", json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: str | None = Field(None, min_length=1, max_length=512)
    prompt: Text = ""
    messages: Messages = []
    add_special_tokens: bool = Field(True, description="For a prompt: what the tokenizer puts around it.")

    @model_validator(mode="after")
    def check_one(self) -> TokenizeRequest:
        if len({"prompt", "messages"} & self.model_fields_set) != 1:
            raise invalid("give either prompt or messages")
        return self


class DetokenizeRequest(Model):
    model: str | None = Field(None, min_length=1, max_length=512)
    tokens: TokenIds
