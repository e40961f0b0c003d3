"""The Triton kernels against their plain twins; test_triton_kernels.py runs this in Triton's interpreter."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.kernels.linear import gathered_linear_reference
from accessory.kernels.quantized import plain_values
from accessory.kernels.triton_products import gathered_product_on_gpu, quantized_product_on_gpu
from accessory.quant import quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FORMS: list[dict[str, Any]] = [
    {"form": "int8"},
    {"form": "int4", "group_size": 64},
    {"form": "int4", "group_size": 32},
    {"form": "nf4"},
]


def pairs_of(dice: random.Random, experts: int) -> Tensor:
    """Experts of a few pairs; a negative one wants none."""
    return torch.tensor([dice.randrange(-1, experts) for _ in range(dice.randrange(1, 6))])


def assert_near(found: Tensor, true: Tensor) -> None:
    """Within the rounding of the result and the order of float32 sums."""
    bound = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), true.float(), rtol=bound, atol=bound * max(1.0, true.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_plain_weights(seed: int, dtype: torch.dtype) -> None:
    dice, _ = random.Random(seed), torch.manual_seed(seed)
    experts, rows, depth = dice.randrange(1, 5), dice.randrange(1, 40), dice.randrange(1, 300)
    expert_P = pairs_of(dice, experts)
    x_PD = torch.randn(len(expert_P), depth).to(dtype)
    w_ERD = torch.randn(experts, rows + 3, depth + 5).to(dtype)[:, 1 : rows + 1, :depth]  # rows apart, as in a slice
    true = gathered_linear_reference(x_PD.float(), w_ERD.float(), expert_P)
    found = gathered_product_on_gpu(x_PD, w_ERD, expert_P)
    assert found.dtype == dtype
    assert_near(found, true.to(dtype))
    assert not found[expert_P < 0].any()
    assert_near(gathered_product_on_gpu(x_PD, w_ERD[:1], None), (x_PD.float() @ w_ERD[0].float().T).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_quantized_weights(seed: int, how: dict[str, Any], dtype: torch.dtype) -> None:
    dice, _ = random.Random(seed), torch.manual_seed(seed)
    experts, rows, depth = dice.randrange(1, 5), dice.randrange(1, 40), 64 * dice.randrange(1, 11)
    weight = quantize(torch.randn(experts, rows + 2, depth), **how).narrow(1, 1, rows)
    parts = (weight.codes, weight.scale, weight.zero)
    w_ERD = plain_values(*parts, torch.float32)
    expert_P = pairs_of(dice, experts)
    x_PD = torch.randn(len(expert_P), depth).to(dtype)
    found = quantized_product_on_gpu(x_PD, *parts, expert_P)
    assert found.dtype == dtype
    assert_near(found, gathered_linear_reference(x_PD.float(), w_ERD, expert_P).to(dtype))
    assert not found[expert_P < 0].any()
    assert_near(quantized_product_on_gpu(x_PD, *parts, None), (x_PD.float() @ w_ERD[0].T).to(dtype))


def test_nothing_to_multiply() -> None:
    weight = quantize(torch.randn(2, 8, 64), "int8")
    none = torch.empty(0, 64)
    assert quantized_product_on_gpu(none, weight.codes, weight.scale, None, None).shape == (0, 8)
    assert gathered_product_on_gpu(none, torch.randn(2, 8, 64), torch.empty(0, dtype=torch.int64)).shape == (0, 8)
