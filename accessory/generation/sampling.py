"""Choosing the next token.

Shape letters: S sequences, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor

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
    """

    max_gen_len: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, max_gen_len: int, temperature: float, top_p: float, stop: Any) -> Self:
        """Take a user's arguments; `check` judges them. One string stands for a list of one."""
        symbols = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
        # The order means nothing, and that of a set differs between processes, whose requests must be alike.
        symbols = tuple(sorted(symbols, key=str))
        return cls(max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, stop=symbols)

    def check(self, max_seq_len: int) -> None:
        """Raise ValueError, naming the setting, where one makes no sense for such a context length."""
        if not isinstance(self.max_gen_len, Integral) or isinstance(self.max_gen_len, bool) or self.max_gen_len < 1:
            raise ValueError(f"max_gen_len must be a whole number of at least 1, not {self.max_gen_len!r}")
        if max_seq_len - self.max_gen_len < 2:
            raise ValueError(
                f"max_gen_len {self.max_gen_len} leaves no room for a prompt in max_seq_len {max_seq_len}: "
                f"ask for at most {max_seq_len - 2} tokens, or load the model with a larger max_seq_len"
            )
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, not {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must lie between 0 and 1, not {self.top_p!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop symbols must be non-empty strings, not {self.stop!r}")


def sample(logits_SV: Tensor, temperature: float, top_p: float) -> Tensor:
    """The next token of every sequence, (S,) int64; uses PyTorch's default generator of the logits' device.

    A sequence whose logits hold NaN or +infinity gets -1: nothing can be chosen from them.
    """
    broken_S = (logits_SV.isnan() | logits_SV.isposinf()).any(-1)
    tokens_S = _choose(logits_SV.nan_to_num(0.0, 0.0), temperature, top_p)
    return tokens_S.masked_fill(broken_S, -1)


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


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
