"""A picture of how a model's experts share the tokens.

Shape letters: L layers, E experts.
"""

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from accessory.train.metrics import max_violation, without_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# More cells than this stay without numbers.
_NUMBERED_CELLS = 32 * 8


def draw(shares_LE: Tensor, *, title: str = "Tokens of each expert") -> bytes:
    """Draw the shares as a PNG: a row for each layer, a column for each expert.

    White is the even share, 1 / experts; red is more and blue is less, and none at all is crossed out. The row of a
    layer without pairs is grey. The title says MaxVio and how many experts got no token.

    Args:
        shares_LE: (layers, experts), each layer summing to 1; or zeros, where it has no experts.
    """
    # The object interface has no state that others might share; and who never draws need not wait for the import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    percent_LE: NDArray[np.float64] = 100 * shares_LE.detach().double().cpu().numpy()
    layers, experts = percent_LE.shape
    even = 100 / experts
    size = (min(4.5 + 0.5 * experts, 16), min(2 + 0.26 * layers, 20))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="lightgrey")
    scale = TwoSlopeNorm(even, vmin=0, vmax=max(2 * even, percent_LE.max()))
    empty_LE = np.broadcast_to(~percent_LE.any(-1, keepdims=True), percent_LE.shape)
    image = axes.imshow(
        np.ma.masked_array(percent_LE, empty_LE), cmap="RdBu_r", norm=scale, aspect="auto", interpolation="nearest"
    )
    dead_LE = without_tokens(shares_LE)
    if dead_LE.any():
        layers_N, experts_N = dead_LE.cpu().nonzero().T.tolist()
        axes.scatter(experts_N, layers_N, marker="x", s=12, color="black", linewidths=0.8)
    summary = f"MaxVio {max_violation(shares_LE):.3g}, {int(dead_LE.sum())} experts without tokens"
    axes.set_title(f"{title}\n% of the layer's pairs, even at {even:.3g}\n{summary}", fontsize="medium")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis, count in ((axes.xaxis, experts), (axes.yaxis, layers)):
        axis.set_major_locator(MaxNLocator(nbins=min(count, 32), integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, ax=axes, label="%")
    bar.ax.axhline(even, color="black", linewidth=1)
    if percent_LE.size <= _NUMBERED_CELLS:
        _write_numbers(axes, image, percent_LE)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write_numbers(axes: "Axes", image: "AxesImage", percent_LE: NDArray[np.float64]) -> None:
    # Brightness by Rec. 709's weights: black on light cells, white on dark ones.
    light_LE = image.to_rgba(percent_LE)[..., :3] @ np.array([0.2126, 0.7152, 0.0722]) > 0.45
    for (layer, expert), percent in np.ndenumerate(percent_LE):
        color = "black" if light_LE[layer, expert] else "white"
        number = axes.text(expert, layer, f"{percent:.1f}", ha="center", va="center", fontsize=8, color=color)
        number.set_in_layout(False)  # it lies inside the axes, and measuring it takes as long as drawing it
