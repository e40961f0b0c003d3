"""Gated units: what an expert's hidden layer makes of its gate and up halves.

Shape letters: P pairs of a token and its expert, F hidden width of an expert (this rank's slice), O = 2 F.
"""

from typing import Any

import torch
from torch import Tensor

from accessory import kernels
from accessory.config import ClampArgs

# Pairs whose gate and up parts are worked on at once: a block of them fits the cache.
_BLOCK = 128


def silu_gate(both_PO: Tensor) -> Tensor:
    """silu(first half) * second half, (P, F); with gradients ``both`` alone is kept."""
    if torch.is_grad_enabled():
        hidden_PF: Tensor = _SiluGate.apply(both_PO)
        return hidden_PF
    return kernels.silu_gate(both_PO)


def clamped_gate(both_PO: Tensor, clamp: ClampArgs) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) of limited halves, (P, F); in float32."""
    gate, up = both_PO.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
    return ((up + 1) * gate * torch.sigmoid(clamp.alpha * gate)).type_as(both_PO)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_PO: Tensor) -> Tensor:
        ctx.save_for_backward(both_PO)
        return kernels.silu_gate_reference(both_PO)

    @staticmethod
    def backward(ctx: Any, grad_PF: Tensor) -> Tensor:
        (both_PO,) = ctx.saved_tensors
        ones_P = torch.ones(both_PO.shape[0], device=both_PO.device)
        return silu_gate_backward(both_PO, grad_PF, ones_P)[0]


def silu_gate_backward(both_PO: Tensor, grad_PF: Tensor, weight_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through the unit and a weight of each pair behind it, in float32.

    Args:
        grad_PF: gradient of the hidden layer before the pair's weight.

    Returns:
        Gradient of both halves (P, 2 F); the hidden layer times the pair's weight (P, F); gradient of the weight (P,).
    """
    grad_both_PO, hidden_PF = torch.empty_like(both_PO), torch.empty_like(grad_PF)
    grad_weight_P = torch.empty(weight_P.shape, dtype=torch.float32, device=weight_P.device)
    block = both_PO.shape[0] if kernels.on_gpu(both_PO) else _BLOCK
    for begin in range(0, both_PO.shape[0], max(1, block)):
        rows = slice(begin, begin + block)
        gate, up = both_PO[rows].float().chunk(2, dim=-1)
        grad, weight = grad_PF[rows].float(), weight_P[rows, None]
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        grad_weight_P[rows] = (grad * hidden).sum(-1)
        hidden_PF[rows] = hidden.mul_(weight)
        grad = grad.mul_(weight)
        grad_gate, grad_up = grad_both_PO[rows].chunk(2, dim=-1)
        grad_up.copy_(grad * silu)
        # silu' = sigmoid * (1 + gate - silu)
        grad_gate.copy_(grad.mul_(up).mul_(sigmoid).mul_(gate.sub_(silu).add_(1)))
    return grad_both_PO, hidden_PF, grad_weight_P
