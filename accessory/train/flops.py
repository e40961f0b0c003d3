"""Arithmetic of a training step, and how much of it hardware could do: together the model-FLOPs use (MFU)."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from accessory.config import ModelArgs
from accessory.parallel.plan import parameter_shapes, share_of_tokens, split_of, trains
from accessory.train.options import RecomputePolicy


def flops_per_token(args: ModelArgs, length: float) -> float:
    """Floating-point operations of forward and backward pass for one token, as the model needs them.

    6 for each parameter of a product that the token goes through (top-k of the experts), 4 where it is frozen and so
    has no gradient, and 12 * layers * heads * head_dim for each position that the token attends to, on average
    length / 2 of its row (Chowdhery et al., 2022, PaLM, appendix B, https://arxiv.org/abs/2204.02311, whose figure has
    no causal mask); in a layer with a window fewer. Looking up the embedding costs none; norms, biases, rotary
    embedding and softmax are left out; what is computed again does not count.

    Args:
        length: tokens of a row.
    """
    active = sum((6 if trains(name, args) else 4) * numbers for name, numbers in _multiplied(args))
    return active + 12 * args.n_heads * args.head_dim * _positions(args, length)


def recomputed_per_token(args: ModelArgs, length: float, policy: RecomputePolicy) -> float:
    """The same of what `recompute_activations` computes again: forward passes of blocks, or of feed-forward parts."""
    if policy == "none":
        return 0.0
    part = "layers." if policy == "full" else ".feed_forward."
    products = sum(2 * numbers for name, numbers in _multiplied(args) if part in name)
    return products + (4 * args.n_heads * args.head_dim * _positions(args, length) if policy == "full" else 0.0)


def _multiplied(args: ModelArgs) -> Iterator[tuple[str, float]]:
    """Parameters of products, and how many of their numbers a token goes through."""
    for name, (*counts, width) in parameter_shapes(args.replace(quant=None)):
        row = split_of(name)
        if counts and row.kind not in ("embedding", "bias"):
            yield name, share_of_tokens(row, args) * math.prod(counts) * width


def _positions(args: ModelArgs, length: float) -> float:
    """To how many a token attends, in all layers."""
    return sum(_seen(length, args.window_of(layer)) for layer in range(args.n_layers))


def _seen(length: float, window: int | None) -> float:
    """Positions that a token attends to, on average over a row."""
    if window is None or window >= length:
        return length / 2
    return window - window**2 / (2 * length)


class Peaks(NamedTuple):
    """10^12 dense floating-point operations per second, accumulated in float32.

    Attributes:
        half: bfloat16 and float16 in tensor cores.
        tf32: TensorFloat-32 in tensor cores.
        single: float32 outside them.
    """

    half: float
    tf32: float
    single: float


# As NVIDIA publishes them, in data sheets and, for GeForce and RTX cards, in the appendices of its white papers on
# Ampere GA102, Ada and Blackwell. Where a sheet shows the rate with 2:4 sparsity alone, it is half of that. The first
# pattern that is found in the card's name rules.
_PEAKS: tuple[tuple[str, Peaks], ...] = (
    (r"\bB200\b", Peaks(2250, 1125, 75)),
    (r"\b(H100|H200) NVL\b", Peaks(835.5, 417.5, 60)),
    (r"\b(H100|H800) PCIe\b", Peaks(756, 378, 51)),
    (r"\b(H100|H200|H800|GH200)\b", Peaks(989.4, 494.7, 67)),
    (r"\bH20\b", Peaks(148, 74, 44)),
    (r"\b(A100|A800)\b", Peaks(312, 156, 19.5)),
    (r"\bA40\b", Peaks(149.7, 74.8, 37.4)),
    (r"\bA30\b", Peaks(165, 82, 10.3)),
    (r"\bA10\b", Peaks(125, 62.5, 31.2)),
    (r"\bL40S\b", Peaks(362.05, 183, 91.6)),
    (r"\bL40\b", Peaks(181.05, 90.5, 90.5)),
    (r"\bL4\b", Peaks(121, 60, 30.3)),
    (r"\bRTX 6000 Ada\b", Peaks(364.2, 182.1, 91.1)),
    (r"\bRTX A6000\b", Peaks(154.8, 77.4, 38.7)),
    (r"\bRTX 5090\b", Peaks(209.5, 104.8, 104.8)),
    (r"\bRTX 4090\b", Peaks(165.2, 82.6, 82.6)),
    (r"\bRTX 3090 Ti\b", Peaks(80, 40, 40)),
    (r"\bRTX 3090\b", Peaks(71, 35.6, 35.6)),
)
# Other chips, or parts of one, under the same names.
_OTHER_CHIPS = re.compile(r"\b(MIG|Laptop|Mobile|Max-Q|D)\b")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense operations per second that the hardware promises for products in ``dtype``; None where not known.

    float32 means TensorFloat-32 where torch.set_float32_matmul_precision allows it.
    """
    if device.type != "cuda":
        return None
    return peak_of_card(torch.cuda.get_device_name(device), dtype)


def peak_of_card(name: str, dtype: torch.dtype) -> float | None:
    """As `peak_flops`, for a card of this name as the driver tells it."""
    if _OTHER_CHIPS.search(name):
        return None
    for pattern, peaks in _PEAKS:
        if re.search(pattern, name):
            if dtype in (torch.bfloat16, torch.float16):
                return peaks.half * 1e12
            if dtype == torch.float32:
                allowed = torch.get_float32_matmul_precision() != "highest"
                return (peaks.tf32 if allowed else peaks.single) * 1e12
    return None
