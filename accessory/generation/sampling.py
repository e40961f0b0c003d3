"""Choosing the next token.

Shape letters: S sequences, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor

from accessory.text.chat import Ends

# A lower temperature is as good as 0, and dividing by it could overflow.
_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a completion is chosen and where it ends.

    Attributes:
        max_gen_len: tokens at most.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: sample among the most probable tokens whose probabilities reach this sum (nucleus sampling,
            Holtzman et al., 2019, https://arxiv.org/abs/1904.09751); 0 keeps the best one, 1 keeps all.
        stop: strings that end the text; they are cut off.
        stop_ids: tokens that end it, beside the tokenizer's own end tokens; they have no text.
        lead, tail: what is taken away from its beginning, and from an end that a token made, as `Ends` has it.
    """

    max_gen_len: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    lead: str = ""
    tail: str = ""

    def __post_init__(self) -> None:
        # Tensors take no other kinds of numbers, such as fractions.
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, _as_float(getattr(self, name)))

    @classmethod
    def of(cls, max_gen_len: int, temperature: float, top_p: float, stop: Any) -> Self:
        """Take a user's arguments; `check` judges them. One string stands for a list of one."""
        symbols = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
        # The order means nothing, and that of a set differs between processes, whose requests must be alike.
        symbols = tuple(sorted(symbols, key=str))
        return cls(max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, stop=symbols)

    def with_ends(self, ends: Ends) -> Self:
        """The same where an answer ends as the form of its prompt has it too, with the form's lead and tail."""
        stop, stop_ids = (*self.stop, *ends.stop), (*self.stop_ids, *ends.stop_ids)
        return replace(self, stop=stop, stop_ids=stop_ids, lead=ends.lead, tail=ends.tail)

    def check(self, max_seq_len: int) -> None:
        """Raise ValueError, naming the setting, where one makes no sense for such a context length."""
        if not isinstance(self.max_gen_len, Integral) or isinstance(self.max_gen_len, bool) or self.max_gen_len < 1:
            raise ValueError(f"max_gen_len must be a whole number of at least 1, not {self.max_gen_len!r}")
        if max_seq_len - self.max_gen_len < 2:
            raise ValueError(
                f"max_gen_len {self.max_gen_len} leaves no room for a prompt in max_seq_len {max_seq_len}: "
                f"ask for at most {max_seq_len - 2} tokens, or load the model with a larger max_seq_len"
            )
        if not isinstance(self.temperature, float) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, not {self.temperature!r}")
        if not isinstance(self.top_p, float) or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must lie between 0 and 1, not {self.top_p!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop symbols must be non-empty strings, not {self.stop!r}")
        if not all(isinstance(token, Integral) and not isinstance(token, bool) for token in self.stop_ids):
            raise ValueError(f"stop_ids must be token ids, whole numbers, not {self.stop_ids!r}")


def sample(logits_SV: Tensor, temperature: float, top_p: float) -> Tensor:
    """The next token of every sequence, (S,) int64; uses PyTorch's default generator of the logits' device.

    A sequence whose logits hold NaN or +infinity, or nothing but -infinity, gets -1: nothing can be chosen from them.
    """
    broken_S = ~logits_SV.amax(-1).isfinite()
    tokens_S = _choose(logits_SV.masked_fill(broken_S[:, None], 0.0), temperature, top_p)
    return tokens_S.masked_fill(broken_S, -1)


def sample_each(logits_SV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """`sample` with settings and chance of their own for every sequence, in one go.

    Args:
        draws: for each sequence a number from [0, 1), which decides where chance does.
    """
    best_S, tokens_S = logits_SV.max(-1)
    drawn = [row for row, how in enumerate(samplings) if how.temperature >= _LEAST_TEMPERATURE and how.top_p > 0]
    if drawn:
        settings = [(samplings[row].temperature, samplings[row].top_p, draws[row]) for row in drawn]
        tokens_S[drawn] = _draw(logits_SV[drawn], settings)
    return tokens_S.masked_fill(~best_S.isfinite(), -1)


def not_finite() -> FloatingPointError:
    """The error for logits of which nothing can be chosen."""
    return FloatingPointError(
        "the model's logits are not finite: look for damaged weights with `accessory inspect --check-values`, "
        "or, in float16, load with dtype bf16 or fp32"
    )


def _draw(logits_SV: Tensor, settings: Sequence[tuple[float, float, float]]) -> Tensor:
    """One token for each row, by its temperature, top_p and number from [0, 1)."""
    temperature_S1, top_p_S1, draw_S1 = (
        torch.tensor(column, dtype=torch.float64, device=logits_SV.device)[:, None]
        for column in zip(*settings, strict=True)
    )
    probs_SV = torch.softmax(logits_SV.float() / temperature_S1.float(), dim=-1)
    tokens_SV = None
    if any(top_p < 1 for _, top_p, _ in settings):
        probs_SV, tokens_SV = probs_SV.sort(dim=-1, descending=True)
        # Rounded sums pass 1 before the end: a top_p of 1 keeps all.
        bound_S1 = top_p_S1.masked_fill(top_p_S1 == 1, float("inf"))
        probs_SV = probs_SV.masked_fill(probs_SV.cumsum(-1) - probs_SV > bound_S1, 0.0)
    sums_SV = probs_SV.double().cumsum(-1)
    total_S1 = sums_SV[:, -1:]
    target_S1 = torch.minimum(draw_S1 * total_S1, torch.nextafter(total_S1, torch.zeros_like(total_S1)))
    # The first whose sum passes the target: it has a probability of its own, whatever the draw.
    places_S1 = (sums_SV <= target_S1).sum(-1, keepdim=True)
    return (places_S1 if tokens_SV is None else tokens_SV.gather(-1, places_S1)).squeeze(-1)


def _choose(logits_SV: Tensor, temperature: float, top_p: float) -> Tensor:
    if temperature < _LEAST_TEMPERATURE:
        return logits_SV.argmax(-1)
    probs_SV = torch.softmax(logits_SV.float() / temperature, dim=-1)
    if top_p == 1:
        return torch.multinomial(probs_SV, 1).squeeze(-1)
    sorted_SV, tokens_SV = probs_SV.sort(dim=-1, descending=True)
    # A token stays while the sum before it has not passed top_p, so the best one always stays.
    before_SV = sorted_SV.cumsum(-1) - sorted_SV
    kept_SV = sorted_SV.masked_fill(before_SV > top_p, 0.0)
    return tokens_SV.gather(-1, torch.multinomial(kept_SV, 1)).squeeze(-1)


def _as_float(value: Any) -> Any:
    """A number as a float; anything else as it is, for `Sampling.check` to refuse."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return float("-inf" if value < 0 else "inf")
