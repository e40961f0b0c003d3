"""Launching Triton kernels, and what those of the products read beside a weight: activations and tables.

Shape letters as in products.py.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from accessory.quant import Format, QuantizedWeight
from accessory.quant.formats import NF4, NF4_STEP

from ..activations import ACTIVATION_BLOCK


def round_inputs(x_PD: Tensor, own: Format, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations in 8 bits (P, D), or (2, P, D / 2), their scales (P, B), and the sums of groups of bytes (P, G)."""
    pairs, depth = x_PD.shape
    halves = own.in_halves
    if x_PD.stride(1) != 1:
        x_PD = x_PD.contiguous()
    blocks = -(-depth // ACTIVATION_BLOCK)
    ints_PD = x_PD.new_empty(pairs, depth, dtype=torch.int8)
    scale_PB = x_PD.new_empty(pairs, blocks, dtype=torch.float32)
    sum_PG = x_PD.new_empty(pairs, depth // (2 * group) if halves else 1, dtype=torch.float32)
    launch(
        forms().round_inputs[(pairs, blocks)],
        *(x_PD, ints_PD, scale_PB, sum_PG, pairs, depth, blocks, x_PD.stride(0)),
        STEP=own.step,
        HALVES=halves,
        GROUPS=ACTIVATION_BLOCK // (2 * group) if halves else 1,
        BLOCK=ACTIVATION_BLOCK,
        enable_fp_fusion=False,  # a product and a sum as one would round once where the reference rounds twice
    )
    return ints_PD, scale_PB, sum_PG


def split_inputs(x_PD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Even and odd inputs (2, P, C), and the float32 sums of every group of so many bytes (P, G)."""
    pairs, depth = x_PD.shape[0], x_PD.shape[1] // 2
    groups = depth // group
    split_2PC = x_PD.new_empty(2, pairs, depth)
    sum_PG = x_PD.new_empty(pairs, groups, dtype=torch.float32)
    at_once = min(32, power_of_two(groups))
    kernel = forms().split_inputs[(pairs, -(-groups // at_once))]
    launch(kernel, x_PD.contiguous(), split_2PC, sum_PG, pairs, depth, GROUP=group, GROUPS=at_once)
    return split_2PC, sum_PG


def launch(kernel: Callable[..., Any], first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel with its grid."""
    with torch.cuda.device_of(first):  # Triton launches on the current GPU, whichever holds the tensors
        kernel(first, *arguments, **constants)


def pointed(
    w_ERD: Tensor, weight: QuantizedWeight | None, unused: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    """A plain weight, or the codes of a quantized one, and the latter's tensors, with their strides, as the kernels'
    arguments."""
    scale, zero = (None, None) if weight is None else (weight.scale, weight.zero)
    of_scales = (stride for part in (scale, zero) for stride in ((0, 0, 0) if part is None else part.stride()))
    whole = (w_ERD, unused if scale is None else scale, unused if zero is None else zero)
    return whole, (*w_ERD.stride()[:2], *of_scales)


def in_chunks(w_ERD: Tensor) -> bool:
    """Whether every row of codes lies and begins in whole chunks of 16 bytes."""
    return all(number % 16 == 0 for number in (w_ERD.data_ptr(), *w_ERD.stride()[:-1], w_ERD.shape[-1]))


def power_of_two(number: int) -> int:
    """The least that is not below it."""
    return 1 << (number - 1).bit_length()


@functools.cache
def nf4_steps(device: torch.device) -> Tensor:
    """The levels counted in steps, int8."""
    with torch.inference_mode(False):
        return (torch.tensor(NF4, dtype=torch.float32) / NF4_STEP).round().to(torch.int8).to(device)


@functools.cache
def nf4_halves(device: torch.device) -> Tensor:
    """The levels in steps as dots.py reads them: minus the first 8, then the last 8, int32 words of four int8."""
    steps = nf4_steps(torch.device("cpu"))
    with torch.inference_mode(False):
        return torch.cat((-steps[:8], steps[8:])).view(torch.int32).to(device)


@functools.cache
def nf4_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The levels, rounded to a dtype, in float32."""
    with torch.inference_mode(False):  # kept, so it must serve outside of that mode too
        return torch.tensor(NF4, dtype=torch.float32, device=device).to(dtype).float()


def forms() -> ModuleType:
    """The module of the small kernels around the products."""
    from . import forms

    return forms
