"""What clients may ask, field by field.

Types are strict: "5" is no number and true is no 1. Fields of OpenAI's API that would change the answer and that this
server does not have are declared with the values that mean nothing; others are refused by name, not overlooked.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MOST_CHOICES = 128
MOST_PROMPTS = 2048
MOST_LOGPROBS = 20
MOST_STOPS = 16

Number = int | float


class WithoutEffect:
    """Marks a field that this server lacks: it takes null, or a value that asks for nothing.

    Args:
        advice: what else to do.
    """

    def __init__(self, *values: Any, advice: str = "leave it out") -> None:
        self.values, self.advice = values, advice

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, core_schema.any_schema())

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.values]}

    def _check(self, given: Any) -> Any:
        # To Python True is 1.
        if given is None or any((type(given) is bool, given) == (type(value) is bool, value) for value in self.values):
            return given
        raise PydanticCustomError(
            "unsupported_parameter", "this server does not support it: {advice}", {"advice": self.advice}
        )


_OWN_FORM = "chats are put into the form that it was started with, see --chat-template"
_OWN_TOKENS = "a chat's form has its own special tokens"

NoPenalty = Annotated[Any, WithoutEffect(0)]
NoList = Annotated[Any, WithoutEffect([])]
Nothing = Annotated[Any, WithoutEffect()]


def _inconsistent(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("inconsistent", "{message}", {"param": param, "message": message})


class Body(BaseModel):
    """A JSON object without fields beside those declared."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Answering(Body):
    """What both endpoints that generate share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # for the client's own records, as OpenAI has it
    presence_penalty: NoPenalty = None
    frequency_penalty: NoPenalty = None
    logit_bias: Annotated[Any, WithoutEffect({})] = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Answering":
        if self.stream_options is not None and not self.stream:
            raise _inconsistent("stream_options", "stream_options is about streams: set stream to true as well")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# A long list of wrong things makes one complaint, not one for each.
TokenList = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Several = Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)
Prompts = str | TokenList | Annotated[list[str], Several] | Annotated[list[TokenList], Several]


class CompletionRequest(Answering):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Annotated[Any, WithoutEffect("")] = None

    @model_validator(mode="after")
    def _nothing_new_needs_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise _inconsistent("max_tokens", "max_tokens is 0: ask for at least 1, or set echo to true for the prompt")
        return self

    @model_validator(mode="after")
    def _best_of_is_n(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _inconsistent(
                "best_of", "best_of: every answer that is written is returned; leave it out, or equal to n"
            )
        return self

    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Body):
    """A piece of a message; a string is one, too."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part: Any) -> Any:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            message = "this model reads text only: leave parts of type {type} out"
            raise PydanticCustomError("unsupported_parameter", message, {"type": part["type"]})
        return part


class ChatMessage(Body):
    """A message of a chat. Fields that clients copy from an answer may stand there, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    type: Literal["text"] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: Nothing = None
    audio: Nothing = None
    annotations: NoList = None
    tool_calls: NoList = None
    function_call: Nothing = None

    @property
    def text(self) -> str:
        # Parts are lines, as vLLM has them.
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)

    @property
    def thought(self) -> str:
        """What an answer's model had thought, under the name of either vLLM."""
        return self.reasoning_content or self.reasoning or ""


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class Ending(Body):
    """How the text of a chat ends, in vLLM's words. The form that it is put into is the server's."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[Any, WithoutEffect(advice=_OWN_FORM)] = None
    chat_template_kwargs: Annotated[Any, WithoutEffect({}, advice=_OWN_FORM)] = None

    @model_validator(mode="after")
    def _one_end(self) -> "Ending":
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise _inconsistent(
                "continue_final_message",
                "continue_final_message goes on with the last message, and add_generation_prompt (true unless told) "
                "begins another: set add_generation_prompt to false",
            )
        return self


class ChatRequest(Answering, Ending):
    """POST /v1/chat/completions."""

    messages: Messages
    add_special_tokens: Annotated[Any, WithoutEffect(False, advice=_OWN_TOKENS)] = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: NoList = None
    tool_choice: Annotated[Any, WithoutEffect("none", "auto")] = None
    functions: NoList = None
    function_call: Annotated[Any, WithoutEffect("none", "auto")] = None
    response_format: Annotated[Any, WithoutEffect({"type": "text"})] = None
    modalities: Annotated[Any, WithoutEffect(["text"])] = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Annotated[Any, WithoutEffect("none")] = None
    verbosity: Annotated[Any, WithoutEffect("medium")] = None
    web_search_options: Nothing = None
    # Of no effect on an answer without tools, or for OpenAI's own records.
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _one_meaning(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise _inconsistent("top_logprobs", "top_logprobs says how many to give: set logprobs to true as well")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise _inconsistent("max_tokens", "max_tokens and max_completion_tokens differ: give one of them")
        return self


class TokenizeRequest(Ending):
    """POST /tokenize, in vLLM's form: a text or a chat.

    Attributes:
        add_special_tokens: whether a text begins with the beginning-of-sequence token, as it does unless told.
    """

    prompt: str | None = None
    messages: Messages | None = None
    model: str | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _text_or_chat(self) -> "TokenizeRequest":
        if (self.prompt is None) is (self.messages is None):
            raise _inconsistent("prompt", "give either prompt, a text, or messages, a chat")
        if self.messages is not None and self.add_special_tokens:
            raise _inconsistent("add_special_tokens", f"add_special_tokens: {_OWN_TOKENS}, leave it out")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize, in vLLM's form."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
    model: str | None = None
