"""Cross-entropy over a large vocabulary without float32 copies of all logits.

Shape letters: T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from accessory import kernels

_BLOCK, _CUDA_BLOCK = 64, 2048


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[target], natural logarithm, float32; a target of 0 is not counted.

    As torch's in float32. The gradient is found with the loss, block by block, and kept in the logits' dtype, so
    that of all float32 numbers only a block's are ever there.

    Args:
        targets_T: int64.
    """
    total: Tensor = _CrossEntropy.apply(logits_TV, targets_T, torch.is_grad_enabled() and logits_TV.requires_grad)
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, with_gradient: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits_TV.device)
        grad_TV = torch.empty_like(logits_TV) if with_gradient else None
        block = block_of(logits_TV)
        for begin in range(0, logits_TV.shape[0], block):
            rows = slice(begin, begin + block)
            targets = targets_T[rows, None]
            learned = targets != 0
            log_probs = logits_TV[rows].float().log_softmax(-1)
            total -= (log_probs.gather(-1, targets) * learned).sum()
            if grad_TV is not None:
                grad = log_probs.exp_().scatter_add_(-1, targets, -torch.ones_like(targets, dtype=torch.float32))
                grad_TV[rows] = grad.mul_(learned)
        if grad_TV is not None:
            ctx.save_for_backward(grad_TV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_TV,) = ctx.saved_tensors
        # In float32: a factor rounded to bfloat16 would scale every gradient of the model by up to 0.4 % too much.
        out_TV = torch.empty_like(grad_TV)
        for rows, out in zip(grad_TV.split(block_of(grad_TV)), out_TV.split(block_of(grad_TV)), strict=True):
            out.copy_(rows.float().mul_(grad))
        return out_TV, None, None


def block_of(logits_TV: Tensor) -> int:
    """How many tokens' logits are in float32 at once."""
    return _CUDA_BLOCK if kernels.on_gpu(logits_TV) else _BLOCK
