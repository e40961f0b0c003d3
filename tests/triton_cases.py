"""What the Triton kernels have to fulfil, on tensors of any device: the cases of tests/test_triton_kernels.py.

As a script it runs them all on CPU under Triton's interpreter, which must be chosen before Triton is imported, and so
by a process of its own; it prints what failed, by case, as JSON.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from triton_runs import report_failures

from accessory.kernels import products, quantized
from accessory.kernels.activations import round_activations
from accessory.kernels.products import gathered_linear_reference
from accessory.kernels.triton import products as on_gpu
from accessory.quant import QuantizedWeight, format_of

Weight = Tensor | QuantizedWeight
FORMS = {"plain": 1, "int8": 1, "int4-32": 32, "int4-64": 64, "nf4": 64}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROWS = (1, 3, 4, 16, 17, 8, 2, 13, 5)


ON_GPU: dict[str, Callable[..., Tensor]] = {
    "few_token_linear": on_gpu.few_token_linear,
    "gathered_linear": on_gpu.gathered_linear,
    "quantized_linear": on_gpu.quantized_linear,
    "gathered_quantized_linear": on_gpu.gathered_quantized_linear,
    "grouped_quantized_linear": on_gpu.grouped_quantized_linear,
    "dequantize": on_gpu.plain_values,
}


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(device)


def draw_weight(form: str, *shape: int, dtype: torch.dtype, device: str) -> Weight:
    """Every code, and scales and zero points that are not those of one group repeated."""
    if form == "plain":
        return draw(*shape, dtype=dtype, device=device)
    generator, own = torch.Generator().manual_seed(sum(shape)), format_of(form.partition("-")[0], FORMS[form])
    if form == "int8":
        codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scale = torch.rand(*shape[:-1], 1, generator=generator) / 64
        return QuantizedWeight(own, codes.to(device), scale.to(device))
    codes = torch.randint(256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8).to(device)
    scale = torch.rand(*shape[:-1], shape[-1] // FORMS[form], generator=generator) / 4
    if form == "nf4":
        return QuantizedWeight(own, codes, scale.to(device))
    zero = torch.randint(256, scale.shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(own, codes, scale.bfloat16().to(device), zero.to(device))


def each(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    if isinstance(weight, Tensor):
        return change(weight)
    return QuantizedWeight(weight.format, *map(change, weight.tensors().values()))


def depths(form: str) -> tuple[int, ...]:
    if form in ("plain", "int8"):
        return (1, 7, 64, 512, 304, 511, 528, 513, 1030)
    return tuple(FORMS[form] * count for count in (1, 2, 3, 5, 7, 8, 9, 16, 17))


def multiply(x_PD: Tensor, weight: Weight, expert_P: Tensor | None) -> Tensor:
    """The operation; from a tensor on CPU it would go to other kernels, so there what it calls on GPU."""
    names, module = ("few_token_linear", "gathered_linear"), products
    if isinstance(weight, QuantizedWeight):
        names, module = ("quantized_linear", "gathered_quantized_linear"), quantized
    name = names[0 if expert_P is None else 1]
    operation = getattr(module, name) if x_PD.is_cuda else ON_GPU[name]
    return operation(x_PD, weight, *(() if expert_P is None else (expert_P,)))


def multiply_plainly(x_PD: Tensor, weight: Weight, expert_P: Tensor | None, way: str) -> Tensor:
    """The plain twins in float64; with activations and levels in 8 bits where the kernels take them so."""
    rounds = isinstance(weight, QuantizedWeight) and in_integers(x_PD, weight, way)
    x = round_activations(x_PD).double() if rounds else x_PD.double()
    w = weight.double() if isinstance(weight, Tensor) else weight.dequantize(torch.float64, in_steps=rounds)
    return x @ w.T if expert_P is None else gathered_linear_reference(x, w, expert_P)


def in_integers(x_PD: Tensor, weight: QuantizedWeight, way: str) -> bool:
    few = way == "gathered" or (way == "dense" and x_PD.shape[0] <= 16)
    return few and x_PD.dtype == torch.bfloat16 and weight.format.group != 32


def assert_true(x_PD: Tensor, weight: Weight, expert_P: Tensor | None) -> None:
    """The product is the float64 one, to within float32 sums and the rounding to x's dtype."""
    y_PR = multiply(x_PD, weight, expert_P)
    if expert_P is not None:
        assert bool((y_PR[expert_P < 0] == 0).all())
    way = "dense" if expert_P is None else "gathered"
    assert_near(y_PR, multiply_plainly(x_PD, weight, expert_P, way), x_PD, weight)


def assert_near(y_PR: Tensor, truth: Tensor, x_PD: Tensor, weight: Weight) -> None:
    assert (y_PR.dtype, y_PR.shape, y_PR.device) == (x_PD.dtype, truth.shape, x_PD.device)
    form = "plain" if isinstance(weight, Tensor) else weight.format.name
    largest = 16 * weight.scale.double().abs().amax() if form == "int4" else _largest(weight)
    terms = largest * x_PD.double().abs().sum(1, keepdim=True)
    rounding = torch.finfo(y_PR.dtype).eps / 2 * (1 + 2**-10)  # to the nearest
    if y_PR.dtype == torch.bfloat16 and x_PD.is_cpu:
        rounding *= 2  # the interpreter cuts to bfloat16
    allowed = rounding * truth.abs() + (x_PD.shape[1] / 64 + 16) * 2**-24 * terms + 2**-25
    if form == "nf4":
        allowed += rounding * terms  # the levels of nf4 are rounded to x's dtype as well
    off = ((y_PR.double() - truth).abs() / allowed).max().item()
    assert off <= 1, f"{tuple(x_PD.shape)} by {form} {tuple(weight.shape)}: {off:.2f} of what is allowed"


def _largest(weight: Weight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.double().abs().amax()
    return weight.codes.double().abs().amax() * weight.scale.double().amax()


def sweep(form: str, dtype: torch.dtype, device: str) -> None:
    """1 to 17 pairs, 1 to 8 experts, ragged rows and depths; and the same tokens with one weight for all."""
    for pairs, rows, depth in zip((1, 2, 3, 4, 5, 9, 8, 12, 17), ROWS, depths(form), strict=True):
        experts = pairs if pairs < 9 else 3
        x = draw(pairs, depth, dtype=dtype, device=device)
        weight = draw_weight(form, experts, rows, depth, dtype=dtype, device=device)
        expert = torch.randint(-1, experts, (pairs,), generator=torch.Generator().manual_seed(pairs)).to(device)
        assert on_gpu.serves(x, weight if isinstance(weight, Tensor) else weight.codes)
        assert_true(x, weight, expert)
        assert_true(x, weight[-1], None)


def views(form: str, dtype: torch.dtype, device: str) -> None:
    """Some experts, some rows and the second half of the inputs of a weight, activations and experts with gaps."""
    whole = draw_weight(form, 9, 20, 256, dtype=dtype, device=device)
    x = draw(8, 256, dtype=dtype, device=device)[::2, 128:]
    expert = torch.tensor([1, 9, -1, 9, 3, 9, 1], device=device)[::2]
    for index in ((slice(1, None, 2), slice(3, None)), (slice(0, 4), slice(None, None, 3))):
        some = each(whole, lambda part, index=index: part[index]).narrow(-1, 128, 128)
        assert_true(x, some, expert)
        assert_true(x, some[2], None)
    if isinstance(whole, QuantizedWeight) and whole.format.in_halves:  # scales and zero points of a group as neighbours
        apart = [
            part.transpose(1, 2).contiguous().transpose(1, 2)
            for name, part in whole.tensors().items()
            if name != "codes"
        ]
        apart = QuantizedWeight(whole.format, whole.codes, *apart)
        wide = draw(3, 256, dtype=dtype, device=device)
        assert_true(wide, apart, expert[:3])
        assert_true(wide, apart[4], None)
    if form == "plain":  # no unit stride: the reference serves
        assert not on_gpu.serves(x, whole.transpose(1, 2))
        across = draw(4, 128, 5, dtype=dtype, device=device).transpose(1, 2)
        assert torch.equal(products.gathered_linear(x, across, expert), gathered_linear_reference(x, across, expert))


def experts(form: str, dtype: torch.dtype, device: str) -> None:
    """A pair knows nothing of the others; what no pair chose is not read; none, or one too high, is no accident."""
    x = draw(6, 192, dtype=dtype, device=device)
    weight = draw_weight(form, 4, 11, 192, dtype=dtype, device=device)
    expert = torch.tensor([0, 2, -1, 2, 3, 0], device=device)
    y = multiply(x, weight, expert)
    for first, size in ((0, 1), (1, 3), (4, 2), (5, 1)):
        part = slice(first, first + size)
        assert torch.equal(multiply(x[part], weight, expert[part]), y[part])
    unread = weight if isinstance(weight, Tensor) else weight.scale  # the part that can hold what is not a number
    unread[1], x[0] = float("nan"), float("nan")
    y = multiply(x, weight, torch.tensor([0, 2, -1, 0, 4, 3], device=device))
    assert y.isnan().any(dim=1).tolist() == [True, False, False, False, True, False]
    assert bool(y[4].isnan().all())
    unread[0] = float("nan")  # right before the first expert that there is
    assert bool((multiply(x[1:3], each(weight, lambda part: part[1:]), expert.new_tensor([-1, 1]))[0] == 0).all())
    nobody = multiply(x, each(weight, lambda part: part[:0]), torch.full((6,), -1, device=device))
    assert torch.equal(nobody, torch.zeros_like(y))
    assert multiply(x[:0], weight, expert[:0]).shape == (0, 11)


def many(form: str, dtype: torch.dtype, device: str) -> None:
    """More tokens than one tile takes, in any order, or sorted by expert with some that belong to nobody."""
    depth, rows = depths(form)[-2], 37
    for pairs, number in ((17, 5), (70, 3), (200, 8), (131, 1))[: 4 if device == "cuda" else 2]:
        x = draw(pairs, depth, dtype=dtype, device=device)
        weight = draw_weight(form, number, rows, depth, dtype=dtype, device=device)
        expert = torch.randint(-1, number, (pairs,), generator=torch.Generator().manual_seed(pairs)).to(device)
        assert_true(x, weight, expert)
        if form == "plain":
            continue
        assert_true(x, weight[-1], None)
        expert, order = torch.where(expert < 0, number, expert).sort()
        ends = torch.nn.functional.one_hot(expert, number + 1).sum(0)[:number].cumsum(0).to(torch.int32)
        x = x[order]
        grouped = quantized.grouped_quantized_linear if x.is_cuda else ON_GPU["grouped_quantized_linear"]
        y = grouped(x, weight, ends)
        assert_near(y, multiply_plainly(x, weight, torch.where(expert == number, -1, expert), "sorted"), x, weight)


def deep(form: str, dtype: torch.dtype, device: str) -> None:
    """So deep that programs share the depth; not in whole tiles."""
    for depth in (2048, 128 * 17 + (0 if form != "plain" else 3)):
        x = draw(3, depth, dtype=dtype, device=device)
        weight = draw_weight(form, 2, 5, depth, dtype=dtype, device=device)
        assert_true(x, weight, torch.tensor([1, -1, 0], device=device))
        assert_true(x, weight[0], None)


def plain(form: str, dtype: torch.dtype, device: str) -> None:
    """The plain weight, of one matrix and of a stack, as its twin makes it."""
    if form == "plain":
        return
    for shape in ((3, 5, depths(form)[-1]), (1, depths(form)[0]), (7, depths(form)[4]), (2, 1, 9, depths(form)[6])):
        weight = draw_weight(form, *shape, dtype=dtype, device=device)
        made = (quantized.dequantize if device == "cuda" else ON_GPU["dequantize"])(weight, dtype)
        truth = weight.dequantize(torch.float64)
        assert (made.dtype, made.shape) == (dtype, truth.shape)
        rounding = torch.finfo(dtype).eps * (1 if made.is_cuda else 2)
        assert bool(((made.double() - truth).abs() <= rounding * truth.abs() + 2**-25).all())


def cases(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for check in (sweep, views, experts, many, deep, plain):
        for form in FORMS:
            for name, dtype in DTYPES.items():
                yield f"{check.__name__} {form} {name}", partial(check, form, dtype, device)


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    report_failures(cases("cpu"))
    assert on_gpu.available()


if __name__ == "__main__":
    main()
