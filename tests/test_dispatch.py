"""The dispatchers beside one plain reference, token by token, and the products that the experts make of their pairs."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accessory import kernels, products
from accessory.kernels.cpu import steps
from accessory.model import units
from accessory.model.dispatch import Dispatcher, GatheredPairs, GroupedPairs, Pairs, TrainedPairs
from accessory.model.router import Routing
from accessory.model.units import silu_gate

# "static" are grouped pairs as compiled code and a GPU have them.
KINDS = {"gathered": GatheredPairs, "grouped": GroupedPairs, "static": GroupedPairs, "trained": TrainedPairs}
kinds = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def dispatching(kind: str) -> Iterator[None]:
    with (
        torch.set_grad_enabled(kind == "trained"),
        mock.patch.object(kernels, "gathering_pays", return_value=kind == "gathered"),
        mock.patch.object(torch.compiler, "is_compiling", return_value=kind == "static"),
    ):
        yield


def routing_of(weights_TK: Tensor, experts_TK: Tensor, active_T: Tensor | None = None) -> Routing:
    asked = None if active_T is None else experts_TK.where(active_T[:, None], -1)
    return Routing(weights_TK, experts_TK, weights_TK, weights_TK, asked)


def of_experts(pairs: Pairs, w13: Tensor, w2: Tensor, weights_TK: Tensor) -> Tensor:
    """What model/moe.py computes."""
    hidden = silu_gate(pairs.product(pairs.rows, w13))
    return pairs.combine(pairs.product(hidden, w2), weights_TK)


def reference(
    x_TD: Tensor, routing: Routing, w13: Tensor, w2: Tensor, *, first: int = 0, active_T: Tensor | None = None
) -> Tensor:
    """Token by token, as the formula reads; experts that are not there give nothing."""
    rows = []
    for token, x in enumerate(x_TD):
        row = torch.zeros_like(x)
        for weight, expert in zip(routing.weights_TK[token], routing.experts_TK[token].tolist(), strict=True):
            e = expert - first
            if 0 <= e < len(w13) and (active_T is None or active_T[token]):
                row = row + weight * (w2[e] @ (F.silu(w13[e, 0] @ x) * (w13[e, 1] @ x)))
        rows.append(row)
    return torch.stack(rows)


@kinds
@pytest.mark.parametrize("skips", [False, True])
def test_a_case_by_hand(kind: str, skips: bool) -> None:
    """Three tokens, two of four experts each; this rank holds experts 2 and 3."""
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
    routing = routing_of(
        torch.tensor([[2.0, 7.0], [3.0, 1.0], [7.0, 4.0]]),
        torch.tensor([[2, 0], [3, 2], [1, 3]]),
        torch.tensor([True, True, False]) if skips else None,
    )
    weight = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 5.0], [6.0, 0.0]]])
    bias = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    with dispatching(kind):
        pairs = Dispatcher(2, 2, 4)(x_TD, routing)
        y_PD = pairs.product(pairs.rows, weight)
        summed, biased = (pairs.combine(y, routing.weights_TK) for y in (y_PD, y_PD + pairs.bias(bias, like=y_PD)))
    assert type(pairs) is KINDS[kind]
    # Token 0: 2 * expert 2 of (1, 0) = 2 * (1, 3); expert 0 is elsewhere.
    # Token 1: 3 * expert 3 of (0, 1) + 1 * expert 2 of (0, 1) = 3 * (5, 0) + (2, 4).
    # Token 2: 4 * expert 3 of (2, 3) = 4 * (15, 12); expert 1 is elsewhere. Where it is skipped, nothing.
    assert summed.tolist() == [[2, 6], [17, 4], [0, 0] if skips else [60, 48]]
    # 2 * (11, 23); 3 * (35, 40) + (12, 24); 4 * (45, 52).
    assert biased.tolist() == [[22, 46], [117, 144], [0, 0] if skips else [180, 208]]
    if isinstance(pairs, GroupedPairs):
        # The pairs of expert 2 are places 0 and 3 of the flattened (T, K), those of expert 3 places 2 and 5.
        own = [0, 3, 2] if skips else [0, 3, 2, 5]
        assert pairs.offsets_E.tolist() == [2, len(own)]
        assert pairs.order_P[: len(own)].tolist() == own
        assert len(pairs.order_P) == (6 if kind == "static" else len(own))


def draw(tokens: int, dim: int, hidden: int, experts: int, total: int, top_k: int, seed: int) -> list[Tensor]:
    """x, weights, experts (some on other ranks), w13, w2 in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scores = torch.rand(tokens, total, generator=generator)
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


def assert_close(ours: Tensor, truth: Tensor, tolerance: float = 2e-5) -> None:
    assert ours.shape == truth.shape
    assert (ours.double() - truth.double()).abs().max() <= tolerance * max(1.0, truth.abs().max().item())


def trained_ways(x: Tensor, routing: Routing, w13: Tensor, w2: Tensor, dispatcher: Dispatcher) -> Iterator[Tensor]:
    """In pieces, around which an adapter may compute, and in one function."""
    pairs = dispatcher(x, routing)
    assert isinstance(pairs, TrainedPairs)
    yield of_experts(pairs, w13, w2, routing.weights_TK)
    yield pairs.fused(w13, w2, routing.weights_TK)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 40),
    dim=st.integers(1, 12),
    hidden=st.integers(1, 12),
    experts=st.integers(1, 6),
    before=st.integers(0, 3),
    behind=st.integers(0, 3),
    top_k=st.integers(1, 3),
    skips=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_dispatcher_is_the_reference(
    tokens: int, dim: int, hidden: int, experts: int, before: int, behind: int, top_k: int, skips: bool, seed: int
) -> None:
    total = before + experts + behind
    x, weights, chosen, w13, w2 = draw(tokens, dim, hidden, experts, total, min(top_k, total), seed)
    active = torch.arange(tokens) % 3 != seed % 3 if skips else None
    truth_inputs = [tensor.requires_grad_() for tensor in (x, weights, w13, w2)]
    truth = reference(x, routing_of(weights, chosen), w13, w2, first=before, active_T=active)
    # Without a graph where no pair is this rank's.
    expected = gradients(truth, truth_inputs) if truth.requires_grad else [0 * tensor for tensor in truth_inputs]
    inputs = [tensor.detach().float().requires_grad_() for tensor in truth_inputs]
    routing, dispatcher = routing_of(inputs[1], chosen, active), Dispatcher(before, experts, total)
    for kind in ("gathered", "grouped", "static"):
        with dispatching(kind):
            assert_close(of_experts(dispatcher(inputs[0], routing), *inputs[2:], inputs[1]), truth)
    with mock.patch.object(units, "_BLOCK", 7):
        for ours in trained_ways(inputs[0], routing, inputs[2], inputs[3], dispatcher):
            assert_close(ours, truth)
            found = gradients(ours, inputs)
            for own, theirs in zip(found, expected, strict=True):
                assert_close(own, theirs)


@pytest.mark.parametrize("native", [False, True])
def test_what_is_combined_may_be_changed_in_place(native: bool) -> None:
    """As ranks do that sum it, whatever adds the pairs up: kernels, or PyTorch where none are built."""
    x, weights, chosen, w13, w2 = (tensor.float() for tensor in draw(9, 8, 6, 4, 4, 2, 1))
    inputs = [tensor.requires_grad_() for tensor in (x, weights, w13, w2)]
    routing = routing_of(weights, chosen.long())
    serves = steps.serves if native else lambda _: False
    with mock.patch.object(steps, "serves", serves):
        plain, changed = (list(trained_ways(x, routing, w13, w2, Dispatcher(0, 4, 4))) for _ in range(2))
    for one, other in zip(plain, changed, strict=True):
        for expected, own in zip(gradients(one, inputs), gradients(other.mul_(2), inputs), strict=True):
            assert torch.equal(own, 2 * expected)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_training_in_bfloat16(weight_dtype: torch.dtype) -> None:
    x, weights, chosen, w13, w2 = draw(64, 32, 48, 8, 8, 2, 3)
    rounded = [x.bfloat16(), weights.float(), w13.bfloat16().to(weight_dtype), w2.bfloat16().to(weight_dtype)]
    inputs = [tensor.requires_grad_() for tensor in rounded]
    truth_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = reference(truth_inputs[0], routing_of(truth_inputs[1], chosen), *truth_inputs[2:])
    expected = gradients(truth, truth_inputs)
    for ours in trained_ways(inputs[0], routing_of(inputs[1], chosen), inputs[2], inputs[3], Dispatcher(0, 8, 8)):
        assert ours.dtype == torch.bfloat16
        found = gradients(ours, inputs)
        assert [gradient.dtype for gradient in found] == [tensor.dtype for tensor in inputs]
        assert_close(ours, truth, 0.02)
        for own, theirs in zip(found, expected, strict=True):
            assert_close(own, theirs, 0.03)


@pytest.mark.parametrize("tokens", [1, 7, 90])
@pytest.mark.parametrize("kind", ["gathered", "grouped"])
def test_weights_of_another_dtype_are_cast_in_inference_too(kind: str, tokens: int) -> None:
    """An evaluation between steps of training in bfloat16 has the parameters as they are kept, in float32."""
    x, weights, experts, w13, w2 = draw(tokens, 16, 24, 4, 6, 2, seed=tokens)
    routing = routing_of(weights.float(), experts)
    with dispatching(kind):
        pairs = Dispatcher(1, 4, 6)(x.bfloat16(), routing)
        made = []
        for dtype in (torch.float32, torch.bfloat16):
            own = [w.bfloat16().to(dtype) for w in (w13, w2)]
            hidden = pairs.gated(own[0])
            made.append(pairs.combine(pairs.product(hidden, own[1]), routing.weights_TK))
    assert made[0].dtype == torch.bfloat16
    torch.testing.assert_close(*made, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "hidden"), [(32, 48), (6, 10)])
def test_one_grouped_call_is_one_product_after_another(dtype: torch.dtype, dim: int, hidden: int) -> None:
    """What a GPU does, on the CPU's grouped_mm; of odd little shapes too."""
    x, weights, chosen, w13, w2 = draw(96, dim, hidden, 8, 12, 2, 5)
    results = []
    for in_one_call in (False, True):
        inputs = [tensor.to(kind).requires_grad_() for tensor, kind in ((x, dtype), (weights, torch.float32))]
        inputs += [tensor.float().requires_grad_() for tensor in (w13, w2)]
        with mock.patch.object(products, "_in_one_call", return_value=in_one_call):
            routing, dispatcher = routing_of(inputs[1], chosen), Dispatcher(0, 8, 12)
            for ours in trained_ways(inputs[0], routing, inputs[2], inputs[3], dispatcher):
                results.append([ours, *gradients(ours, inputs)])
    for each in zip(*results, strict=True):
        for other in each[1:]:
            assert_close(other, each[0].detach(), 0.02 if dtype is torch.bfloat16 else 1e-5)
