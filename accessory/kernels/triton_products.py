"""Products on GPU by Triton kernels: `linear.py`'s and `quantized_ops.py`'s, under their names.

As on a CPU, few tokens in bfloat16 are taken in 8 bits where the weight is quantized (`quantized.round_activations`);
but for groups of 32 inputs, too short for the tensor cores' products of integers. All else stays float, with float32
sums.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth, C bytes of two
codes, B blocks of activations that share a scale, G groups of a row.
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_ptx
from .quantized import ACTIVATION_BLOCK, NF4, NF4_STEP, depth_of, form_of, rounds_activations

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


def triton_available() -> bool:
    """Whether the Triton kernels serve (on GPU, in bfloat16, float16 and float32)."""
    return _kernels() is not None


def triton_serves(x_PD: Tensor, *weight: Tensor | None) -> bool:
    """Whether they serve such activations and the tensors of such a weight, codes first."""
    return x_PD.dtype in DTYPES and weight[0] is not None and weight[0].stride(-1) == 1 and triton_available()


def gathered_linear(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> Tensor:
    """y[p] = w[expert[p]] @ x[p], (P, R); a negative expert gives zeros, one that does not exist NaN."""
    return _gathered(x_PD, w_ERD, None, None, expert_P)


def few_token_linear(x_PD: Tensor, w_RD: Tensor) -> Tensor:
    """x @ w.T, (P, R)."""
    return _multiply(x_PD, w_RD[None], None, None, None, "dense")


def gathered_quantized_linear(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor
) -> Tensor:
    """`gathered_linear` for a quantized weight (E, R, D)."""
    return _gathered(x_PD, codes, scale, zero, expert_P)


def quantized_linear(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """`few_token_linear` for a quantized weight (R, D), and any number of tokens."""
    return _multiply(x_PD, codes[None], scale[None], None if zero is None else zero[None], None, "dense")


def grouped_quantized_linear(x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, ends_E: Tensor) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times expert e's matrix transposed, (P, R); zeros behind the last end."""
    return _multiply(x_PD, codes, scale, zero, ends_E, "sorted")


def plain_values(codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The plain weight (..., R, D)."""
    form, depth = form_of(codes, zero), codes.shape[-1]
    y = torch.empty(*codes.shape[:-1], depth_of(codes), dtype=dtype, device=codes.device)
    if y.numel() == 0:
        return y
    rows = codes.numel() // depth
    launch(
        _forms().make_plain[(-(-rows // _PLAIN_ROWS), -(-depth // _PLAIN_DEPTH))],  # axis 1 ends at 65,535
        codes.contiguous(),
        scale.contiguous(),
        scale if zero is None else zero.contiguous(),
        _nf4_table(codes.device, torch.float32),
        y,
        rows,
        depth,
        FORM=form,
        GROUP=max(1, depth // scale.shape[-1]),
        ROWS=_PLAIN_ROWS,
        DEPTH=_PLAIN_DEPTH,
    )
    return y


def _gathered(x_PD: Tensor, w_ERD: Tensor, scale: Tensor | None, zero: Tensor | None, expert_P: Tensor) -> Tensor:
    parts = zip(x_PD.split(MOST_GATHERED), expert_P.split(MOST_GATHERED), strict=True)
    products = [_multiply(x, w_ERD, scale, zero, expert, "gathered") for x, expert in parts]
    return products[0] if len(products) == 1 else torch.cat(products)


def _multiply(
    x_PD: Tensor, w_ERD: Tensor, scale: Tensor | None, zero: Tensor | None, index: Tensor | None, way: str
) -> Tensor:
    """One product by the kernels `multiply`; ``index`` and ``way`` as they say."""
    pairs, (experts, rows, depth) = x_PD.shape[0], w_ERD.shape
    if 0 in (pairs, experts, rows, depth):  # such as a rank without experts
        return x_PD.new_zeros(pairs, rows)
    form = "plain" if scale is None else form_of(w_ERD, zero)
    in_halves = form in ("int4", "nf4")
    group = depth // scale.shape[-1] if scale is not None and in_halves else 1
    few = way == "gathered" or (way == "dense" and pairs <= _FEW_TOKENS)
    in_integers = (
        scale is not None and rounds_activations(x_PD.dtype) and (not in_halves or group >= _SHORTEST_INTEGERS)
    )
    rounds = few and in_integers
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
    of_scales = (stride for part in (scale, zero) for stride in ((0, 0, 0) if part is None else part.stride()))
    strides = (*w_ERD.stride()[:2], *of_scales)
    weight = (w_ERD, *(unused if part is None else part for part in (scale, zero)))
    index = unused if index is None else index.contiguous()
    grid = (tiles, blocks, shares)
    if rounds:
        ints_PD, x_scale_PB, x_sum_PG = _round_inputs(x_PD, form, group)
        table = _nf4_steps(x_PD.device) if form == "nf4" else unused
        own = (ints_PD, x_scale_PB, x_sum_PG, *weight, table, index, into)
        constants["PTX"] = _ptx(form, None) if in_halves and x_PD.is_cuda else ""
        constants["BLOCK"] = ACTIVATION_BLOCK // (2 if in_halves else 1)
        sizes = (pairs, experts, rows, depth, x_scale_PB.shape[1])
        launch(_integers().multiply[grid], *own, *sizes, *strides, **constants)
    else:
        x_PD, x_sum_PG = _split_inputs(x_PD, group) if in_halves else (x_PD.contiguous(), unused)
        table = _nf4_table(x_PD.device, x_PD.dtype) if form == "nf4" else unused
        own = (x_PD, *weight, x_sum_PG, table, index, into)
        constants["FLOAT32"] = not x_PD.is_cuda
        constants["PTX"] = _ptx(form, x_PD.dtype) if in_halves and x_PD.is_cuda else ""
        constants["ALL_EXPERTS"] = power_of_two(experts) if way == "sorted" else 1
        launch(_loaded().multiply[grid], *own, pairs, experts, rows, depth, *strides, **constants)
    if shares > 1:
        launch(_forms().add_shares[(-(-y_PR.numel() // 1024),)], into, y_PR, shares, y_PR.numel(), SIZE=1024)
    return y_PR


def _tile(form: str, dtype: torch.dtype, pairs: int, way: str, tiles: dict[str, Tile]) -> tuple[int, Tile]:
    """Pairs of a program, and what else it takes. Tensor cores take 16 pairs at least."""
    some = max(16, power_of_two(pairs))
    if dtype == torch.float32:
        return some if way == "gathered" else 16, FLOAT32
    return min(some, MANY_PAIRS), tiles[form]


def _shares(programs: int, tiles: int) -> int:
    """Among how many the depth of so many tiles is shared."""
    wanted = min(-(-PROGRAMS // programs), tiles // _LEAST_TILES)
    return 1 if wanted < 2 else 1 << (wanted.bit_length() - 1)


def _round_inputs(x_PD: Tensor, form: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations in 8 bits (P, D), or (2, P, D / 2), their scales (P, B), and sums of groups (P, G)."""
    pairs, depth = x_PD.shape
    halves = form != "int8"
    if x_PD.stride(1) != 1:
        x_PD = x_PD.contiguous()
    blocks = -(-depth // ACTIVATION_BLOCK)
    ints_PD = x_PD.new_empty(pairs, depth, dtype=torch.int8)
    scale_PB = x_PD.new_empty(pairs, blocks, dtype=torch.float32)
    sum_PG = x_PD.new_empty(pairs, depth // (2 * group) if halves else 1, dtype=torch.float32)
    launch(
        _forms().round_inputs[(pairs, blocks)],
        *(x_PD, ints_PD, scale_PB, sum_PG, pairs, depth, blocks, x_PD.stride(0)),
        STEP=NF4_STEP if form == "nf4" else 1.0,
        HALVES=halves,
        GROUPS=ACTIVATION_BLOCK // (2 * group) if halves else 1,
        BLOCK=ACTIVATION_BLOCK,
        enable_fp_fusion=False,  # a product and a sum as one operation would round once where the twin rounds twice
    )
    return ints_PD, scale_PB, sum_PG


def _split_inputs(x_PD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Even and odd inputs (2, P, C), and the float32 sums of every group of so many bytes (P, G)."""
    pairs, depth = x_PD.shape[0], x_PD.shape[1] // 2
    groups = depth // group
    split_2PC = x_PD.new_empty(2, pairs, depth)
    sum_PG = x_PD.new_empty(pairs, groups, dtype=torch.float32)
    at_once = min(32, power_of_two(groups))
    kernel = _forms().split_inputs[(pairs, -(-groups // at_once))]
    launch(kernel, x_PD.contiguous(), split_2PC, sum_PG, pairs, depth, GROUP=group, GROUPS=at_once)
    return split_2PC, sum_PG


def launch(kernel: Callable[..., Any], first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel with its grid."""
    with torch.cuda.device_of(first):  # Triton launches on the current GPU, whichever holds the tensors
        kernel(first, *arguments, **constants)


def power_of_two(number: int) -> int:
    """The least that is not below it."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _ptx(form: str, dtype: torch.dtype | None) -> str:
    """The PTX for codes to become floats of 16 bits, or integers (None)."""
    if dtype is None:
        return triton_ptx.to_integers(form)
    return "" if dtype == torch.float32 else triton_ptx.to_floats(form, str(dtype).removeprefix("torch."))


@functools.cache
def _nf4_steps(device: torch.device) -> Tensor:
    """The levels counted in steps, int8."""
    with torch.inference_mode(False):
        return (torch.tensor(NF4, dtype=torch.float32) / NF4_STEP).round().to(torch.int8).to(device)


@functools.cache
def _nf4_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The levels, rounded to a dtype, in float32."""
    with torch.inference_mode(False):  # kept, so it must serve outside of that mode too
        return torch.tensor(NF4, dtype=torch.float32, device=device).to(dtype).float()


@functools.cache
def _kernels() -> ModuleType | None:
    """The module of the kernels, imported at the first product; None, said once, where Triton is not installed."""
    try:
        from . import triton_kernels
    except ImportError as error:
        logger.warning("Triton does not load (%s). Decoding on GPU uses PyTorch's slower products.", error)
        return None
    return triton_kernels


def _forms() -> ModuleType:
    from . import triton_forms

    return triton_forms


def _integers() -> ModuleType:
    from . import triton_integers

    return triton_integers


def _loaded() -> ModuleType:
    module = _kernels()
    if module is None:
        raise RuntimeError("the Triton kernels need Triton, which is not installed")
    return module
