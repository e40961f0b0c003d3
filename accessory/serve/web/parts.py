"""What both pages are built of: how to sample, the line that says what happens, and the tab of experts."""

import asyncio
import html
from collections.abc import AsyncGenerator, Callable
from typing import Any

import gradio as gr

from accessory.generation.sampling import Sampling
from accessory.serve.dialogue import how_ended, usual_length
from accessory.serve.request import Busy, Engine, RankLost
from accessory.serve.web.answering import Answer, Answering
from accessory.serve.web.experts import coloured, colours, heatmap
from accessory.serve.web.session import Session

_NO_ANSWER = "<p>Ask something: this tab then shows which experts wrote the answer.</p>"
Update = dict[Any, Any]
"""Components and their new values."""


class SamplingControls:
    """How long an answer may be, and how it is chosen."""

    def __init__(self, max_seq_len: int) -> None:
        longest = max(1, max_seq_len - 2)
        default = usual_length(max_seq_len)
        self.length = gr.Slider(1, longest, value=default, step=1, label="Length", info="tokens of the answer at most")
        self.temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature", info="0: the most probable token; higher: more random"
        )
        self.top_p = gr.Slider(
            0, 1, value=0.95, step=0.01, label="Top-p", info="sample among the likeliest tokens with this sum"
        )

    @property
    def inputs(self) -> list[Any]:
        return [self.length, self.temperature, self.top_p]


def sampling_of(engine: Engine, length: Any, temperature: Any, top_p: Any, stop: tuple[str, ...] = ()) -> Sampling:
    """What the controls ask for; they may have been emptied.

    Raises:
        ValueError: naming the setting.
    """
    whole = int(length) if isinstance(length, float) and length.is_integer() else length
    sampling = Sampling(max_gen_len=whole, temperature=temperature, top_p=top_p, stop=stop)
    sampling.check(engine.args.max_seq_len)
    return sampling


def status(text: str = "", *, error: bool = False) -> str:
    """The line that says what happens, in HTML."""
    kind = "status error" if error else "status"
    return f"<p class='{kind}' role='{'alert' if error else 'status'}'>{html.escape(text)}</p>"


def header(title: str, engine: Engine) -> str:
    """What a page is and whose answers it shows, in HTML."""
    args = engine.args
    layers = f"{args.n_layers} layer{'' if args.n_layers == 1 else 's'}"
    layers += f"{'' if args.dense is None else f', {len(args.moe_layers)}'} of {args.moe.num_experts} experts"
    name = html.escape(engine.name)
    return f"<h1>{title}</h1><p class='model'>{name}: {layers}, {args.max_seq_len} tokens of context</p>"


def measured(answer: Answer, engine: Engine) -> str:
    """How far an answer is and how fast it came, for the status line."""
    if answer.first is None:
        if answer.finish is not None:
            return "Stopped before the first token."
        waits = engine.load.waiting > 0
        return "Waiting until another answer has ended ..." if waits else "The model reads ..."
    count = len(answer.tokens)
    ended = how_ended(answer.finish)
    tokens = f"{count} token{'' if count == 1 else 's'}"
    return f"{tokens}, {answer.tokens_per_second:.1f} tokens/s, the first after {answer.first:.2f} s{ended}"


def said(error: Exception) -> str:
    """An error as the status line says it."""
    text = str(error)
    if isinstance(error, RankLost):
        text = f"the model is gone: {text}"
    return status(text[:1].upper() + text[1:], error=True)


class ExpertsTab:
    """The experts of the last answer: their shares in every layer, and the text in their colours at one layer."""

    def __init__(self, engine: Engine, session: gr.State) -> None:
        self._engine = engine
        first, last = engine.args.moe_layers[0], engine.args.n_layers - 1
        with gr.Tab("Experts"):
            self.shares = gr.HTML(_NO_ANSWER, elem_id="shares")
            self.layer = gr.Slider(
                0, max(last, 1), value=first, step=1, label="Layer", visible=last > 0, elem_id="layer",
                info="of the colours below: each token has that of the expert with the greatest weight in this layer",
            )  # fmt: skip
            self.text = gr.HighlightedText(
                label="Answer", color_map=colours(engine.args.moe.num_experts), show_legend=True,
                show_inline_category=False, combine_adjacent=False, elem_id="coloured", interactive=False,
            )  # fmt: skip
        self.layer.change(
            self._recolour,
            [session, self.layer],
            self.text,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )

    @property
    def outputs(self) -> list[Any]:
        return [self.shares, self.text]

    def show(self, answer: Answer | None, layer: float | None) -> Update:
        """The components' values for an answer."""
        if answer is None or not answer.routes:
            return {self.shares: _NO_ANSWER, self.text: []}
        shares = heatmap(answer.routes, self._engine.args.moe.num_experts)
        layer = min(max(int(layer or 0), 0), self._engine.args.n_layers - 1)  # its field may be empty
        return {self.shares: shares, self.text: coloured(self._engine.tokenizer, answer, layer)}

    def _recolour(self, session: Session, layer: float | None) -> Any:
        return self.show(session.answer, layer)[self.text]


async def written(
    engine: Engine, session: Session, request: Callable[[], tuple[tuple[int, ...], Sampling]]
) -> AsyncGenerator[Answer | Exception, None]:
    """A tab's next answer as it grows; an exception in its place, as the last item, where there is none to come.

    The request ends when the iterator is closed, as gradio does when the tab is. At the end it is the session's answer.

    Args:
        request: gives the prompt's tokens and how to continue them; may raise ValueError. Called in a thread: while a
            long text is tokenised, other tabs' answers go on.
    """
    if session.busy:
        yield ValueError("an answer is being written: wait for it, or press Stop")
        return
    session.preparing = True
    refusal: Exception | None = None
    try:
        tokens, sampling = await asyncio.to_thread(request)
        running = session.running = Answering(engine, tokens, sampling)
    except (ValueError, Busy, RankLost) as error:
        refusal = error
    finally:
        session.preparing = False
    if refusal is not None:
        yield refusal
        return
    try:
        answer = running.answer
        while answer.finish is None:
            yield answer
            answer = await running.progress()
        session.answer = answer
        session.running = None
        yield answer
    except (RankLost, FloatingPointError) as error:
        yield error
    finally:
        session.running = None
        running.stop()
