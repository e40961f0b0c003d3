"""The products and the loss of training, each beside plain PyTorch and its autograd."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accessory.model import expert_products
from accessory.model.cross_entropy import cross_entropy
from accessory.model.expert_products import experts_product
from accessory.parallel.layers import linear


def plain_experts(x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """Token by token, as the formula reads; experts that are not there give nothing."""
    rows = []
    for x, weights, experts in zip(x_TD, weights_TK, experts_TK, strict=True):
        row = torch.zeros_like(x)
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            if expert < len(w13):
                row = row + weight * (w2[expert] @ (F.silu(w13[expert, 0] @ x) * (w13[expert, 1] @ x)))
        rows.append(row)
    return torch.stack(rows)


def sorted_pairs(experts_TK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    flat = experts_TK.flatten().clamp(max=count)
    ends = F.one_hot(flat, count + 1).sum(0)[:count].cumsum(0).to(torch.int32)
    return flat.argsort(stable=True)[: int(ends[-1])], ends


def draw(tokens: int, dim: int, hidden: int, experts: int, foreign: int, top_k: int, seed: int) -> list[Tensor]:
    """x, weights, experts (some on other ranks), w13, w2 in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scores = torch.rand(tokens, experts + foreign, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    return [
        normal(tokens, dim),
        weights,
        scores.topk(top_k).indices,
        normal(experts, 2, hidden, dim),
        normal(experts, dim, hidden),
    ]


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), inputs))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    dim=st.integers(1, 12),
    hidden=st.integers(1, 12),
    experts=st.integers(1, 6),
    foreign=st.integers(0, 6),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_experts_are_the_plain_formula(
    tokens: int, dim: int, hidden: int, experts: int, foreign: int, top_k: int, seed: int
) -> None:
    top_k = min(top_k, experts + foreign)
    x, weights, chosen, w13, w2 = draw(tokens, dim, hidden, experts, foreign, top_k, seed)
    order, ends = sorted_pairs(chosen, experts)
    inputs = [tensor.float().requires_grad_() for tensor in (x, weights, w13, w2)]
    with mock.patch.object(expert_products, "_BLOCK", 7):
        ours = experts_product(inputs[0], inputs[1], inputs[2], inputs[3], order, ends)
        found = gradients(ours, inputs)
    truth_inputs = [tensor.requires_grad_() for tensor in (x, weights, w13, w2)]
    truth = plain_experts(truth_inputs[0], truth_inputs[1], chosen, truth_inputs[2], truth_inputs[3])
    assert_close(ours, truth)
    if not truth.requires_grad:  # no pair is this rank's
        assert not any(gradient.any() for gradient in found)
        return
    for own, theirs in zip(found, gradients(truth, truth_inputs), strict=True):
        assert_close(own, theirs)


def assert_close(ours: Tensor, truth: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == truth.shape
    assert (ours.double() - truth.double()).abs().max() <= tolerance * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_experts_in_bfloat16(weight_dtype: torch.dtype) -> None:
    x, weights, chosen, w13, w2 = draw(64, 32, 48, 8, 0, 2, 3)
    order, ends = sorted_pairs(chosen, 8)
    rounded = [x.bfloat16(), weights.float(), w13.bfloat16().to(weight_dtype), w2.bfloat16().to(weight_dtype)]
    inputs = [tensor.requires_grad_() for tensor in rounded]
    ours = experts_product(inputs[0], inputs[1], inputs[2], inputs[3], order, ends)
    assert ours.dtype == torch.float32
    found = gradients(ours, inputs)
    assert [gradient.dtype for gradient in found] == [tensor.dtype for tensor in inputs]
    truth_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = plain_experts(truth_inputs[0], truth_inputs[1], chosen, truth_inputs[2], truth_inputs[3])
    assert_close(ours, truth, 0.02)
    for own, theirs in zip(found, gradients(truth, truth_inputs), strict=True):
        assert_close(own, theirs, 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_grouped_call_is_the_loop(dtype: torch.dtype) -> None:
    """What a GPU does, on the CPU's grouped_mm."""
    x, weights, chosen, w13, w2 = draw(96, 32, 48, 8, 4, 2, 5)
    order, ends = sorted_pairs(chosen, 8)
    results = []
    for in_one_call in (False, True):
        inputs = [tensor.to(kind).requires_grad_() for tensor, kind in ((x, dtype), (weights, torch.float32))]
        inputs += [tensor.float().requires_grad_() for tensor in (w13, w2)]
        with mock.patch.object(expert_products, "_in_one_call", return_value=in_one_call):
            ours = experts_product(inputs[0], inputs[1], inputs[2], inputs[3], order, ends)
            results.append([ours, *gradients(ours, inputs)])
    for looped, grouped in zip(*results, strict=True):
        assert_close(grouped, looped.detach(), 0.02 if dtype is torch.bfloat16 else 1e-5)


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
