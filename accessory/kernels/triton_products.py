"""Launching the Triton kernels, where Triton is at hand: PyTorch's CUDA builds bring it.

Shape letters: P pairs of a token and its expert (or just tokens), E experts, R rows (outputs), D depth.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from .quantized import NF4, depth_of, form_of

# Of one program, in rows and bytes of a row: a first guess, not measured.
_ROWS, _BYTES = 16, 256


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_serves(x: Tensor, *weight: Tensor | None) -> bool:
    """Whether the kernels multiply these tensors: on a GPU, with weights that lie densely along their inputs."""
    return x.is_cuda and all(part is None or part.stride(-1) == 1 for part in weight) and triton_available()


def gathered_product_on_gpu(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor | None) -> Tensor:
    """y[p] = w[expert[p]] @ x[p]; see `linear.gathered_linear`. No expert_P: all are 0.

    The caller has checked shapes, dtypes and strides. Experts are not checked: nothing is asked of the GPU.
    """
    from .triton_kernels import plain_product

    x_PD, y_PR = x_PD.contiguous(), x_PD.new_empty(x_PD.shape[0], w_ERD.shape[1])
    if y_PR.numel():
        plain_product[_grid(y_PR)](
            x_PD,
            w_ERD,
            expert_P,
            y_PR,
            *w_ERD.shape[1:],
            *w_ERD.stride()[:2],
            GATHERED=expert_P is not None,
            R=_ROWS,
            D=_BYTES // w_ERD.element_size(),
        )
    return y_PR


def quantized_product_on_gpu(
    x_PD: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, expert_P: Tensor | None
) -> Tensor:
    """The same for a quantized weight (E, R, D), with float activations."""
    from .triton_kernels import int8_product, packed_product

    x_PD, y_PR = x_PD.contiguous(), x_PD.new_empty(x_PD.shape[0], codes.shape[1])
    if not y_PR.numel():
        return y_PR
    form, depth = form_of(codes, zero), depth_of(codes)
    sizes = (codes.shape[1], depth, *codes.stride()[:2], *scale.stride()[:2])
    gathered = expert_P is not None
    if form == "int8":
        int8_product[_grid(y_PR)](x_PD, codes, scale, expert_P, y_PR, *sizes, GATHERED=gathered, R=_ROWS, D=_BYTES)
        return y_PR
    assert zero is None or zero.stride() == scale.stride()
    nf4 = form == "nf4"
    packed_product[_grid(y_PR)](
        x_PD,
        codes,
        scale,
        zero,
        _nf4_table(codes.device) if nf4 else None,
        expert_P,
        y_PR,
        *sizes,
        GATHERED=gathered,
        NF4=nf4,
        GROUP=depth // max(1, scale.shape[-1]),
        R=_ROWS,
        J=_BYTES,
    )
    return y_PR


def _grid(y_PR: Tensor) -> tuple[int, int]:
    return (-(-y_PR.shape[1] // _ROWS), y_PR.shape[0])


@functools.cache
def _nf4_table(device: torch.device) -> Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)
