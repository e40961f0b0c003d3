"""Rotary position embedding on interleaved pairs (Su et al., 2021, https://arxiv.org/abs/2104.09864).

Shape letters: T tokens, H heads (K: of keys), h width of a head.
"""

import torch
from torch import Tensor

from accessory import kernels


class RotaryTable:
    """Cosines and sines of every position up to a length, float32, as `rotate` wants them.

    Args:
        turned: so many of a head's first numbers turn, the others by the angle 0; None: all turn.
        scaling: factor on the positions (None: 1).
    """

    def __init__(
        self,
        head_dim: int,
        length: int,
        *,
        turned: int | None = None,
        theta: float,
        scaling: float | None,
        device: torch.device,
    ) -> None:
        turned = head_dim if turned is None else turned
        # float64 for the angles: at position 100,000 a float32 product is off by 0.004 radians.
        frequencies = float(theta) ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
        frequencies = torch.cat([frequencies, frequencies.new_zeros((head_dim - turned) // 2)])
        positions = torch.arange(length, dtype=torch.float64) * float(scaling or 1.0)
        angles = torch.outer(positions, frequencies)
        self.cos = angles.cos().repeat_interleave(2, dim=1).float().to(device)
        self.sin = torch.stack((-angles.sin(), angles.sin()), dim=-1).flatten(1).float().to(device)

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """For `rotate`, each (T, 1, h): the cosines, and the sines, negative for the first of a pair."""
        return self.cos[positions_T].unsqueeze(1), self.sin[positions_T].unsqueeze(1)


def rotate_both(q_THh: Tensor, k_TKh: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`rotate` for queries and keys, which are new and nobody else's: they may be overwritten."""
    if kernels.steps_serve(q_THh, k_TKh):
        return kernels.turn_heads(q_THh, k_TKh, rotation)
    if kernels.steps_natively(q_THh):
        return kernels.rotate_heads(q_THh, k_TKh, rotation)
    # Turned together: for few tokens the number of operations is what counts.
    q, k = rotate(torch.cat((q_THh, k_TKh), dim=1), rotation).split((q_THh.shape[1], k_TKh.shape[1]), dim=1)
    return q, k


def rotate(x_THh: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (2i, 2i+1) of every head by the token's angles; computed in float32."""
    cos, sin = rotation
    wide = x_THh.to(torch.float32, copy=True)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    # In place: on a CPU fresh memory for each intermediate costs more than the arithmetic.
    return wide.mul_(cos).add_(swapped.mul_(sin)).type_as(x_THh)
