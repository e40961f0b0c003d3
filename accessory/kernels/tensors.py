"""What several modules here and above ask of a tensor, and what a router makes of some."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_meta_is_gpu = False


def on_gpu(tensor: Tensor) -> bool:
    """Whether it is a GPU's, or stands for one that is (`meta_as_gpu`): how much is done at once depends on it."""
    return tensor.is_cuda or (_meta_is_gpu and tensor.is_meta)


@contextlib.contextmanager
def meta_as_gpu(gpu: bool) -> Iterator[None]:
    """Tensors without memory stand for a GPU's, or for the CPU's."""
    global _meta_is_gpu
    before, _meta_is_gpu = _meta_is_gpu, gpu
    try:
        yield
    finally:
        _meta_is_gpu = before


def called_directly(x: Tensor) -> bool:
    """Whether an operation may call its function for CPU itself: the dispatcher costs a few us, one decoded token much.

    What traces or wraps tensors (torch.compile, fake tensors, DTensor) must see the operation.
    """
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


def shown(tensor: Tensor) -> str:
    """Its shape and dtype, for error messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def whole_tokens(x_THh: Tensor) -> Tensor:
    """With each token's heads one after another, as they are where they were split off a larger row."""
    return x_THh if x_THh.stride()[1:] == (x_THh.shape[2], 1) else x_THh.contiguous()


class Routed(NamedTuple):
    """What a router makes of logits (T, E): the fields of the model's Routing, in its order.

    Attributes:
        weights_TK: float32, renormalised over the chosen experts.
        experts_TK: int64, the most probable first.
        probs_TE, logits_TE: float32.
        asked_TK: the experts, but -1 for tokens that are not active (None: all are).
    """

    weights_TK: Tensor
    experts_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    asked_TK: Tensor | None
