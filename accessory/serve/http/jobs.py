"""What a request's fields mean to the engine: prompts as tokens, room for the answer, a seed for each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool

from accessory.generation.sampling import Sampling
from accessory.serve.http.errors import bad_request
from accessory.serve.http.generation import Job
from accessory.serve.http.schema import MOST_PROMPTS, Answering, ChatMessage, Ending
from accessory.serve.request import Engine
from accessory.text.chat import Ends, Message, Segment, ids_of
from accessory.text.forms import Form
from accessory.text.template import TemplateForm
from accessory.text.tokenizer import Tokenizer

# No vocabulary has longer tokens: what cannot fit for its characters alone need not be tokenised to be refused.
MOST_CHARACTERS_OF_A_TOKEN = 128
# What has more characters or tokens is prepared in a thread, so that other clients' streams go on.
LONG_TEXT = 4_000
SIZE_OF_A_MESSAGE = 40  # in characters of text: what a message costs that is put into a form
# Of prompts' tokens in one answer, alternatives counted: some 200 bytes each. One prompt may always have its own.
MOST_SCORES = 2_000_000

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a request.

    Attributes:
        room: tokens that its answer may have; 0: the prompt is only read.
        text: what stands before the answer's where the client asks for both.
    """

    tokens: Sequence[int]
    room: int
    text: str = ""


async def prepared(
    size: int, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The work's result; work of a large size is done in a thread."""
    if size < LONG_TEXT:
        return work(*args, **kwargs)
    return await run_in_threadpool(work, *args, **kwargs)


def encode_text(tokenizer: Tokenizer, text: str, *, bos: bool, limit: int, param: str) -> list[int]:
    """Token ids of a text.

    Raises:
        ApiError: it cannot fit into ``limit`` tokens, or has no UTF-8 form.
    """
    check_characters([text], limit, param)
    try:
        return tokenizer.encode(text, bos=bos, eos=False)
    except ValueError as error:
        raise bad_request(f"{param}: {error}", param) from error


async def prompt_of_chat(
    form: Form, messages: Sequence[ChatMessage], ending: Ending, *, limit: int
) -> tuple[list[int], Ends]:
    """Token ids of a chat, and where the answer to it ends.

    Raises:
        ApiError: it cannot fit into ``limit`` tokens, or the form cannot say it.
    """
    size = sum(len(message.text) + len(message.name or "") + SIZE_OF_A_MESSAGE for message in messages)
    if isinstance(form, TemplateForm):
        size = max(size, LONG_TEXT)  # another process renders it, which may take its time
    return await prepared(size, _prompt_of_chat, form, messages, ending, limit)


def _prompt_of_chat(form: Form, messages: Sequence[ChatMessage], ending: Ending, limit: int) -> tuple[list[int], Ends]:
    check_characters([f"{one.text}{one.name or ''}{one.thought}" for one in messages], limit, "messages")
    if len(messages) > limit:
        why = f"there are {len(messages)} messages, more than this model's context of {limit} tokens can hold"
        raise bad_request(why, "messages", "context_length_exceeded")
    chat = [_message(message) for message in messages]
    try:
        segments, ends = _segments(form, chat, ending)
        return ids_of(segments, form.tokenizer), ends
    except ValueError as error:
        advice = ""
        if chat[-1].role == "assistant" and not ending.continue_final_message:
            advice = "; to go on with the assistant's, set continue_final_message true, add_generation_prompt false"
        raise bad_request(f"messages: {error}{advice}", "messages") from error


def _message(message: ChatMessage) -> Message:
    # OpenAI's newer models call the system the developer.
    role = "system" if message.role == "developer" else message.role
    return Message(role, message.text, name=message.name, reasoning=message.thought)


def _segments(form: Form, chat: Sequence[Message], ending: Ending) -> tuple[list[Segment], Ends]:
    """The text of a chat. What leads an answer in is only looked for where the model is to begin one."""
    within = replace(form.ends, lead="")
    if ending.continue_final_message:
        segments = form.continued(chat)
        begun = chat[-1].content != "" or segments != form.segments(chat[:-1], ask=True)
        return segments, within if begun else form.ends
    if ending.add_generation_prompt is False:
        return form.unasked(chat), within
    return form.segments(chat, ask=True), form.ends


def check_characters(texts: Sequence[str], limit: int, param: str) -> None:
    """Refuse what cannot fit into ``limit`` tokens however it is cut; ApiError."""
    characters = sum(map(len, texts))
    if characters > MOST_CHARACTERS_OF_A_TOKEN * limit:
        raise bad_request(
            f"{param} has {characters} characters, more than this model's context of {limit} tokens can hold",
            param,
            "context_length_exceeded",
        )


def check_ids(tokenizer: Tokenizer, tokens: Sequence[int], param: str) -> None:
    """Refuse token ids that mean nothing; ApiError."""
    for token in tokens:
        try:
            tokenizer.is_control(token)
        except (ValueError, OverflowError) as error:
            message = f"{param} has the token {token}, and the vocabulary's are 0 to {tokenizer.n_words - 1}"
            raise bad_request(message, param) from error
        if token in tokenizer.gaps:
            raise bad_request(f"{param} has the token {token}, which is none of the vocabulary's", param)


def room(engine: Engine, tokens: Sequence[int], wanted: int | None, *, usual: int | None, param: str) -> int:
    """How many tokens an answer may have.

    Args:
        wanted: as the client says.
        usual: where it does not say; None: as many as fit.

    Raises:
        ApiError: prompt and answer do not fit into the context.
    """
    limit, length = engine.args.max_seq_len, len(tokens)
    if length + (1 if wanted is None else wanted) > limit:
        asked = "at least 1 of the answer" if wanted is None else f"{wanted} of the answer"
        raise bad_request(
            f"this model's context is {limit} tokens, and the prompt's {length} with {asked} are more: "
            "shorten the prompt or ask for fewer",
            param,
            "context_length_exceeded",
        )
    # The engine's own bound leaves room for two tokens of a prompt.
    return wanted if wanted is not None else min(limit - length, max(1, limit - 2), usual or limit)


def jobs_of(
    body: Answering,
    prompts: Sequence[Prompt],
    *,
    ends: Ends,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> list[Job]:
    """The answers that a request asks for: n for each prompt, those of one prompt one after another.

    Args:
        ends: where an answer ends beside what the client says.

    Raises:
        ApiError: too many.
    """
    n = body.n or 1
    if n * len(prompts) > MOST_PROMPTS:
        raise bad_request(f"{len(prompts)} prompts with n = {n} are more than {MOST_PROMPTS} answers", "n")
    if prompt_logprobs is not None and n * len(prompts) > 1:
        scores = n * sum(len(prompt.tokens) for prompt in prompts) * (1 + prompt_logprobs)
        if scores > MOST_SCORES:
            raise bad_request(
                f"echo with logprobs asks for {scores} scores of the prompts' tokens, and {MOST_SCORES} are given in "
                "one answer: send fewer prompts at once, or a smaller n or logprobs",
                "logprobs",
            )
    temperature = 1.0 if body.temperature is None else float(body.temperature)
    top_p = 1.0 if body.top_p is None else float(body.top_p)
    return [
        Job(
            tokens=prompt.tokens,
            sampling=Sampling.of(max(1, prompt.room), temperature, top_p, body.stops).with_ends(ends),
            reads_only=prompt.room == 0,
            # Answers to one prompt differ, and each is the same when it is asked for again.
            seed=None if body.seed is None else (body.seed + choice) % 2**63,
            logprobs=logprobs,
            # The scores of one prompt are the same for all its answers, but each shows them.
            prompt_logprobs=prompt_logprobs,
        )
        for prompt in prompts
        for choice in range(n)
    ]
