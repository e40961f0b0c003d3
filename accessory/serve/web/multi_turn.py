"""The page that holds a dialogue."""

import html
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from accessory.generation.sampling import Sampling
from accessory.serve.dialogue import Turn, dialogue_prompt
from accessory.serve.request import Engine
from accessory.serve.web.answering import Answer
from accessory.serve.web.parts import (
    ExpertsTab,
    SamplingControls,
    Update,
    header,
    measured,
    said,
    sampling_of,
    status,
    written,
)
from accessory.serve.web.session import Session
from accessory.text.forms import Form


class MultiTurnPage:
    """A dialogue with the model.

    Args:
        form: how the dialogue is put to the model.

    Attributes:
        blocks: the page, for gradio to serve.
    """

    def __init__(self, engine: Engine, form: Form) -> None:
        self._engine, self._form = engine, form
        with gr.Blocks(title=f"{engine.name}: multi turn", analytics_enabled=False) as self.blocks:
            self._session = gr.State(Session())
            gr.HTML(header("Multi turn", engine))
            with gr.Tab("Dialogue"):
                self._build_dialogue()
            self._experts = ExpertsTab(engine, self._session)
            self._connect()

    def _build_dialogue(self) -> None:
        # Neither a user's text nor the model's is read as Markdown or LaTeX; `_messages` sees to HTML. No button copies
        # a message: it would copy what stands for its special characters.
        self._chatbot = gr.Chatbot(
            show_label=False, height=420, layout="bubble", render_markdown=False, latex_delimiters=[],
            sanitize_html=True, allow_tags=False, buttons=[], feedback_options=None, elem_id="chat",
        )  # fmt: skip
        self._question = gr.Textbox(
            show_label=False, placeholder="Write a question; Enter submits it", lines=1, max_lines=8, autofocus=True,
            elem_id="question",
        )  # fmt: skip
        self._status = gr.HTML(status())
        with gr.Row():
            self._submit = gr.Button("Submit", min_width=80, variant="primary")
            self._stop = gr.Button("Stop", min_width=80, variant="stop", interactive=False)
            self._retry = gr.Button("Retry", min_width=80, interactive=False)
            self._undo = gr.Button("Undo", min_width=80, interactive=False)
            self._clear = gr.Button("Clear", min_width=80)
        with gr.Accordion("Sampling", open=False):
            self._sampling = SamplingControls(self._engine.args.max_seq_len)

    def _connect(self) -> None:
        buttons = [self._submit, self._stop, self._retry, self._undo, self._clear]
        shown = [self._chatbot, self._question, self._status, *buttons]
        everything = [*shown, *self._experts.outputs]
        slow: dict[str, Any] = {"concurrency_id": "answers", "concurrency_limit": None, "show_progress": "hidden"}
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        sampling = [*self._sampling.inputs, self._experts.layer]
        asking = [self._submit.click, self._question.submit]
        gr.on(asking, self._ask, [self._session, self._question, *sampling], everything, api_name="ask", **slow)
        self._retry.click(self._again, [self._session, *sampling], everything, api_name="retry", **slow)
        self._undo.click(self._take_back, self._session, everything, **quiet)
        gr.on([self._clear.click, self._chatbot.clear], self._empty, self._session, everything, **quiet)
        self._stop.click(Session.stop, self._session, None, **quiet)

    async def _ask(
        self, session: Session, question: str, length: Any, temperature: Any, top_p: Any, layer: int
    ) -> AsyncIterator[Update]:
        updates = self._answered(session, session.turns, question or "", (length, temperature, top_p), layer)
        async with aclosing(updates):
            async for answer, update in updates:
                if isinstance(answer, Exception) or _nothing_came(answer):
                    update[self._question] = question
                elif not answer.tokens:  # later what is typed there is the next question
                    update[self._question] = ""
                yield update

    async def _again(
        self, session: Session, length: Any, temperature: Any, top_p: Any, layer: int
    ) -> AsyncIterator[Update]:
        if not session.turns:
            yield {self._status: said(ValueError("there is no answer to write again"))}
            return
        *before, (question, _) = session.turns
        updates = self._answered(session, before, question, (length, temperature, top_p), layer)
        async with aclosing(updates):
            async for _, update in updates:
                yield update

    async def _answered(
        self, session: Session, before: list[Turn], question: str, sampling_values: tuple[Any, Any, Any], layer: int
    ) -> AsyncGenerator[tuple[Answer | Exception, Update], None]:
        """A question's answer behind the turns ``before``, and the page with it; at the end they are the session's."""
        dropped = 0
        dialogue = session.turns  # another list takes its place when the dialogue is cleared meanwhile

        def request() -> tuple[tuple[int, ...], Sampling]:
            nonlocal dropped
            sampling = sampling_of(self._engine, *sampling_values)
            room = self._engine.args.max_seq_len - sampling.max_gen_len
            prompt = dialogue_prompt(self._form, before, question, room=room)
            dropped = prompt.dropped
            return prompt.tokens, sampling.with_ends(self._form.ends)

        answers = written(self._engine, session, request)
        async with aclosing(answers):
            async for answer in answers:
                if isinstance(answer, Exception):
                    yield answer, {self._status: said(answer), **self._dialogue(session)}
                    return
                turn = (question, answer.text)
                if answer.finish is None:
                    update = {self._chatbot: _messages([*before, turn]), **self._buttons(busy=True)}
                else:
                    if session.turns is dialogue and not _nothing_came(answer):
                        session.turns = [*before, turn]
                    update = {**self._dialogue(session), **self._experts.show(answer, layer)}
                line = measured(answer, self._engine) + _left_out(dropped)
                yield answer, {self._status: status(line), **update}

    def _take_back(self, session: Session) -> Update:
        if session.busy or not session.turns:
            return {self._status: said(ValueError("there is no turn to take back"))}
        question, _ = session.turns.pop()
        session.answer = None
        texts = {self._question: question, self._status: status("The last turn is taken back.")}
        return {**texts, **self._dialogue(session), **self._experts.show(None, 0)}

    def _empty(self, session: Session) -> Update:
        session.stop()
        session.turns, session.answer = [], None
        texts = {self._question: "", self._status: status()}
        return {**texts, **self._dialogue(session), **self._experts.show(None, 0)}

    def _dialogue(self, session: Session) -> Update:
        """The turns so far, with nothing being written."""
        return {self._chatbot: _messages(session.turns), **self._buttons(busy=False, turns=bool(session.turns))}

    def _buttons(self, *, busy: bool, turns: bool = False) -> Update:
        free, rewind = gr.update(interactive=not busy), gr.update(interactive=turns)
        stop = gr.update(interactive=busy)
        return {self._submit: free, self._clear: free, self._retry: rewind, self._undo: rewind, self._stop: stop}


def _nothing_came(answer: Answer) -> bool:
    """Whether an answer was stopped before it had any text."""
    return answer.finish == "cancelled" and not answer.text.strip()


def _left_out(dropped: int) -> str:
    if not dropped:
        return ""
    return f"; the oldest {'turn is' if dropped == 1 else f'{dropped} turns are'} left out, as the context is full"


def _messages(turns: list[Turn]) -> list[dict[str, Any]]:
    """As gradio's chatbot takes them.

    Without Markdown it still reads HTML, though a sanitized kind, so an image in a question would be fetched.
    """
    roles = ("user", "assistant")
    return [
        {"role": role, "content": {"type": "text", "text": html.escape(text, quote=False)}}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]
