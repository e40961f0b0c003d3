"""POST /v1/chat/completions: messages, put into the model's own form, are answered."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from accessory.serve.http.access import account_of
from accessory.serve.http.answers import ChatCompletion, usage_of
from accessory.serve.http.documented import FAILURES, with_stream
from accessory.serve.http.generation import Generation, Job, unless_gone
from accessory.serve.http.jobs import Prompt, jobs_of, prompt_of_chat, room
from accessory.serve.http.schema import ChatRequest
from accessory.serve.http.state import ServerState, state_of
from accessory.serve.http.streams import EventStream
from accessory.serve.http.texts import AnswerText, ChatScores, ScoredToken

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=with_stream(FAILURES))
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer the last message of a chat."""
    state = state_of(request)
    state.check_model(body.model)
    limit = state.engine.args.max_seq_len
    tokens, ends = await prompt_of_chat(state.form, body.messages, body, limit=limit)
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    length = room(state.engine, tokens, wanted, usual=None, param="messages")
    jobs = jobs_of(
        body,
        [Prompt(tokens=tokens, room=length)],
        ends=ends,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    account = account_of(request.scope)
    account.prompt_tokens = len(tokens)
    generation = state.generations.begin(state.engine, jobs, account)
    answer = _Answer(state, body, jobs)
    generation.start()
    if body.stream:
        return EventStream(generation, answer.stream(generation))
    try:
        return JSONResponse(await unless_gone(request, lambda: answer.whole(generation)))
    finally:
        generation.close()


class _Answer:
    """Turns what an engine writes into objects of the API."""

    def __init__(self, state: ServerState, body: ChatRequest, jobs: Sequence[Job]) -> None:
        self._body, self._prompt_tokens = body, len(jobs[0].tokens)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": state.name}
        # The mark of a turn's end is the form's, not the answer's: neither its text nor its tokens are shown.
        self._follow = [AnswerText(state.texts, state.engine.tokenizer, job, show_end=False) for job in jobs]
        self._scored = [ChatScores(state.texts) for _ in self._follow]

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The finished answer."""
        parts: list[list[str]] = [[] for _ in self._follow]
        shown: list[list[ScoredToken]] = [[] for _ in self._follow]
        finish: list[str | None] = [None for _ in self._follow]
        async for index, event in generation.events():
            text, tokens = self._follow[index].push(event)
            parts[index].append(text)
            shown[index] += tokens
            finish[index] = event.finish
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
                "logprobs": self._scores(index, shown[index]),
                "finish_reason": finish[index],
            }
            for index, texts in enumerate(parts)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def stream(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """Its parts, while they are written."""
        for index in range(len(self._follow)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, [], None)
        async for index, event in generation.events():
            text, tokens = self._follow[index].push(event)
            if text or tokens:
                yield self._chunk(index, {"content": text}, tokens, None)
            if event.finish:
                yield self._chunk(index, {}, [], event.finish)
        if self._body.wants_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[ScoredToken], finish: str | None
    ) -> dict[str, Any]:
        scores = self._scores(index, tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish}
        usage = {"usage": None} if self._body.wants_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def _scores(self, index: int, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        return self._scored[index].of(tokens) if self._body.logprobs else None

    def _usage(self) -> dict[str, Any]:
        return usage_of(self._prompt_tokens, sum(follow.tokens for follow in self._follow))
