"""The loss of training and its linear layers, each beside plain PyTorch and its autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.cross_entropy import cross_entropy
from accessory.products import linear


def assert_close(ours: Tensor, truth: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == truth.shape
    assert (ours.double() - truth.double()).abs().max() <= tolerance * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 5), (200, 37), (64, 384)])
def test_cross_entropy_is_torchs(dtype: torch.dtype, tokens: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits = (4 * torch.randn(tokens, vocab, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::3] = 0
    results = []
    for loss in (cross_entropy, lambda x, t: F.cross_entropy(x.float(), t, ignore_index=0, reduction="sum")):
        own = logits.clone().requires_grad_()
        value = loss(own, targets)
        (value * 0.337).backward()
        results.append((value.detach(), own.grad))
    (ours, our_grad), (truth, their_grad) = results
    assert ours.item() == pytest.approx(truth.item(), rel=1e-6)
    assert our_grad.dtype == dtype
    assert_close(our_grad, their_grad, 1e-6 if dtype is torch.float32 else 2**-8)
    # No factor common to all gradients: rounding errors cancel over many.
    assert our_grad.double().abs().sum().item() == pytest.approx(their_grad.double().abs().sum().item(), rel=1e-3)


def test_cross_entropy_of_nothing_learned() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert not cross_entropy(logits.detach(), torch.ones(4, dtype=torch.int64)).requires_grad


def test_a_linear_layer_casts_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16().float() for shape in ((2, 5, 16), (24, 16)))
    results = []
    for cast in (True, False):
        own_x, own_weight = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
        y = linear(own_x, own_weight) if cast else F.linear(own_x, own_weight.bfloat16())
        y.float().square().sum().backward()
        results.append((y, own_x.grad, own_weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs.detach(), 0.01)
