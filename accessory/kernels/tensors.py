"""What several modules here ask of a tensor."""

from torch import Tensor


def shown(tensor: Tensor) -> str:
    """Its shape and dtype, for error messages."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def whole_tokens(x_THh: Tensor) -> Tensor:
    """With each token's heads one after another, as they are where they were split off a larger row."""
    return x_THh if x_THh.stride()[1:] == (x_THh.shape[2], 1) else x_THh.contiguous()
