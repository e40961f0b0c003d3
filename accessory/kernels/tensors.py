"""What several modules here and above ask of a tensor."""

import contextlib
from collections.abc import Iterator

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


def shown(tensor: Tensor) -> str:
    """Its shape and dtype, for error messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def whole_tokens(x_THh: Tensor) -> Tensor:
    """With each token's heads one after another, as they are where they were split off a larger row."""
    return x_THh if x_THh.stride()[1:] == (x_THh.shape[2], 1) else x_THh.contiguous()
