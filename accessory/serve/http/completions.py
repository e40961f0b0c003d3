"""POST /v1/completions: texts go on."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from accessory.generation.detokenizer import settled_text
from accessory.serve.http.access import account_of
from accessory.serve.http.answers import Completion, usage_of
from accessory.serve.http.documented import FAILURES, with_stream
from accessory.serve.http.generation import Generation, Job, unless_gone
from accessory.serve.http.jobs import Prompt, check_characters, check_ids, encode_text, jobs_of, prepared, room
from accessory.serve.http.schema import CompletionRequest
from accessory.serve.http.state import ServerState, state_of
from accessory.serve.http.streams import EventStream
from accessory.serve.http.texts import AnswerText, CompletionScores, ScoredToken
from accessory.serve.request import Event
from accessory.text.chat import Ends

router = APIRouter(tags=["OpenAI"])
USUAL_TOKENS = 16  # of an answer whose length the client does not say, as in OpenAI's API


@router.post("/v1/completions", response_model=Completion, responses=with_stream(FAILURES))
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Complete one prompt or several: texts, or token ids that are taken as they are."""
    state = state_of(request)
    state.check_model(body.model)
    given = body.prompts()
    prompts = await prepared(sum(map(len, given)), _prompts, state, body, given)
    jobs = jobs_of(
        body,
        prompts,
        ends=Ends(),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    account = account_of(request.scope)
    account.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
    generation = state.generations.begin(state.engine, jobs, account)
    answer = _Answer(state, body, prompts, jobs)
    generation.start()
    if body.stream:
        return EventStream(generation, answer.stream(generation))
    try:
        return JSONResponse(await unless_gone(request, lambda: answer.whole(generation)))
    finally:
        generation.close()


def _prompts(state: ServerState, body: CompletionRequest, given: Sequence[str | list[int]]) -> list[Prompt]:
    """Texts begin with the beginning-of-sequence token."""
    engine, tokenizer, limit = state.engine, state.engine.tokenizer, state.engine.args.max_seq_len
    check_characters([prompt for prompt in given if isinstance(prompt, str)], limit * len(given), "prompt")
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            text, tokens = prompt, encode_text(tokenizer, prompt, bos=True, limit=limit, param="prompt")
        else:
            check_ids(tokenizer, prompt[: limit + 1], "prompt")
            text, tokens = "", prompt
        length = room(engine, tokens, body.max_tokens, usual=USUAL_TOKENS, param="prompt")
        if not isinstance(prompt, str) and body.echo:
            # An answer's text goes on from what is settled.
            text = settled_text(tokenizer, prompt) if length else tokenizer.decode(prompt)
        prompts.append(Prompt(tokens=tokens, room=length, text=text))
    return prompts


@dataclass
class _Choice:
    """One answer, as far as it is written."""

    prompt: Prompt
    follow: AnswerText
    scores: CompletionScores
    parts: list[str] = field(default_factory=list)
    shown: list[ScoredToken] = field(default_factory=list)
    finish: str | None = None
    begun: bool = False


class _Answer:
    """Turns what an engine writes into objects of the API."""

    def __init__(
        self, state: ServerState, body: CompletionRequest, prompts: Sequence[Prompt], jobs: Sequence[Job]
    ) -> None:
        self._body, self._prompts = body, prompts
        self._scored = body.logprobs is not None
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.name,
        }
        self._choices = []
        for number, job in enumerate(jobs):
            follow = AnswerText(state.texts, state.engine.tokenizer, job, show_end=True)
            scores = CompletionScores(state.texts, lead=bool(body.echo))
            self._choices.append(_Choice(prompts[number // (body.n or 1)], follow, scores))

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished answer."""
        async for index, event in generation.events():
            choice = self._choices[index]
            text, shown = self._push(choice, event)
            choice.parts.append(text)
            choice.shown += shown
            choice.finish = event.finish
        choices = [
            self._choice(index, "".join(choice.parts), choice.shown, choice.finish)
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def stream(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """Its parts, while they are written."""
        usage = {"usage": None} if self._body.wants_usage else {}
        async for index, event in generation.events():
            text, shown = self._push(self._choices[index], event)
            if text or shown or event.finish:
                yield {**self._head, "choices": [self._choice(index, text, shown, event.finish)], **usage}
        if self._body.wants_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _push(self, choice: _Choice, event: Event) -> tuple[str, list[ScoredToken]]:
        text, shown = choice.follow.push(event)
        if self._body.echo and not choice.begun:
            choice.begun = True
            text = choice.prompt.text + text
            if event.prompt_scores:
                pairs = zip(choice.prompt.tokens, event.prompt_scores, strict=True)
                shown = [*(ScoredToken(token, score) for token, score in pairs), *shown]
        return text, shown

    def _choice(self, index: int, text: str, shown: Sequence[ScoredToken], finish: str | None) -> dict[str, Any]:
        scores = self._choices[index].scores.of(shown) if self._scored else None
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": finish}

    def _usage(self) -> dict[str, Any]:
        read = sum(len(prompt.tokens) for prompt in self._prompts)
        return usage_of(read, sum(choice.follow.tokens for choice in self._choices))
