"""Which experts wrote an answer: a table of their shares, and the text in their colours."""

import colorsys
from collections.abc import Sequence

from accessory.errors import counted
from accessory.generation.completion import end_ids
from accessory.generation.stopping import TextStream
from accessory.serve.web.answering import Answer, Route
from accessory.text.tokenizer import Tokenizer

# Beyond this many experts a cell shows its colour only.
_NUMBERED_EXPERTS = 16


def heatmap(routes: Sequence[Route], experts: int) -> str:
    """A table in HTML: for each layer that has experts, from the first to the last, how its tokens fell to them.

    A cell says what part of the layer's pairs of token and expert is this expert's; a row sums to 100 %.

    Args:
        routes: one for each token, (layers, top_k); at least one.
        experts: of a layer.
    """
    layers = len(routes[0])
    even = 1 / experts
    head = "".join(f"<th scope='col'>{expert}</th>" for expert in range(experts))
    rows = []
    for layer in range(layers):
        chosen = [expert for route in routes for expert in route[layer]]
        if not chosen:
            continue
        shares = [chosen.count(expert) / len(chosen) for expert in range(experts)]
        cells = "".join(_cell(share, even, layer, expert) for expert, share in enumerate(shares))
        rows.append(f"<tr><th scope='row'>{layer}</th>{cells}</tr>")
    caption = f"% of a layer's choices over {counted(len(routes), 'token')}; even would be {100 * even:.3g}"
    return (
        f"<table class='experts'><caption>{caption}</caption>"
        f"<thead><tr><th scope='col'>layer</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(share: float, even: float, layer: int, expert: int) -> str:
    number = f"{100 * share:.0f}" if even >= 1 / _NUMBERED_EXPERTS else ""
    # Above twice the even share all cells are of the strongest colour.
    strength = round(min(share / (2 * even), 1.0), 3)
    title = f"layer {layer}, expert {expert}: {100 * share:.1f} %"
    return f"<td style='--strength: {strength}' title='{title}'>{number}</td>"


def coloured(tokenizer: Tokenizer, answer: Answer, layer: int) -> list[tuple[str, str | None]]:
    """The answer's text in pieces, each with the name of the expert that took its token first in a layer.

    Tokens that make one character together make one piece, under the last one's expert. The last tokens have no
    expert: the model did not read them any more; nor has any in a layer without experts.
    """
    stream = TextStream(tokenizer, after=answer.prompt, lead=answer.sampling.lead)
    ends = end_ids(tokenizer, answer.sampling)
    pieces: list[tuple[str, str | None]] = []
    shown = 0
    for index, token in enumerate(answer.tokens):
        if shown == len(answer.text):
            break  # what follows ended the answer and was cut off
        if token not in ends:
            stream.push(token)
        text = answer.text[shown : len(stream.text)]
        shown += len(text)
        route = answer.routes[index] if index < len(answer.routes) else None
        if text:
            pieces.append((text, expert_name(route[layer][0]) if route is not None and route[layer] else None))
    if shown < len(answer.text):
        pieces.append((answer.text[shown:], None))
    return pieces


def expert_name(expert: int) -> str:
    """As the legend has it."""
    return f"expert {expert}"


def colours(experts: int) -> dict[str, str]:
    """A colour for each expert's name, evenly around the circle."""
    found = {}
    for expert in range(experts):
        red, green, blue = colorsys.hls_to_rgb(expert / experts, 0.55, 0.75)
        found[expert_name(expert)] = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    return found
