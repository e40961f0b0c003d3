"""What the server answers, field by field: the shapes of its OpenAPI page."""

from typing import Any, Literal

from pydantic import BaseModel

from accessory.generation.completion import Finish


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Scores of the tokens; the first of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer to a prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    """Answer of POST /v1/completions; a stream sends the same in parts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Scores of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a chat."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions; a stream sends `chat.completion.chunk` objects with a delta each."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Answer of GET /health while the model is ready."""

    status: Literal["ok"]


class Tokens(BaseModel):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Answer of GET /tokenizer_info."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str
    vocab_size: int
    chat_template: str


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The counts as `Usage` has them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
