"""Products with plain weights: of few tokens, bound by reading the weights, so each is read only once; and of any
number by the tiles of AMX, where a CPU has them.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.

For inference: the operations have no derivative; `accessory.products` chooses among them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import products as on_cpu
from .cpu.library import DTYPES, native_available, native_variant, tiles_serve
from .tensors import called_directly, shown
from .triton import products as on_gpu

# Thresholds: by docs/benchmarks.md, "The kernels for few tokens".
FEW_TOKENS = 32
# Pairs up to which gathered_linear is the way through the experts: as many, and so many for each expert. Beyond, their
# weights are better read by the products of groups.
_FEW_PER_EXPERT = 4

# A dense product by the kernel beats F.linear's while reading weights is the bound: of fewer tokens where the CPU
# multiplies bf16 in hardware, and of fewer still where these leave the first cache.
_DENSE_TOKENS = 16
_DENSE_TOKENS_BF16_HARDWARE = 8
_DENSE_ELEMENTS_BF16_HARDWARE = 32768  # of x

_GROUPED_MM_CAPABILITIES = (9, 10)  # major ones of the GPUs for which PyTorch has a kernel of it, in bfloat16


def gathering_pays(x_TD: Tensor, pairs: int, experts: int = 1) -> bool:
    """Whether `gathered_linear` is the way for so many pairs, or a product of groups.

    Without the native kernel on CPU it is not: the reference copies the weights of every pair. What torch.compile
    traces takes it even so, since no shape there may depend on the choice of experts. AMX's tiles take any number.
    """
    if x_TD.is_cuda and on_gpu.available():
        return pairs <= on_gpu.MOST_GATHERED
    if called_directly(x_TD) and x_TD.dtype == torch.bfloat16 and tiles_serve():
        return True
    if not few_pairs(pairs, experts if x_TD.is_cpu else 0):
        return False
    if torch.compiler.is_compiling():
        return True
    if x_TD.is_cuda:
        # grouped_mm in bfloat16 reads the weights in place; in other dtypes its fallbacks synchronise.
        return x_TD.dtype != torch.bfloat16
    return x_TD.dtype in DTYPES and native_available()


def few_pairs(pairs: int, experts: int) -> bool:
    """Whether so many pairs are few: as many, or so many for each expert."""
    return pairs <= max(FEW_TOKENS, _FEW_PER_EXPERT * experts)


def experts_of(offsets_E: Tensor, pairs: int) -> Tensor:
    """The expert of each of so many pairs, e of those at [offsets[e-1], offsets[e]), and -1 behind the last; (P,)."""
    numbers_P = torch.arange(pairs, dtype=torch.int32, device=offsets_E.device)
    experts_P = torch.searchsorted(offsets_E, numbers_P, right=True)
    return experts_P.masked_fill_(experts_P == offsets_E.shape[0], -1)


def pairs_by_expert(expert_P: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has pairs, and their places; those of none are left out. It asks the device."""
    for expert in expert_P.unique().tolist():
        if expert >= 0:
            yield expert, (expert_P == expert).nonzero()[:, 0]


def plain_experts_synchronise(x_TD: Tensor, pairs: int) -> bool:
    """Whether on a GPU the products of so many pairs with plain weights wait for a number from the device.

    `gathered_linear` does not. grouped_mm copies the groups' offsets to the host wherever PyTorch (2.11 to 2.13) has
    no kernel for it.
    """
    if gathering_pays(x_TD, pairs):
        return False
    if x_TD.dtype != torch.bfloat16 or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(x_TD.device)[0] not in _GROUPED_MM_CAPABILITIES


P = ParamSpec("P")


def operation(name: str, check: Callable[..., None]) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Make a product the operation accessory::name, with its checks and what torch.compile must know of its result."""

    def registered(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(product)
        def checked(x_PD: Tensor, w: Tensor, *index: Tensor) -> Tensor:
            check(x_PD, w, *index)
            return product(x_PD, w, *index)

        def fake(x_PD: Tensor, w: Tensor, *index: Tensor) -> Tensor:
            check(x_PD, w, *index)
            return x_PD.new_empty(x_PD.shape[0], w.shape[-2])

        torch.library.custom_op(f"accessory::{name}", checked, mutates_args=()).register_fake(fake)
        compiled = getattr(torch.ops.accessory, name)

        @functools.wraps(product)
        def call(x_PD: Tensor, w: Tensor, *index: Tensor) -> Tensor:
            return (checked if called_directly(x_PD) else compiled)(x_PD, w, *index)

        return call

    return registered


def check_gathered(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> None:
    """ValueError: tensors that `gathered_linear` does not take."""
    if x_PD.dim() != 2 or w_ERD.dim() != 3 or x_PD.shape[1] != w_ERD.shape[2] or x_PD.dtype != w_ERD.dtype:
        raise ValueError(f"x_PD {shown(x_PD)} does not fit w_ERD {shown(w_ERD)}")
    if expert_P.shape != x_PD.shape[:1] or expert_P.dtype != torch.int64:
        raise ValueError(f"expert_P {shown(expert_P)} must hold one int64 for each row of x_PD {shown(x_PD)}")


def _check_dense(x_PD: Tensor, w_RD: Tensor) -> None:
    if x_PD.dim() != 2 or w_RD.dim() != 2 or x_PD.shape[1] != w_RD.shape[1] or x_PD.dtype != w_RD.dtype:
        raise ValueError(f"x_PD {shown(x_PD)} does not fit w_RD {shown(w_RD)}")


@operation("gathered_linear", check_gathered)
def gathered_linear(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> Tensor:
    """y[p] = w[expert[p]] @ x[p], (P, R) in x's dtype, summed in float32; a negative expert gives zeros.

    With the native kernel every needed row of w is read once, and a pair's result does not depend on the other
    pairs, to the bit; but for AMX's tiles it is made for few pairs. On GPU a Triton kernel serves where it can.
    Otherwise (another device or dtype, rows of w without unit stride, kernels not built) this is
    `gathered_linear_reference`. For inference only: no derivative.
    """
    if x_PD.is_cuda and on_gpu.serves(x_PD, w_ERD):
        return on_gpu.gathered_linear(x_PD, w_ERD, expert_P)
    if _native_serves(w_ERD):
        return on_cpu.gathered_linear(x_PD, w_ERD, expert_P)
    return gathered_linear_reference(x_PD, w_ERD, expert_P)


def gathered_linear_reference(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> Tensor:
    """Copies each pair's weight, and needs no number from the device."""
    if w_ERD.shape[0] == 0:  # a rank without experts
        return x_PD.new_zeros(x_PD.shape[0], w_ERD.shape[1])
    w_PRD = w_ERD[expert_P.clamp(min=0)]
    y_PR = torch.bmm(w_PRD, x_PD.unsqueeze(-1)).squeeze(-1)
    return y_PR.masked_fill((expert_P < 0).unsqueeze(-1), 0)


@operation("few_token_linear", _check_dense)
def few_token_linear(x_PD: Tensor, w_RD: Tensor) -> Tensor:
    """F.linear(x, w) by the fastest way for this number of tokens; any number is right.

    On CPU AMX's tiles serve, or the native kernel few tokens and F.linear more: then the last bit of a token's result
    may depend on which of them it was. For inference only: no derivative.
    """
    if x_PD.is_cuda and x_PD.shape[0] <= _DENSE_TOKENS and on_gpu.serves(x_PD, w_RD):
        return on_gpu.few_token_linear(x_PD, w_RD)
    if _native_serves(w_RD):
        if tiles_multiply(x_PD, w_RD) or _kernel_beats_onednn(x_PD):
            return on_cpu.gathered_linear(x_PD, w_RD.unsqueeze(0), None)
    elif x_PD.is_cpu and x_PD.shape[0] == 1 and w_RD.dtype == torch.bfloat16:
        # Without the kernel, one bf16 token is faster past oneDNN. None: leave the other flags alone.
        with torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None):
            return F.linear(x_PD, w_RD)
    return F.linear(x_PD, w_RD)


def _native_serves(w: Tensor) -> bool:
    return w.is_cpu and w.dtype in DTYPES and w.stride(-1) == 1 and native_available()


def _kernel_beats_onednn(x_PD: Tensor) -> bool:
    if x_PD.dtype == torch.bfloat16 and native_variant() == "avx512_bf16":
        return x_PD.shape[0] <= _DENSE_TOKENS_BF16_HARDWARE and x_PD.numel() <= _DENSE_ELEMENTS_BF16_HARDWARE
    return x_PD.shape[0] <= _DENSE_TOKENS


def grouped_by_tiles(x_PD: Tensor, w_ERD: Tensor, offsets_E: Tensor) -> Tensor | None:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix transposed, (P, R), where the CPU's tiles multiply
    such a weight in place; else None. Zeros behind the last offset. For inference only: no derivative.
    """
    if not called_directly(x_PD) or not tiles_multiply(x_PD, w_ERD):
        return None
    return on_cpu.gathered_linear(x_PD, w_ERD, experts_of(offsets_E, x_PD.shape[0]))


def tiles_multiply(x_PD: Tensor, w: Tensor) -> bool:
    """Whether the CPU's tiles do, any number of tokens with such a weight."""
    return x_PD.dtype == w.dtype == torch.bfloat16 and w.stride(-1) == 1 and tiles_serve()
