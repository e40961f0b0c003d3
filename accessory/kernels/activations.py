"""What few tokens meet in the products with quantized weights: 8-bit activations.

In bfloat16 the activations are taken in 8 bits too (`round_activations`), so that the CPU's integer dot products serve,
and so are the levels of nf4 (`Format.step`); in float32 both stay float. The Triton kernels on GPU do the same, but for
int4 in groups of 32, whose activations stay float there. In all formats sums are float32.

Many tokens: on a CPU with AMX likewise, and rows of 4-bit weights become 8-bit ones with 127 steps to the most that
they could hold (tiles_int8.cpp). Else, and for any number with a format that no kernel reads, blocks of rows are
made plain in a scratch that stays in the cache, and are multiplied as plain weights are.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_BLOCK = 128  # inputs that share a scale where activations have 8 bits; BLOCK in schedule.h
_TINY = 1e-36  # activations below it count as 0: the inverse of their scale overflows


def rounds_activations(dtype: torch.dtype) -> bool:
    """Whether products of few tokens take activations of this dtype in 8 bits."""
    return dtype == torch.bfloat16


def round_activations(x_PD: Tensor) -> Tensor:
    """What 8 bits leave of activations (P, D), in float32: 128 neighbours share a scale, and keep 127 steps each way.

    So a large activation harms only its neighbours, and ranks that hold whole blocks of a row agree without a word.
    """
    padded = F.pad(x_PD.float(), (0, -x_PD.shape[1] % ACTIVATION_BLOCK)).unflatten(1, (-1, ACTIVATION_BLOCK))
    largest = padded.abs().amax(-1, keepdim=True) if padded.numel() else padded[..., :1]
    most = torch.full_like(largest, 127)  # a tensor: with a number, PyTorch multiplies by an inverse of its own
    inverse = torch.where(largest > _TINY, most / largest, 0.0)
    return ((padded * inverse).round() * (largest / most)).flatten(1)[:, : x_PD.shape[1]]
