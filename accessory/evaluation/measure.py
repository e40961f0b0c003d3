"""How well a model predicts given tokens: what training's validation and the command evaluate measure alike.

Shape letters: B rows, L length, T = B * L tokens, V vocabulary, N rows in all, E experts.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accessory.model.balance import RouterStats, load_balancing_loss
from accessory.model.cross_entropy import block_of
from accessory.model.meta import MetaModel
from accessory.parallel.ops import reduce_from_region
from accessory.parallel.state import ParallelState
from accessory.progress import showing

logger = logging.getLogger(__name__)

# Tokens of a rank's forward pass, padding among them; a longer row has one of its own.
PASS_TOKENS = 4096
_NAMED = 5  # rows without a finite loss that are named; the others are counted


class Rows(Protocol):
    """What is predicted: `rows[i]` is (token ids, which of them are scored: not 0), two arrays of one length."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.integer], NDArray[Any]]: ...

    def place(self, index: int, /) -> str:
        """Where a row is from, for messages."""


@dataclass(frozen=True)
class Measured:
    """What a model makes of some rows; equal on all ranks.

    Attributes:
        scores_N3: float64 (rows, 3): of each row the sum of its tokens' cross-entropy (natural logarithm), how many
            of them are the most probable one, and how many there are.
        balance_loss: the load-balancing loss over all tokens together, before its weight; 1 is even.
    """

    scores_N3: NDArray[np.float64]
    balance_loss: float

    @property
    def loss(self) -> float:
        """Mean over the scored tokens; NaN without any."""
        total, _, tokens = self.scores_N3.sum(0)
        return float(total / tokens) if tokens else math.nan

    @property
    def not_finite(self) -> list[int]:
        """The rows whose loss is no number."""
        return np.flatnonzero(~np.isfinite(self.scores_N3[:, 0])).tolist()

    def numbers(self) -> dict[str, float]:
        """loss, perplexity (its exponential), token_accuracy (share of greedy hits), balance_loss, tokens, records."""
        _, hits, tokens = self.scores_N3.sum(0)
        return {
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "token_accuracy": float(hits / tokens) if tokens else math.nan,
            "balance_loss": self.balance_loss,
            "tokens": int(tokens),
            "records": len(self.scores_N3),
        }

    def per_row(self, rows: Rows) -> Iterator[str]:
        """A line of JSON for each row: record (from 0), place, loss (null where it is no number), tokens, hits."""
        for index, (total, hits, tokens) in enumerate(self.scores_N3.tolist()):
            loss = total / tokens if tokens and math.isfinite(total) else None
            row = {"record": index, "place": rows.place(index), "loss": loss, "tokens": int(tokens), "hits": int(hits)}
            yield json.dumps(row, ensure_ascii=False) + "\n"


def perplexity(loss: float) -> float:
    """Exponential of a loss; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def measure(model: MetaModel, rows: Rows, *, state: ParallelState | None = None, shown: str = "") -> Measured:
    """Predict every scored token of the rows, each from all tokens before it in its row.

    Collective over all ranks of the model, data-parallel ones too: each takes its share of the rows, in equally many
    passes, the last of them without a row where they do not divide. The model is as before; dropout is off meanwhile,
    and no random number is drawn. A row counts the same wherever it is read: all sums are over the rows in their
    order, in float64.

    Args:
        rows: the same on every rank, each at most the model's max_seq_len long.
        state: whose data-parallel ranks share the rows, where each group of model-parallel ranks has loaded a model of
            its own; None: the model's.
        shown: what to call the work where its progress is shown; "": not at all.
    """
    state, trains = state or model.llma.state, model.training
    scores_N3 = torch.zeros(len(rows.lengths), 3, dtype=torch.float64, device=state.device)
    stats: RouterStats | None = None
    passes = list(_passes(rows.lengths, state.dp_size))
    model.eval()
    try:
        with showing(shown, len(passes), unit="passes", shown=bool(shown)) as work:
            for dealt in work.over(passes):
                own = dealt[state.dp_rank :: state.dp_size].tolist()
                scores_B3, found = _pass(model, [rows[index] for index in own])
                scores_N3[own] = scores_B3[: len(own)]
                # A float32 sum would lose count beyond 2^24 pairs.
                found = RouterStats(*(value.double() for value in found))
                stats = found if stats is None else RouterStats(*map(torch.add, stats, found))
    finally:
        model.train(trains)
    # Zeros come from all ranks but one. Model-parallel ranks hold equal values; should one compute otherwise, all must
    # judge the same numbers.
    scores_N3 = reduce_from_region(scores_N3, state.dp_group)
    scores_N3 = reduce_from_region(scores_N3, state.mp_group) / state.mp_size
    balance = math.nan
    if stats is not None:
        top_k = model.llma.args.moe.num_experts_per_tok
        balance = load_balancing_loss(stats.summed(state.dp_group), top_k).item()
    return Measured(scores_N3.cpu().numpy(), balance)


def name_not_finite(measured: Measured, rows: Rows) -> str:
    """Which rows have no finite loss; "" where all have one."""
    bad = measured.not_finite
    if not bad:
        return ""
    more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return f"the held-out loss is not finite at {', '.join(rows.place(index) for index in bad[:_NAMED])}{more}"


def _passes(lengths: NDArray[np.int64], ranks: int) -> Iterator[NDArray[np.int64]]:
    """The rows of each forward pass of all data-parallel ranks together, from long to short."""
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    begin = 0
    while begin < len(order):
        width = ranks * max(1, PASS_TOKENS // int(lengths[order[begin]]))
        yield order[begin : begin + width]
        begin += width


def _pass(model: MetaModel, rows: Sequence[tuple[NDArray[np.integer], NDArray[Any]]]) -> tuple[Tensor, RouterStats]:
    """Scores (B, 3) of the rows as `Measured` has them, and the router's statistics of their tokens.

    Without a row there is one of two uncounted tokens, so that this rank runs as the others do.
    """
    device = model.llma.state.device
    longest = max((len(tokens) for tokens, _ in rows), default=2)
    tokens_BL = torch.zeros(max(len(rows), 1), longest, dtype=torch.int64)
    scored_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)
    counted_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)
    for row, (tokens, scored) in enumerate(rows):
        tokens_BL[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        scored_BL[row, 1 : len(tokens)] = torch.from_numpy(np.asarray(scored[1:]) != 0)
        counted_BL[row, : len(tokens)] = True
    tokens_BL, scored_BL = tokens_BL.to(device), scored_BL.to(device)
    logits_BLV, stats = model.llma(tokens_BL, counted_BL.to(device))
    logits_TV = logits_BLV.flatten(0, 1)
    targets_T = tokens_BL.roll(-1, 1).flatten()  # the logits at a position are those of the next token
    predicts_T = scored_BL.roll(-1, 1).flatten()
    sums_T3 = torch.zeros(len(targets_T), 3, dtype=torch.float64, device=device)
    for places in predicts_T.nonzero().squeeze(1).split(block_of(logits_TV)):
        log_probs, targets = logits_TV[places].float().log_softmax(-1), targets_T[places]
        losses = -log_probs.gather(-1, targets[:, None]).squeeze(1).double()
        sums_T3[places] = torch.stack(
            [losses, (log_probs.argmax(-1) == targets).double(), torch.ones_like(losses)], dim=1
        )
    return sums_T3.unflatten(0, tokens_BL.shape).sum(1), stats
