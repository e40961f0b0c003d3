"""The native products with quantized weights against float64, their PyTorch twin, and themselves in other batches."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from accessory.kernels import (
    gathered_quantized_linear,
    grouped_quantized_linear,
    quantized_linear,
)
from accessory.kernels.activations import round_activations
from accessory.kernels.cpu import library
from accessory.kernels.cpu import quantized as on_cpu
from accessory.kernels.cpu.quantized import NativeWeight, native_weight, plain_values
from accessory.kernels.quantized import quantized_linear_reference, unpacked
from accessory.quant import QuantizedWeight, format_of

FORMS = (("int8", 0), ("int4", 32), ("int4", 64), ("nf4", 64), ("mxfp4", 32))
DTYPES = (torch.bfloat16, torch.float32)

forms = pytest.mark.parametrize(("form", "group"), FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
variants = pytest.mark.parametrize("variant", library.runnable_variants())


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def draw_weight(form: str, group: int, *shape: int) -> QuantizedWeight:
    """Every code, and scales and zero points that are not those of one group repeated."""
    generator, own = torch.Generator().manual_seed(sum(shape)), format_of(form, group)
    depth = shape[-1]
    if form == "int8":
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return QuantizedWeight(own, codes, torch.rand(*shape[:-1], 1, generator=generator) / 64)
    codes = torch.randint(256, (*shape[:-1], depth // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(*shape[:-1], depth // group, generator=generator) / 4
    if form in ("nf4", "mxfp4"):
        return QuantizedWeight(own, codes, scale.to(own.tensors["scale"].dtype))
    zero = torch.randint(256, scale.shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(own, codes, scale.bfloat16(), zero)


def each(weight: QuantizedWeight, index: Any) -> QuantizedWeight:
    return QuantizedWeight(weight.format, *(tensor[index] for tensor in weight.tensors().values()))


def described(weight: QuantizedWeight) -> NativeWeight:
    native_one = native_weight(weight)
    assert native_one is not None
    return native_one


def assert_true(y_PR: Tensor, x_PD: Tensor, weight: QuantizedWeight, expert_P: Tensor) -> None:
    """y is the float64 product with the rounded activations, to within float32 sums and the rounding to y's dtype."""
    assert y_PR.dtype == x_PD.dtype
    rounded = x_PD.dtype == torch.bfloat16
    x = (round_activations(x_PD) if rounded else x_PD).double()
    w = weight.dequantize(torch.float64, in_steps=rounded)[expert_P.clamp(min=0)]
    kept = (expert_P >= 0).unsqueeze(-1)
    truth = torch.einsum("prd,pd->pr", w, x) * kept
    # What the sums of 4-bit codes are moved by may be larger than the weights: int4's zero points, a table's offset.
    moved = {"int8": 0, "int4": 16, "nf4": 2, "mxfp4": 64}[weight.format.name]
    size = w.abs() + moved * weight.scale.double().abs().amax()
    terms = torch.einsum("prd,pd->pr", size, x.abs()) * kept
    rounding = 2**-8 if y_PR.dtype == torch.bfloat16 else 2**-24
    allowed = rounding * truth.abs() + (x_PD.shape[1] / 16 + 16) * 2**-24 * terms
    assert bool(((y_PR.double() - truth).abs() <= allowed).all())


def depths(form: str, group: int) -> tuple[int, ...]:
    if form == "int8":
        return (1, 7, 64, 127, 128, 129, 300, 1024)
    return tuple(group * count for count in (1, 2, 3, 4, 5, 16, 17, 33))


@variants
@dtypes
@forms
def test_product_is_the_float64_one(variant: str, dtype: torch.dtype, form: str, group: int) -> None:
    for depth in depths(form, group):
        for pairs, experts, rows in ((1, 1, 1), (3, 2, 17), (8, 4, 31), (13, 3, 40)):
            x, weight = draw(pairs, depth, dtype=dtype), draw_weight(form, group, experts, rows, depth)
            expert = torch.randint(-1, experts, (pairs,), generator=torch.Generator().manual_seed(depth))
            y = on_cpu.gathered_quantized_linear(x, described(weight), expert, variant=variant)
            assert_true(y, x, weight, expert)
            assert bool((y[expert < 0] == 0).all())


@variants
@dtypes
@forms
def test_plain_values_are_the_twins_to_the_bit(variant: str, dtype: torch.dtype, form: str, group: int) -> None:
    for depth in depths(form, group):
        weight = draw_weight(form, group, 3, 9, depth)
        out = plain_values(described(weight), torch.empty(3, 9, depth, dtype=dtype), variant=variant)
        assert torch.equal(out, weight.dequantize(dtype))


@variants
@dtypes
@forms
def test_weights_may_be_a_view(variant: str, dtype: torch.dtype, form: str, group: int) -> None:
    whole = draw_weight(form, group, 9, 40, 256)
    expert = torch.tensor([1, -1, 3, 1])
    x = draw(4, 128, dtype=dtype)
    for index in ((slice(1, None, 2), slice(3, None)), (slice(0, 4), slice(None, None, 3))):
        weight = each(whole, index).narrow(-1, 128, 128)
        y = on_cpu.gathered_quantized_linear(x, described(weight), expert, variant=variant)
        assert_true(y, x, weight, expert)
        out = torch.empty(*weight.shape, dtype=dtype)
        assert torch.equal(plain_values(described(weight), out, variant=variant), weight.dequantize(dtype))


@variants
@dtypes
@forms
def test_a_pair_does_not_depend_on_its_batch(variant: str, dtype: torch.dtype, form: str, group: int) -> None:
    x, weight = draw(11, 192, dtype=dtype), draw_weight(form, group, 3, 70, 192)
    expert = torch.tensor([0, 2, 2, -1, 2, 2, 1, 2, 2, 0, 2])
    y = on_cpu.gathered_quantized_linear(x, described(weight), expert, variant=variant)
    for first, size in product(range(11), (1, 2, 3, 5)):
        part = slice(first, first + size)
        assert torch.equal(
            on_cpu.gathered_quantized_linear(x[part], described(weight), expert[part], variant=variant), y[part]
        )


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@forms
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same(form: str, group: int) -> None:
    x, weight = draw(9, 256, dtype=torch.float32), draw_weight(form, group, 4, 583, 256)
    expert = torch.tensor([3, 3, 3, 0, -1, 3, 1, 3, 3])  # uneven, expert 2 idle
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(on_cpu.gathered_quantized_linear(x, described(weight), expert))
    assert all(torch.equal(result, results[0]) for result in results)


@variants
def test_long_rows_do_not_overflow(variant: str) -> None:
    depth = 2**17 + 128  # whole, an integer sum would not fit 32 bits
    x = torch.full((1, depth), 3.0, dtype=torch.bfloat16)
    codes, scale = torch.full((1, 1, depth), 127, dtype=torch.int8), torch.ones(1, 1, 1)
    weight = described(QuantizedWeight(format_of("int8"), codes, scale))
    y = on_cpu.gathered_quantized_linear(x, weight, None, variant=variant)
    torch.testing.assert_close(y, torch.full((1, 1), 127 * 3.0 * depth, dtype=torch.bfloat16))


@variants
@pytest.mark.parametrize("code", [0, 15])
def test_the_largest_levels_do_not_overflow(variant: str, code: int) -> None:
    depth = 192
    codes, scale = torch.full((1, 1, depth // 2), 17 * code, dtype=torch.uint8), torch.ones(1, 1, depth // 64)
    weight = QuantizedWeight(format_of("nf4"), codes, scale)
    x = torch.tensor([[3.0], [-3.0]], dtype=torch.bfloat16).expand(2, depth)
    y = on_cpu.gathered_quantized_linear(x, described(weight), None, variant=variant)
    level = weight.dequantize(in_steps=True)[0, 0, 0].item()
    torch.testing.assert_close(y.float(), torch.tensor([[3.0], [-3.0]]) * level * depth, rtol=2**-8, atol=0)


@variants
@forms
def test_what_is_not_a_number_shows_in_its_own_token(variant: str, form: str, group: int) -> None:
    for depth, last in ((256, 200), (192, 150)):
        weight = draw_weight(form, group, 1, 5, depth)
        x = draw(4, depth, dtype=torch.bfloat16)
        x[1, 3], x[2, last] = float("nan"), float("inf")
        y = on_cpu.gathered_quantized_linear(x, described(weight), None, variant=variant)
        assert y.isfinite().all(dim=1).tolist() == [True, False, False, True]


# ---- 8-bit activations -----------------------------------------------------------------------------------


def test_activations_keep_127_steps_for_each_128_neighbours() -> None:
    x = draw(3, 300, dtype=torch.float32)
    x[0, 5], x[1, :128] = 1000.0, 0.0
    rounded = round_activations(x)
    step = torch.stack([x[:, begin : begin + 128].abs().amax(1) / 127 for begin in (0, 128, 256)], dim=1)
    steps = step.repeat_interleave(128, dim=1)[:, :300]
    assert bool(((rounded - x).abs() <= steps * 0.5001).all())
    assert rounded[0, 5] == 1000.0
    assert bool((rounded[1, :128] == 0).all())
    whole = (rounded / torch.where(steps > 0, steps, 1)).round() * steps
    torch.testing.assert_close(whole, rounded)
    assert (x[:, 128:256] - rounded[:, 128:256]).abs().max() > 0


def test_ranks_that_hold_whole_blocks_round_as_one() -> None:
    x = draw(2, 512, dtype=torch.bfloat16)
    parts = [round_activations(x[:, begin : begin + 128]) for begin in range(0, 512, 128)]
    assert torch.equal(torch.cat(parts, dim=1), round_activations(x))


# ---- the operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [False, True])
@forms
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_dense_for_any_number_of_tokens(
    dtype: torch.dtype, form: str, group: int, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if off:
        monkeypatch.setattr("accessory.kernels.quantized.native_weight", lambda *_: None)
    monkeypatch.setattr("accessory.kernels.quantized._SCRATCH", 10 * 192)  # several blocks, the last smaller
    weight = draw_weight(form, group, 37, 192)
    w = weight.dequantize(torch.float64)
    for tokens in (0, 1, 8, 16, 17, 33, 70):
        x = draw(tokens, 192, dtype=dtype)
        truth = x.double() @ w.T
        # 8 bits of activations or of bfloat16 weights: both relative to the largest of some. A sum of 8-bit activations
        # has a deviation of 0.006 of the weights' norm; this is the largest of 600.
        # Rows in 4 bits are rounded once more for AMX's tiles, which adds up to as much again.
        error = {torch.bfloat16: 0.035 if tokens > 16 else 0.025, torch.float16: 0.002, torch.float32: 1e-5}[dtype]
        torch.testing.assert_close(
            quantized_linear(x, weight).double(), truth, rtol=error, atol=error * w.norm(dim=1).max().item()
        )
        assert quantized_linear(x, weight).dtype == dtype


@pytest.mark.parametrize("off", [False, True])
@forms
@dtypes
def test_gathered_and_grouped_agree(
    dtype: torch.dtype, form: str, group: int, off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if off:
        monkeypatch.setattr("accessory.kernels.quantized.native_weight", lambda *_: None)
    weight = draw_weight(form, group, 4, 21, 128)
    x, expert = draw(9, 128, dtype=dtype), torch.tensor([0, 0, 2, 2, 2, 2, 3, -1, -1])
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)
    gathered = gathered_quantized_linear(x, weight, expert)
    assert_true(gathered, x, weight, expert)
    grouped = grouped_quantized_linear(x, weight, ends)
    error = 0.02 if dtype == torch.bfloat16 else 1e-5
    size = weight.dequantize().norm(dim=-1).max().item()
    torch.testing.assert_close(grouped, gathered, rtol=error, atol=error * size)
    assert bool((grouped[7:] == 0).all())


def test_without_few_tokens_kernel_the_twin_serves_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw_weight("int4", 64, 30, 256), draw(3, 256, dtype=torch.bfloat16)
    native_result = quantized_linear(x, weight)
    monkeypatch.setattr("accessory.kernels.quantized.native_weight", lambda *_: None)
    torch.testing.assert_close(quantized_linear(x, weight), native_result, rtol=2**-7, atol=1e-3)
    assert torch.equal(quantized_linear(x, weight), quantized_linear_reference(x, weight))


def test_a_rank_without_experts() -> None:
    x, expert = draw(2, 64, dtype=torch.float32), torch.full((2,), -1)
    for form, group in FORMS:
        weight = draw_weight(form, group, 0, 4, 64)
        for result in (gathered_quantized_linear(x, weight, expert), quantized_linear_reference(x, weight, expert)):
            assert torch.equal(result, torch.zeros(2, 4))


def test_an_expert_that_does_not_exist_is_refused() -> None:
    x, weight = draw(3, 64, dtype=torch.float32), draw_weight("int4", 32, 2, 4, 64)
    with pytest.raises(IndexError):
        gathered_quantized_linear(x, weight, torch.tensor([0, 2, 1]))


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight = draw_weight("int4", 64, 4, 128)
    own, codes, scale, zero = weight.format, weight.codes, weight.scale, weight.zero
    assert zero is not None
    x = draw(3, 128, dtype=torch.bfloat16)
    for wrong in (
        (codes, scale[:, :1], zero[:, :1]),
        (codes, scale.float(), zero),
        (codes.float(), scale, zero),
        (codes[:2], scale, zero),
        (codes, scale, zero.int()),
        (codes, scale),
    ):
        with pytest.raises(ValueError, match=r"do not fit a weight in int4-64"):
            QuantizedWeight(own, *wrong)
        with pytest.raises(ValueError, match=r"do not fit a weight in int4-64"):
            torch.ops.accessory.dequantize(*wrong, *(() if len(wrong) == 3 else (None,)), own.key, torch.float32)
    for other in (x[:, 1:], x[0], x.int()):
        with pytest.raises(ValueError, match="does not fit a weight"):
            quantized_linear(other, weight)
    with pytest.raises(ValueError, match="one int64 for each pair"):
        gathered_quantized_linear(x, weight.stacked(), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="one int32 for each expert"):
        grouped_quantized_linear(x, weight.stacked(), torch.tensor([3]))


@forms
@dtypes
def test_operations_keep_their_promises_to_pytorch(dtype: torch.dtype, form: str, group: int) -> None:
    x, stacked = draw(3, 128, dtype=dtype), draw_weight(form, group, 4, 10, 128)
    weight, expert = stacked[0], torch.tensor([2, -1, 0])
    ends = torch.tensor([1, 1, 3, 3], dtype=torch.int32)
    operations = torch.ops.accessory
    torch.library.opcheck(operations.quantized_linear.default, (x, *unpacked(weight), None))
    torch.library.opcheck(operations.gathered_quantized_linear.default, (x, *unpacked(stacked), expert))
    torch.library.opcheck(operations.grouped_quantized_linear.default, (x, *unpacked(stacked), ends))
    torch.library.opcheck(operations.dequantize.default, (*unpacked(stacked), dtype))


def test_operations_compile_into_one_graph() -> None:
    weight = draw_weight("nf4", 64, 4, 64, 64)

    def step(x_PD: Tensor, expert_P: Tensor) -> Tensor:
        return gathered_quantized_linear(x_PD, weight, expert_P).relu() + quantized_linear(x_PD, weight[1])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, expert = draw(3, 64, dtype=torch.bfloat16), torch.tensor([2, -1, 0])
    with torch.inference_mode():
        assert torch.equal(compiled(x, expert), step(x, expert))
