"""The native small steps against their PyTorch twins in float64, and themselves for one row alone."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import kernels
from accessory.kernels.cpu import library, steps
from accessory.kernels.cpu.steps import rms_norm, rotate, route, silu_gate, sum_pairs
from accessory.kernels.steps import rotate_reference
from accessory.model.rope import RotaryTable

DTYPES = (torch.bfloat16, torch.float32)
WIDTHS = (1, 2, 7, 8, 16, 31, 32, 33, 64, 100, 129, 1024)
variants = pytest.mark.parametrize(
    ("variant", "dtype"), list(product(library.runnable_variants(), DTYPES)), ids=lambda value: str(value)
)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_true(out: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Computed in float32, and rounded once."""
    assert (out.shape, out.dtype) == (truth.shape, dtype)
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(out.double(), truth, rtol=rounding + 2**-20, atol=2**-20, equal_nan=True)


def assert_rows_are_independent(step: Callable[..., Tensor], *rows: Tensor) -> None:
    """A row's result is the same alone; and of many rows, which several threads share."""
    few = step(*rows)
    for row in range(rows[0].shape[0]):
        assert torch.equal(step(*(x[row : row + 1] for x in rows))[0], few[row])
    times = 2 + 2**20 // rows[0].numel()
    many = step(*(x.repeat(times, *[1] * (x.dim() - 1)) for x in rows))
    assert torch.equal(many, few.repeat(times, *[1] * (few.dim() - 1)))


@variants
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_is_its_twin(variant: str, dtype: torch.dtype, width: int) -> None:
    x, weight = draw(3, width, dtype=dtype) * 5, draw(width, dtype=dtype)
    assert_true(
        rms_norm(x, weight, 1e-5, variant=variant), F.rms_norm(x.double(), (width,), weight.double(), 1e-5), dtype
    )
    assert_rows_are_independent(lambda rows: rms_norm(rows, weight, 1e-5, variant=variant), x)


@variants
def test_norm_of_other_shapes(variant: str, dtype: torch.dtype) -> None:
    weight = draw(40, dtype=dtype)
    for x in (draw(40, dtype=dtype), draw(2, 3, 40, dtype=dtype), draw(40, 5, dtype=dtype).T, draw(0, 40, dtype=dtype)):
        assert_true(
            rms_norm(x, weight, 0.1, variant=variant), F.rms_norm(x.double(), (40,), weight.double(), 0.1), dtype
        )
    zeros = torch.zeros(1, 40, dtype=dtype)
    assert torch.equal(rms_norm(zeros, weight, 1e-5, variant=variant), zeros)
    bad = draw(2, 40, dtype=dtype)
    bad[1, 7] = float("nan")
    assert rms_norm(bad, weight, 1e-5, variant=variant).isnan().all(1).tolist() == [False, True]


@variants
@pytest.mark.parametrize("width", [width for width in WIDTHS if width % 2 == 0])
def test_rotation_is_its_twin(variant: str, dtype: torch.dtype, width: int) -> None:
    table = RotaryTable(width, 60, theta=1e4, scaling=None, device=torch.device("cpu"))
    rotation = table(torch.tensor([0, 59, 7]))
    joint = draw(3, 7 * width, dtype=dtype).unflatten(1, (7, width))
    exact = tuple(x.double() for x in rotation)
    wide = joint.double().unflatten(-1, (-1, 2))
    truth = joint.double() * exact[0] + wide.flip(-1).flatten(-2) * exact[1]
    q, k = rotate(*joint.clone().split((5, 2), dim=1), rotation, variant=variant)
    assert_true(torch.cat((q, k), dim=1), truth, dtype)
    assert_true(rotate_reference(joint, rotation), truth, dtype)
    across = joint.transpose(1, 2).contiguous().transpose(1, 2)
    again = rotate(across[:, :5], across[:, 5:], rotation, variant=variant)
    assert torch.equal(torch.cat(again, dim=1), torch.cat((q, k), dim=1))

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat(rotate(*x.clone().split((5, 2), dim=1), (cos, sin), variant=variant), dim=1)

    assert_rows_are_independent(turned, joint, *rotation)


@variants
@pytest.mark.parametrize("width", WIDTHS)
def test_gate_is_its_twin(variant: str, dtype: torch.dtype, width: int) -> None:
    both = draw(3, 2 * width, dtype=dtype) * 8
    first, second = both.double().chunk(2, dim=1)
    assert_true(silu_gate(both, variant=variant), F.silu(first) * second, dtype)
    assert_rows_are_independent(lambda rows: silu_gate(rows, variant=variant), both)


@variants
def test_gate_of_every_magnitude(variant: str, dtype: torch.dtype) -> None:
    small = 2.0 ** torch.arange(-60, 100, dtype=torch.float64)
    first = torch.cat((small, -small, torch.tensor([0.0, float("inf"), float("nan")]))).to(dtype)
    out = silu_gate(torch.stack((first, torch.ones_like(first)), 1), variant=variant)[:, 0]
    assert_true(out, F.silu(first.double()), dtype)


@variants
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_weighted_sum_is_its_twin(variant: str, dtype: torch.dtype, width: int, count: int) -> None:
    y, weights = draw(5, count, width, dtype=dtype), draw(5, count, dtype=torch.float32).softmax(-1)
    truth = (y.double() * weights.double()[..., None]).sum(1)

    def summed(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        return sum_pairs(y_TKD.flatten(0, 1), weights_TK, variant=variant)

    assert_true(summed(y, weights), truth, dtype)
    assert_rows_are_independent(summed, y, weights)


native_only = pytest.mark.skipif(not library.runnable_variants(), reason="the native library was not built")


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (1, 8, 2), (40, 8, 2), (5, 3, 3), (9000, 64, 6)])
def test_choice_of_experts_is_its_twin(dtype: torch.dtype, tokens: int, experts: int, top_k: int) -> None:
    # Distinct within each token, in bfloat16 too.
    order = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens)).argsort(1)
    logits = (order / 8 - 3).to(dtype)
    active = torch.arange(tokens) % 3 != 1
    choice = route(logits, top_k, active)
    probs = logits.double().softmax(-1)
    weights, chosen = probs.topk(top_k, dim=-1)
    assert torch.equal(choice.experts_TK, chosen)
    assert torch.equal(choice.asked_TK, chosen.where(active[:, None], -1))
    assert route(logits, top_k, None).asked_TK is None
    assert torch.equal(choice.logits_TE, logits.float())
    for ours, truth in ((choice.probs_TE, probs), (choice.weights_TK, weights / weights.sum(-1, keepdim=True))):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)
    alone = route(logits[-1:], top_k, None)
    assert torch.equal(alone.weights_TK, choice.weights_TK[-1:])


@native_only
def test_experts_that_are_equal_or_not_a_number() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, 2, 2, 2], [0, 0, 0, 0], [nan, 1, 2, 3], [1, nan, nan, 5], [3, -inf, -inf, -inf]])
    choice = route(logits, 2, None)
    assert choice.experts_TK.tolist() == [[1, 2], [0, 1], [0, 1], [0, 1], [0, 1]]
    torch.testing.assert_close(choice.weights_TK[[0, 1, 4]], torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]))
    assert bool(choice.weights_TK[2:4].isnan().all())


def test_who_serves() -> None:
    x = draw(2, 8, dtype=torch.float32)
    assert not steps.serves(x)  # gradients are on
    with torch.inference_mode():
        assert steps.serves(x) == library.native_available()
        assert not steps.serves(x.double())
        assert not steps.serves(x.to("meta"))
    q, k = x.clone().requires_grad_().view(2, 2, 4), x[:, :4].view(2, 1, 4)
    rotation = (torch.ones(2, 1, 4), torch.zeros(2, 1, 4))
    turned, _ = kernels.rotate(q, k, rotation)
    assert turned.requires_grad


def test_tensors_that_do_not_fit_are_refused() -> None:
    x = draw(2, 8, dtype=torch.float32)
    for weight in (x[0, :7], x[0].bfloat16(), x):
        with pytest.raises(ValueError, match=r"weight_D .* does not fit"):
            rms_norm(x, weight, 1e-5)
    for rows in (x[:, :7], x[0]):
        with pytest.raises(ValueError, match="rows of two halves"):
            silu_gate(rows)
    weights = torch.ones(1, 2)
    for wrong_rows, wrong_weights in ((x[:1], weights), (x, weights[0]), (x[0], weights), (x, weights.bfloat16())):
        with pytest.raises(ValueError, match=r"weights_TK .* (do not fit|must be in float32)"):
            sum_pairs(wrong_rows, wrong_weights)
    for logits, top_k in ((x[0], 1), (x, 0), (x, 9)):
        with pytest.raises(ValueError, match=r"no \d experts can be chosen"):
            route(logits, top_k, None)
    for active in (torch.ones(3, dtype=torch.bool), torch.ones(2)):
        with pytest.raises(ValueError, match="must hold one bool"):
            route(x, 1, active)
    q, k = x.view(2, 2, 4), x[:, :4].view(2, 1, 4)
    cos, sin = torch.ones(2, 1, 4), torch.zeros(2, 1, 4)
    for arguments in (
        (q[:1], k, (cos, sin)),
        (q, k.bfloat16(), (cos, sin)),
        (q, k[..., :2], (cos, sin)),
        (q, k, (cos[:1], sin)),
        (q, k, (cos, sin.double())),
        (q[..., :3], k[..., :3], (cos[..., :3], sin[..., :3])),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            rotate(*arguments)
