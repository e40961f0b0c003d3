"""The page that answers one instruction."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from accessory.generation.sampling import Sampling
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
from accessory.text.chat import Message
from accessory.text.forms import AlpacaForm, Form

SYSTEM_PROMPTS = ("alpaca", "None")


class SingleTurnPage:
    """An instruction, perhaps with an input, and the model's answer.

    Args:
        form: in which the model was trained; it is offered first, where anything is known of that.

    Attributes:
        blocks: the page, for gradio to serve.
    """

    def __init__(self, engine: Engine, form: Form) -> None:
        self._engine = engine
        self._forms: dict[str, Form] = {}
        if isinstance(form, AlpacaForm):
            self._forms = {name: AlpacaForm(engine.tokenizer, (name,)) for name in form.prompt_types}
        elif not form.assumed:
            self._forms = {form.name: form}
        for name in SYSTEM_PROMPTS:
            self._forms.setdefault(name, AlpacaForm(engine.tokenizer, (name,)))
        with gr.Blocks(title=f"{engine.name}: single turn", analytics_enabled=False) as self.blocks:
            self._session = gr.State(Session())
            gr.HTML(header("Single turn", engine))
            with gr.Tab("Answer"), gr.Row(equal_height=False):
                with gr.Column():
                    self._build_inputs()
                with gr.Column():
                    self._output = gr.Textbox(
                        label="Answer", lines=12, max_lines=24, interactive=False, buttons=["copy"], elem_id="answer"
                    )
                    self._status = gr.HTML(status("Write an instruction and press Submit."))
            self._experts = ExpertsTab(engine, self._session)
            self._connect()

    def _build_inputs(self) -> None:
        self._instruction = gr.Textbox(
            label="Instruction", lines=4, max_lines=12, autofocus=True, elem_id="instruction"
        )
        self._input = gr.Textbox(
            label="Input", info="optional; the alpaca prompt alone has a place for it", lines=2, elem_id="given"
        )
        self._system = gr.Radio(
            list(self._forms), value=next(iter(self._forms)), label="System prompt",
            info="the first is what the model was trained on, where that is known; None continues the text as it is",
        )  # fmt: skip
        with gr.Row():
            self._submit = gr.Button("Submit", min_width=80, variant="primary")
            self._stop = gr.Button("Stop", min_width=80, variant="stop", interactive=False)
            self._clear = gr.Button("Clear", min_width=80)
        with gr.Accordion("Sampling", open=True):
            self._sampling = SamplingControls(self._engine.args.max_seq_len)

    def _connect(self) -> None:
        buttons = [self._submit, self._stop, self._clear]
        self._submit.click(
            self._ask,
            [self._session, self._instruction, self._input, self._system, *self._sampling.inputs, self._experts.layer],
            [self._output, self._status, *buttons, *self._experts.outputs],
            api_name="ask",
            concurrency_id="answers",
            concurrency_limit=None,
            show_progress="hidden",
        )
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self._stop.click(Session.stop, self._session, None, **quiet)
        inputs = [self._instruction, self._input]
        self._clear.click(
            self._empty, self._session, [*inputs, self._output, self._status, *self._experts.outputs], **quiet
        )

    async def _ask(
        self, session: Session, instruction: str, given: str, system: str, length: Any, temperature: Any, top_p: Any,
        layer: int,
    ) -> AsyncIterator[Update]:  # fmt: skip
        def request() -> tuple[tuple[int, ...], Sampling]:
            if not (instruction or "").strip():
                raise ValueError("the instruction is empty: write one")
            if system not in self._forms:
                raise ValueError(f"unknown system prompt {system!r}: take one of {', '.join(self._forms)}")
            form = self._forms[system]
            sampling = sampling_of(self._engine, length, temperature, top_p).with_ends(form.ends)
            tokens = form.prompt([Message("user", instruction, given=given or "")])
            room = self._engine.args.max_seq_len - sampling.max_gen_len
            if len(tokens) > room:
                raise ValueError(
                    f"the prompt has {len(tokens)} tokens, and there is room for {room} beside an answer of "
                    f"{sampling.max_gen_len}: shorten it, or choose a smaller length"
                )
            return tuple(tokens), sampling

        answers = written(self._engine, session, request)
        async with aclosing(answers):
            async for answer in answers:
                yield self._shown(answer, layer)

    def _shown(self, answer: Answer | Exception, layer: int) -> Update:
        if isinstance(answer, Exception):
            return {self._status: said(answer), **self._buttons(busy=False)}
        update = {self._output: answer.text, self._status: status(measured(answer, self._engine))}
        if answer.finish is not None:
            update |= self._experts.show(answer, layer)
        return {**update, **self._buttons(busy=answer.finish is None)}

    def _buttons(self, *, busy: bool) -> Update:
        idle = gr.update(interactive=not busy)
        return {self._submit: idle, self._clear: idle, self._stop: gr.update(interactive=busy)}

    def _empty(self, session: Session) -> Update:
        session.answer = None
        texts = {self._instruction: "", self._input: "", self._output: "", self._status: status()}
        return {**texts, **self._experts.show(None, 0)}
