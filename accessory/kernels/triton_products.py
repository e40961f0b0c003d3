"""Products on GPU by Triton kernels: `linear.py`'s and `quantized_ops.py`'s, under their names.

Activations stay float, whatever the weight, and sums are float32.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth, C bytes of two
codes.
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .quantized import NF4, depth_of, form_of

logger = logging.getLogger("accessory.kernels")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_GATHERED = 64  # pairs that a program multiplies with each tile of a weight


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
    "plain": Tile(32, 128, 2, 4),
    "int8": Tile(32, 128, 2, 4),
    "int4": Tile(32, 64, 2, 4),
    "nf4": Tile(32, 64, 2, 4),
}
MANY = {
    "plain": Tile(128, 64, 8, 3),
    "int8": Tile(128, 64, 8, 3),
    "int4": Tile(128, 64, 8, 3),
    "nf4": Tile(128, 64, 8, 3),
}
FLOAT32 = Tile(32, 32, 4, 2)  # no tensor cores, and so 16 pairs cost what 16 pairs cost
MANY_PAIRS = 64
_PLAIN_ROWS, _PLAIN_DEPTH = 8, 256


def triton_available() -> bool:
    """Whether the Triton kernels serve (on GPU, in bfloat16, float16 and float32)."""
    return _kernels() is not None


def triton_serves(x_PD: Tensor, *weight: Tensor | None) -> bool:
    """Whether they serve such activations and the tensors of such a weight."""
    aligned = all(tensor is None or tensor.stride(-1) == 1 for tensor in weight)
    return x_PD.dtype in DTYPES and aligned and triton_available()


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
    _launch(
        _loaded().make_plain[(-(-depth // _PLAIN_DEPTH), -(-rows // _PLAIN_ROWS))],
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
    """One launch of the kernel `multiply`; ``index`` and ``way`` as it says."""
    pairs, (experts, rows, depth) = x_PD.shape[0], w_ERD.shape
    if 0 in (pairs, experts, rows, depth):  # such as a rank without experts
        return x_PD.new_zeros(pairs, rows)
    form = "plain" if scale is None else form_of(w_ERD, zero)
    in_halves = form in ("int4", "nf4")
    group = depth // scale.shape[-1] if scale is not None and in_halves else 1
    own_pairs, tile = _tile(form, x_PD.dtype, pairs, way)
    own_depth = max(tile.depth, group)
    tiles = {"gathered": experts, "dense": -(-pairs // own_pairs), "sorted": pairs // own_pairs + experts}[way]
    y_PR = x_PD.new_zeros(pairs, rows) if way == "sorted" else x_PD.new_empty(pairs, rows)
    x_PD, sum_PG = _split_inputs(x_PD, group) if in_halves else (x_PD.contiguous(), y_PR)
    _launch(
        _loaded().multiply[(tiles, -(-rows // tile.rows))],
        x_PD,
        w_ERD,
        w_ERD if scale is None else scale,
        w_ERD if zero is None else zero,
        sum_PG,
        _nf4_table(x_PD.device, x_PD.dtype) if form == "nf4" else sum_PG,
        y_PR if index is None else index.contiguous(),
        y_PR,
        pairs,
        experts,
        rows,
        depth,
        *w_ERD.stride()[:2],
        *((0, 0) if scale is None else scale.stride()[:2]),
        *((0, 0) if zero is None else zero.stride()[:2]),
        WAY=way,
        FORM=form,
        GROUP=group,
        WHOLE_TILES=depth % own_depth == 0,
        FLOAT32=not x_PD.is_cuda,
        PTX=_codes_to_floats(form, x_PD.dtype) if in_halves and x_PD.is_cuda else "",
        ALL_EXPERTS=_power_of_two(experts) if way == "sorted" else 1,
        PAIRS=own_pairs,
        ROWS=tile.rows,
        DEPTH=own_depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_PR


def _tile(form: str, dtype: torch.dtype, pairs: int, way: str) -> tuple[int, Tile]:
    """Pairs of a program, and what else it takes. Tensor cores take 16 pairs at least."""
    some = max(16, _power_of_two(pairs))
    if dtype == torch.float32:
        return min(16 if way != "gathered" else some, some), FLOAT32
    if way == "gathered" or pairs <= MANY_PAIRS // 2:
        return some, FEW[form]
    return min(some, MANY_PAIRS), MANY[form]


def _split_inputs(x_PD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Even and odd inputs (2, P, C), and the float32 sums of every group of so many bytes (P, G)."""
    pairs, depth = x_PD.shape[0], x_PD.shape[1] // 2
    groups = depth // group
    split_2PC = x_PD.new_empty(2, pairs, depth)
    sum_PG = x_PD.new_empty(pairs, groups, dtype=torch.float32)
    at_once = min(32, _power_of_two(groups))
    kernel = _loaded().split_inputs[(pairs, -(-groups // at_once))]
    _launch(kernel, x_PD.contiguous(), split_2PC, sum_PG, pairs, depth, GROUP=group, GROUPS=at_once)
    return split_2PC, sum_PG


def _launch(kernel: Callable[..., Any], first: Tensor, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(first):  # Triton launches on the current GPU, whichever holds the tensors
        kernel(first, *arguments, **constants)


def _power_of_two(number: int) -> int:
    """The least that is not below it."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _codes_to_floats(form: str, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return ""
    module = _loaded()
    text: str = module.codes_to_floats(
        form, {torch.bfloat16: module.tl.bfloat16, torch.float16: module.tl.float16}[dtype]
    )
    return text


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


def _loaded() -> ModuleType:
    module = _kernels()
    if module is None:
        raise RuntimeError("the Triton kernels need Triton, which is not installed")
    return module
