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
from accessory.text.instruction import format_prompt

SYSTEM_PROMPTS = ("alpaca", "None")


class SingleTurnPage:
    """An instruction, perhaps with an input, and the model's answer.

    Attributes:
        blocks: the page, for gradio to serve.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
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
            SYSTEM_PROMPTS, value="alpaca", label="System prompt",
            info="alpaca for models finetuned on it; None for a pretrained model, which continues the text",
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
            sampling = sampling_of(self._engine, length, temperature, top_p)
            prompt = format_prompt({"instruction": instruction, "input": given or ""}, system)
            tokens = self._engine.tokenizer.encode(prompt, bos=True, eos=False)
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
        update = {self._output: answer.text.lstrip(), self._status: status(measured(answer, self._engine))}
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
