"""Products with quantized weights, and their plain values: what `accessory.quant` stands on.

A quantized weight is two or three tensors, the last axis of each along the inputs. In all formats sums are float32.

=====  ============================  ===================================  ==========================================
form   codes                         scale                                a weight is
=====  ============================  ===================================  ==========================================
int8   int8 (..., R, D)              float32 (..., R, 1)                  code * scale
int4   uint8 (..., R, D / 2)         bfloat16 (..., R, D / group)         (code - zero / 16) * scale
nf4    uint8 (..., R, D / 2)         float32 (..., R, D / 64)             NF4[code] * scale
=====  ============================  ===================================  ==========================================

int4 also has ``zero``, uint8 (..., R, D / group). Two 4-bit codes share a byte, that of the even input in the upper
half. nf4 is the 4-bit NormalFloat of Dettmers et al., 2023 (https://arxiv.org/abs/2305.14314), section 3, with the
layout of bitsandbytes (its absmax is our scale).

Few tokens: in bfloat16 the activations are taken in 8 bits too (`round_activations`), so that the CPU's integer dot
products serve, and so are the levels of nf4 (`NF4_STEP`); in float32 both stay float. The Triton kernels on GPU do the
same, but for int4 in groups of 32, whose activations stay float there. Many tokens: on a CPU with AMX likewise, and
rows of 4-bit weights become 8-bit ones with 127 steps to the most that they could hold (tiles_int8.cpp); else blocks of
rows are made plain in a scratch that stays in the cache, and multiplied as plain weights are.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth, C codes of a
row, G groups of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_BLOCK = 128  # inputs that share a scale where activations have 8 bits; BLOCK in schedule.h
GROUPS = (32, 64)  # inputs that share a scale in int4
NF4_GROUP = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_STEP = 1 / 112.03  # of levels in 8 bits: that which moves them least, by 0.3 % of their root mean square
_TINY = 1e-36  # activations below it count as 0: the inverse of their scale overflows


def form_of(codes: Tensor, zero: Tensor | None) -> str:
    """'int8', 'int4' or 'nf4', by the tensors of a weight."""
    if codes.dtype == torch.int8:
        return "int8"
    return "nf4" if zero is None else "int4"


def depth_of(codes: Tensor) -> int:
    """How many inputs a weight has."""
    return codes.shape[-1] * (1 if codes.dtype == torch.int8 else 2)


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


def plain_values(
    codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, *, in_steps: bool = False
) -> Tensor:
    """The plain weight (..., R, D) in PyTorch alone, on any device: the twin of `dequantize`.

    Args:
        in_steps: with the levels of nf4 in 8 bits, as beside 8-bit activations.
    """
    if form_of(codes, zero) == "int8":
        return (codes * scale).to(dtype)
    codes = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(-2)
    group = codes.shape[-1] // scale.shape[-1] if scale.shape[-1] else 1
    if zero is None:
        table = torch.tensor(NF4, dtype=torch.float32, device=codes.device)
        if in_steps:
            table = (table / NF4_STEP).round() * NF4_STEP
        values = table[codes.int()].unflatten(-1, (-1, group))
    else:
        values = codes.unflatten(-1, (-1, group)) - zero.unsqueeze(-1).float() / 16
    return (values * scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def quantized_linear_reference(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor | None = None
) -> Tensor:
    """The plain twin of the native product with few tokens; without expert_P the weight is (R, D), not (E, R, D)."""
    rounds = rounds_activations(x_PD.dtype)
    x = round_activations(x_PD) if rounds else x_PD
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if expert_P is None:
        return F.linear(x, plain_values(codes, scale, zero, x.dtype, in_steps=rounds)).to(x_PD.dtype)
    if codes.shape[0] == 0:  # a rank without experts
        return x_PD.new_zeros(x_PD.shape[0], codes.shape[1])
    chosen = expert_P.clamp(min=0)
    own = (codes[chosen], scale[chosen], None if zero is None else zero[chosen])
    w_PRD = plain_values(*own, x.dtype, in_steps=rounds)
    y_PR = torch.bmm(w_PRD, x.unsqueeze(-1)).squeeze(-1)
    return y_PR.masked_fill((expert_P < 0).unsqueeze(-1), 0).to(x_PD.dtype)
