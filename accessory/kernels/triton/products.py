"""Products on GPU by Triton kernels: those of kernels/products.py and quantized.py, under their names.

As on a CPU, few tokens in bfloat16 are taken in 8 bits where the weight is quantized (`activations.round_activations`);
but for groups of 32 inputs, too short for the tensor cores' products of integers. Very few of them are multiplied by
dot products of bytes (dots.py), the others on tensor cores (integers.py). All else stays float
(multiply.py), with float32 sums.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth, C bytes of two
codes, B blocks of activations that share a scale, G groups of a row.
"""

import functools
import logging
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.quant import QuantizedWeight

from ..activations import ACTIVATION_BLOCK, rounds_activations
from . import ptx
from .launch import (
    forms,
    in_chunks,
    launch,
    nf4_steps,
    nf4_table,
    pointed,
    power_of_two,
    round_inputs,
    split_inputs,
)

logger = logging.getLogger("accessory.kernels")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_GATHERED = 64  # pairs that a program multiplies with each tile of a weight
_SHORTEST_INTEGERS = 32  # of the depth: the least that tensor cores take of 8 bits


class Tile(NamedTuple):
    """What a program takes at a time.

    Attributes:
        rows: of the weight.
        depth: elements of a row, or bytes of two codes.
        warps: that share the work.
        stages: tiles on their way from memory at once.
    """

    rows: int
    depth: int
    warps: int
    stages: int


FEW = {
    "plain": Tile(128, 128, 4, 3),
    "int8": Tile(64, 128, 4, 4),
    "int4": Tile(64, 64, 4, 3),
    "nf4": Tile(64, 64, 4, 3),
}
INTEGERS = {
    "int8": Tile(128, 128, 4, 3),
    "int4": Tile(128, 64, 4, 4),
    "nf4": Tile(64, 64, 2, 4),
}
_PAIRS_OF_128_ROWS = 32  # at most, or sums and parts of sums fill the registers
MANY = {
    "plain": Tile(128, 64, 8, 3),
    "int8": Tile(64, 128, 4, 3),
    "int4": Tile(64, 64, 4, 3),
    "nf4": Tile(64, 64, 4, 3),
}
FLOAT32 = Tile(32, 32, 4, 2)  # no tensor cores, and so 16 pairs cost what 16 pairs cost
MANY_PAIRS = 128
PROGRAMS = 1024  # that are wanted at least: where rows are few, programs share their depth
_LEAST_TILES = 8  # of the depth for each of them: before the first one is there, a program waits
_FEW_TOKENS = 16  # up to which activations are taken in 8 bits, but for pairs with experts
_PLAIN_ROWS, _PLAIN_DEPTH = 8, 256
# Pairs up to which each reads its weight for itself, by dot products of bytes; pairs of one expert, and tokens, find it
# in the cache.
DOTS = {"gathered": 8, "dense": 4, "sorted": 0}


def available() -> bool:
    """Whether the Triton kernels serve (on GPU, in bfloat16, float16 and float32)."""
    return _kernels() is not None


def makes_plain(dtype: torch.dtype) -> bool:
    """Whether `plain_values` gives them in this dtype."""
    return dtype in DTYPES and available()


def serves(x_PD: Tensor, w: Tensor) -> bool:
    """Whether they serve such activations and such a weight, or codes of one."""
    return x_PD.dtype in DTYPES and w.stride(-1) == 1 and available()


def gathered_linear(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> Tensor:
    """y[p] = w[expert[p]] @ x[p], (P, R); a negative expert gives zeros, one that does not exist NaN."""
    return _gathered(x_PD, w_ERD, expert_P)


def few_token_linear(x_PD: Tensor, w_RD: Tensor) -> Tensor:
    """x @ w.T, (P, R)."""
    return _multiply(x_PD, w_RD[None], None, "dense")


def gathered_quantized_linear(x_PD: Tensor, weight: QuantizedWeight, expert_P: Tensor) -> Tensor:
    """`gathered_linear` for a quantized weight (E, R, D)."""
    return _gathered(x_PD, weight, expert_P)


def quantized_linear(x_PD: Tensor, weight: QuantizedWeight) -> Tensor:
    """`few_token_linear` for a quantized weight (R, D), and any number of tokens."""
    return _multiply(x_PD, weight.stacked(), None, "dense")


def grouped_quantized_linear(x_PD: Tensor, weight: QuantizedWeight, offsets_E: Tensor) -> Tensor:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix transposed, (P, R); zeros behind the last offset."""
    return _multiply(x_PD, weight, offsets_E, "sorted")


def plain_values(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The plain weight (..., R, D)."""
    codes, scale, zero = weight.codes, weight.scale, weight.zero
    y = torch.empty(weight.shape, dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    depth = codes.shape[-1]
    rows = codes.numel() // depth
    launch(
        forms().make_plain[(-(-rows // _PLAIN_ROWS), -(-depth // _PLAIN_DEPTH))],  # axis 1 ends at 65,535
        codes.contiguous(),
        scale.contiguous(),
        scale if zero is None else zero.contiguous(),
        nf4_table(codes.device, torch.float32),
        y,
        rows,
        depth,
        FORM=weight.format.triton,
        GROUP=depth // scale.shape[-1],
        ROWS=_PLAIN_ROWS,
        DEPTH=_PLAIN_DEPTH,
    )
    return y


def _gathered(x_PD: Tensor, weight: Tensor | QuantizedWeight, expert_P: Tensor) -> Tensor:
    parts = zip(x_PD.split(MOST_GATHERED), expert_P.split(MOST_GATHERED), strict=True)
    products = [_multiply(x, weight, expert, "gathered") for x, expert in parts]
    return products[0] if len(products) == 1 else torch.cat(products)


def _multiply(x_PD: Tensor, weight: Tensor | QuantizedWeight, index: Tensor | None, way: str) -> Tensor:
    """One product by the kernels `multiply`; ``index`` and ``way`` as they say."""
    quantized = None if isinstance(weight, Tensor) else weight
    w_ERD = weight if isinstance(weight, Tensor) else weight.codes
    pairs, (experts, rows, depth) = x_PD.shape[0], w_ERD.shape
    if 0 in (pairs, experts, rows, depth):  # such as a rank without experts
        return x_PD.new_zeros(pairs, rows)
    form = "plain" if quantized is None else str(quantized.format.triton)
    in_halves = quantized is not None and quantized.format.in_halves
    group = quantized.format.group // 2 if quantized is not None and in_halves else 1
    few = way == "gathered" or (way == "dense" and pairs <= _FEW_TOKENS)
    rounds = few and quantized is not None and rounds_activations(x_PD.dtype)
    rounds &= not in_halves or group >= _SHORTEST_INTEGERS
    if rounds and quantized is not None and pairs <= DOTS[way] and in_chunks(w_ERD):
        return _dots().multiply_dots(x_PD, quantized, index)
    own_pairs, tile = _tile(form, x_PD.dtype, pairs, way, INTEGERS if rounds else FEW if few else MANY)
    if rounds and not in_halves:
        group = ACTIVATION_BLOCK
    own_depth = max(tile.depth, group)
    tiles = {"gathered": experts, "dense": -(-pairs // own_pairs), "sorted": pairs // own_pairs + experts}[way]
    blocks = -(-rows // tile.rows)
    shares = 1 if way == "sorted" else _shares(blocks * min(pairs, tiles), -(-depth // own_depth))
    y_PR = x_PD.new_zeros(pairs, rows) if way == "sorted" else x_PD.new_empty(pairs, rows)
    into = y_PR if shares == 1 else y_PR.new_empty(shares, pairs, rows, dtype=torch.float32)
    constants: dict[str, Any] = {"WAY": way, "FORM": form, "GROUP": group, "WHOLE_TILES": depth % own_depth == 0}
    constants |= {"PAIRS": own_pairs, "ROWS": tile.rows, "DEPTH": own_depth}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    unused = into
    tensors, strides = pointed(w_ERD, quantized, unused)
    index = unused if index is None else index.contiguous()
    grid = (tiles, blocks, shares)
    if rounds and quantized is not None:
        ints_PD, x_scale_PB, x_sum_PG = round_inputs(x_PD, quantized.format, group)
        table = nf4_steps(x_PD.device) if form == "nf4" else unused
        constants["PTX"] = _ptx(form, None) if in_halves and x_PD.is_cuda else ""
        constants["BLOCK"] = ACTIVATION_BLOCK // (2 if in_halves else 1)
        own = (ints_PD, x_scale_PB, x_sum_PG, *tensors, table, index, into)
        sizes = (pairs, experts, rows, depth, x_scale_PB.shape[1])
        launch(_integers().multiply[grid], *own, *sizes, *strides, **constants)
    else:
        x_PD, x_sum_PG = split_inputs(x_PD, group) if in_halves else (x_PD.contiguous(), unused)
        table = nf4_table(x_PD.device, x_PD.dtype) if form == "nf4" else unused
        constants["FLOAT32"] = not x_PD.is_cuda
        constants["PTX"] = _ptx(form, x_PD.dtype) if in_halves and x_PD.is_cuda else ""
        constants["ALL_EXPERTS"] = power_of_two(experts) if way == "sorted" else 1
        launch(
            _loaded().multiply[grid],
            *(x_PD, *tensors, x_sum_PG, table, index, into),
            *(pairs, experts, rows, depth, *strides),
            **constants,
        )
    if shares > 1:
        launch(forms().add_shares[(-(-y_PR.numel() // 1024),)], into, y_PR, shares, y_PR.numel(), SIZE=1024)
    return y_PR


def _tile(form: str, dtype: torch.dtype, pairs: int, way: str, tiles: dict[str, Tile]) -> tuple[int, Tile]:
    """Pairs of a program, and what else it takes. Tensor cores take 16 pairs at least."""
    some = max(16, power_of_two(pairs))
    if dtype == torch.float32:
        return some if way == "gathered" else 16, FLOAT32
    tile = tiles[form]
    if tiles is INTEGERS and some > _PAIRS_OF_128_ROWS:
        tile = tile._replace(rows=min(64, tile.rows))
    return min(some, MANY_PAIRS), tile


def _shares(programs: int, tiles: int) -> int:
    """Among how many the depth of so many tiles is shared."""
    wanted = min(-(-PROGRAMS // programs), tiles // _LEAST_TILES)
    return 1 if wanted < 2 else 1 << (wanted.bit_length() - 1)


@functools.cache
def _ptx(form: str, dtype: torch.dtype | None) -> str:
    """The PTX for codes to become floats of 16 bits, or integers (None)."""
    if dtype is None:
        return ptx.to_integers(form)
    return "" if dtype == torch.float32 else ptx.to_floats(form, str(dtype).removeprefix("torch."))


def _dots() -> ModuleType:
    from . import dots

    return dots


def _integers() -> ModuleType:
    from . import integers

    return integers


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of the kernels, imported at the first product; None, said once, where Triton is not installed."""
    try:
        from . import multiply
    except ImportError as error:
        logger.warning("Triton does not load (%s). Decoding on GPU uses PyTorch's slower products.", error)
        return None
    return multiply


def _loaded() -> ModuleType:
    module = _kernels()
    if module is None:
        raise RuntimeError("the Triton kernels need Triton, which is not installed")
    return module
