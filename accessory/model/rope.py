"""Rotary position embedding on interleaved pairs (Su et al., 2021, https://arxiv.org/abs/2104.09864).

Shape letters: T tokens, H heads (K: of keys), h width of a head.
"""

import math

import torch
from torch import Tensor

from accessory.config import RopeArgs


class RotaryTable:
    """Cosines and sines of every position up to a length, float32, as `kernels.rotate` wants them.

    Args:
        turned: so many of a head's first numbers turn, the others by the angle 0; None: all turn.
        scaling: factor on the positions (None: 1).
        slowed: of `slowed_down`, of all frequencies.
    """

    def __init__(
        self,
        head_dim: int,
        length: int,
        *,
        turned: int | None = None,
        theta: float,
        scaling: float | None,
        slowed: RopeArgs | None = None,
        device: torch.device,
    ) -> None:
        turned = head_dim if turned is None else turned
        # float64 for the angles: at position 100,000 a float32 product is off by 0.004 radians.
        frequencies = float(theta) ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
        factor = torch.ones((head_dim // 2), dtype=torch.float64)
        if slowed is not None:
            frequencies = slowed_down(frequencies, slowed, theta=theta)
            factor[: turned // 2] = slowed.attention_factor if slowed.kind == "yarn" else 1.0
        frequencies = torch.cat([frequencies, frequencies.new_zeros((head_dim - turned) // 2)])
        positions = torch.arange(length, dtype=torch.float64) * float(scaling or 1.0)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self.cos = cos.repeat_interleave(2, dim=1).float().to(device)
        self.sin = torch.stack((-sin, sin), dim=-1).flatten(1).float().to(device)

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """For `kernels.rotate`, each (T, 1, h): the cosines, and the sines, negative for the first of a pair."""
        return self.cos[positions_T].unsqueeze(1), self.sin[positions_T].unsqueeze(1)


def slowed_down(frequencies: Tensor, own: RopeArgs, *, theta: float) -> Tensor:
    """Frequencies (float64, the fastest first) of which the slow ones are divided by a factor, and some by less.

    yarn:   share kept = 1 - (place - low) / (high - low), and 0 to 1; low and high are the places of what turns
            beta_fast and beta_slow times within the original length
    llama3: share kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), and 0 to 1
    """
    if own.kind == "llama3":
        turns = own.original * frequencies / (2 * math.pi)
        kept = (turns - own.low_freq_factor) / (own.high_freq_factor - own.low_freq_factor)
    else:
        width = 2 * len(frequencies)
        low, high = (
            width * math.log(own.original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (own.beta_fast, own.beta_slow)
        )
        if own.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        places = torch.arange(len(frequencies), dtype=torch.float64)
        kept = 1 - (places - low) / ((high - low) or 0.001)
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / own.factor * (1 - kept)
