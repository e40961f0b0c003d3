"""Quantized weights: their formats against other people's and against bounds, their sizes, slices and filling."""

import copy

import pytest
import torch
from torch import Tensor

from accessory.config import QUANT_FORMS, QuantArgs, QuantForm
from accessory.config.quant import GROUP_SIZES
from accessory.quant import (
    FORMATS,
    QuantizedParameter,
    QuantizedWeight,
    as_bits,
    format_of,
    lay_out_for_gpu,
    quantize,
    row_maximum,
)

BF16 = torch.bfloat16
forms = pytest.mark.parametrize(
    ("form", "group"), [("int8", 64), ("int4", 32), ("int4", 64), ("nf4", 64), ("fp8", 128), ("mxfp4", 32)]
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 10


def equal(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    names = a.tensors().keys() == b.tensors().keys()
    return names and all(
        torch.equal(as_bits(tensor), as_bits(b.tensors()[name])) for name, tensor in a.tensors().items()
    )


def test_files_and_flags_may_say_what_there_is() -> None:
    groups: dict[str, tuple[int, ...]] = {}
    for form in FORMATS.values():
        groups[form.name] = (*groups.get(form.name, ()), form.group)
    assert tuple(groups) == QUANT_FORMS
    assert {name: sizes for name, sizes in groups.items() if len(sizes) > 1} == GROUP_SIZES


# ---- the formats -----------------------------------------------------------------------------------------


def test_nf4_is_bitsandbytes() -> None:
    """What quantize_4bit(x, blocksize=64, quant_type="nf4") of bitsandbytes 0.50.2 made of these 3 blocks."""
    x = ((torch.arange(-96, 96) * 37 % 101 - 50).float() / 50 * torch.arange(1, 193) / 64).view(1, 192)
    codes = bytes.fromhex(
        "77787767867968a6946a47b58c6a37b38d4a15b27d39e4b15d17e2af4c06e18f5926a37c48d5a26b37c39e5a26c28d3a"
        "15b16d28e4a15c17e29e4b16d18e2af4b26c38e4a15c27d39e4b16c27e3ae4c16d28e3a05c17e29f3b05d17e2af4c06e"
    )
    weight = quantize(x, "nf4")
    assert bytes(weight.codes.flatten().tolist()) == codes
    torch.testing.assert_close(weight.scale, torch.tensor([[0.8575, 1.984375, 2.805]]))


def test_int8_by_hand() -> None:
    weight = quantize(torch.tensor([[1.27, -0.63, 0.004, 0.006], [0.0, 0.0, 0.0, 0.0]]), "int8")
    assert weight.codes.tolist() == [[127, -63, 0, 1], [0, 0, 0, 0]]
    torch.testing.assert_close(weight.scale, torch.tensor([[0.01], [0.0]]))


def test_fp8_by_hand() -> None:
    """The largest is 448; between 16 and 18 the even mantissa; the least number; and a block of zeros."""
    values = torch.zeros(1, 256)
    values[0, :4] = torch.tensor([448.0, -17.0, 17.5, 2**-9])
    weight = quantize(values, "fp8")
    assert weight.scale.tolist() == [[1.0, 0.0]]
    assert weight.codes[0, :4].tolist() == [448.0, -16.0, 18.0, 2**-9]
    assert weight.dequantize()[0, 128:].eq(0).all()


def test_fp8_keeps_codes_whose_groups_have_one_factor() -> None:
    codes = draw(4, 256).to(torch.float8_e4m3fn)
    factors = torch.rand(4, 2).repeat_interleave(128, 1)
    weight = QuantizedWeight.empty((4, 256), "fp8")
    assert weight.keep(codes, factors)
    assert torch.equal(weight.dequantize(), codes.float() * factors)
    before = weight.dequantize()
    factors[2, 5] *= 2
    assert not weight.keep(codes, factors)
    assert torch.equal(weight.dequantize(), before)
    factors[2, 5] /= 2
    codes.view(torch.uint8)[1, 7] = 0x7F
    with pytest.raises(ValueError, match="infinities or NaN"):
        weight.keep(codes, factors)


def test_mxfp4_by_hand() -> None:
    """Between two levels the even code; a largest of 8, which is 4 of the next power, of 7 too; a block of zeros."""
    values = torch.zeros(1, 128)
    values[0, :8] = torch.tensor([6.0, 0.25, 0.75, -2.5, 3.5, 5.0, -5.1, 0.5])
    values[0, 32], values[0, 33], values[0, 64] = 8.0, -0.9, 7.5
    weight = quantize(values, "mxfp4")
    assert weight.scale.tolist() == [[1.0, 2.0, 2.0, 0.0]]
    assert weight.codes[0, :4].tolist() == [0x70, 0x2C, 0x66, 0xF1]
    expected = values.clone()
    expected[0, :8] = torch.tensor([6.0, 0.0, 1.0, -2.0, 4.0, 4.0, -6.0, 0.5])
    expected[0, 33], expected[0, 64] = -1.0, 8.0
    assert torch.equal(weight.dequantize(), expected)


def test_mxfp4_encodes_what_it_holds_without_a_loss() -> None:
    """Whatever power of two a block has been given."""
    codes = torch.randint(256, (64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes[:8] &= 0x99  # blocks of small levels: other powers would hold them too
    scale = torch.ldexp(torch.ones(64, 6), torch.randint(-100, 100, (64, 6))).bfloat16()
    values = QuantizedWeight(format_of("mxfp4"), codes, scale).dequantize()
    assert torch.equal(quantize(values.bfloat16(), "mxfp4").dequantize(), values)


def test_int4_by_hand() -> None:
    """Steps of 0.25 from -1 to 2.75; a group that is all above zero, and one of zeros."""
    values = torch.zeros(1, 96)
    values[0, :4] = torch.tensor([-1.0, 2.75, 0.25, 0.4])
    values[0, 32:64] = 3.75
    weight = quantize(values, "int4", group_size=32)
    assert weight.zero is not None
    assert weight.scale.tolist() == [[0.25, 0.25, 0.0]]
    assert weight.zero.tolist() == [[64, 0, 0]]
    assert weight.codes[0, :3].tolist() == [0x0F, 0x56, 0x44]
    expected = values.clone()
    expected[0, 3] = 0.5
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@forms
def test_no_value_moves_further_than_its_step_allows(form: str, group: int, dtype: torch.dtype) -> None:
    values = (draw(40, 384) * torch.logspace(-6, 2, 40)[:, None] + draw(40, 1)).to(dtype)
    values = values.float()
    back = quantize(values, form, group_size=group).dequantize()  # type: ignore[arg-type]
    groups, errors = values.unflatten(1, (-1, group)), (back - values).unflatten(1, (-1, group)).abs().amax(-1)
    largest = groups.abs().amax(-1)
    if form == "int8":
        allowed = (row_maximum(values) / 127 / 2).expand_as(errors)
    elif form == "int4":
        span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
        # half a step, half a sixteenth of one for the zero point, and bfloat16's rounding of 15 steps
        allowed = span / 15 * (1 / 2 + 1 / 32) + span * 2**-8
    elif form == "fp8":
        allowed = largest * 2**-4  # half the last bit of four
    elif form == "mxfp4":
        allowed = largest / 4  # half the widest gap, and what is cut of a largest one that is almost 8
    else:
        allowed = largest * (1 - 0.6961928) / 2  # half the widest gap of the levels
    assert bool((errors <= allowed * 1.001 + 1e-12).all())
    assert errors.max() > 0


@forms
def test_size_is_within_what_is_allowed(form: str, group: int) -> None:
    for shape in ((256, 256), (8, 2, 64, 256)):
        weight = quantize(draw(*shape), form, group_size=group)  # type: ignore[arg-type]
        assert weight.nbytes <= (0.53 if form in ("int8", "fp8") else 0.31) * 2 * draw(*shape).numel()
        assert weight.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in weight.tensors().values())


@forms
def test_a_weight_that_is_not_finite_is_refused(form: str, group: int) -> None:
    for bad in (float("nan"), float("inf")):
        values = draw(3, 128)
        values[1, 5] = bad
        with pytest.raises(ValueError, match="infinities or NaN"):
            quantize(values, form, group_size=group)  # type: ignore[arg-type]


# ---- slices ----------------------------------------------------------------------------------------------


@forms
def test_slices_are_slices_of_the_plain_weight(form: str, group: int) -> None:
    weight = quantize(draw(4, 2, 24, 256), form, group_size=group)  # type: ignore[arg-type]
    plain = weight.dequantize()
    assert (weight.shape, plain.shape, weight.format.name) == ((4, 2, 24, 256), (4, 2, 24, 256), form)
    for axis, start, length in ((0, 1, 2), (1, 1, 1), (2, 5, 12), (-2, 20, 4), (3, 0, 128), (-1, 128, 128)):
        part = weight.narrow(axis, start, length)
        assert torch.equal(part.dequantize(), plain.narrow(axis, start, length))
    assert torch.equal(weight[3].dequantize(), plain[3])
    assert torch.equal(weight.flatten(1, 2).dequantize(), plain.flatten(1, 2))
    assert torch.equal(weight.narrow(2, 6, 12).flatten(1, 2).dequantize(), plain[:, :, 6:18].flatten(1, 2))
    assert torch.equal(weight.dequantize(BF16), plain.to(BF16))


@forms
def test_a_slice_quantizes_as_the_whole_does(form: str, group: int) -> None:
    values = draw(3, 24, 256)
    whole = quantize(values, form, group_size=group)  # type: ignore[arg-type]
    assert equal(quantize(values[1:, 6:18], form, group_size=group), whole.narrow(0, 1, 2).narrow(1, 6, 12))  # type: ignore[arg-type]
    row_max = row_maximum(values).squeeze(-1) if form == "int8" else None
    part = quantize(values[..., 128:], form, group_size=group, row_max=row_max)  # type: ignore[arg-type]
    assert equal(part, whole.narrow(-1, 128, 128))


@forms
def test_filling_by_slices_in_any_order_is_filling_at_once(form: str, group: int) -> None:
    values = draw(3, 24, 256)
    weight = QuantizedWeight.empty((3, 24, 256), form, group_size=group)  # type: ignore[arg-type]
    row_max = row_maximum(values).squeeze(-1)
    for axis_start in (128, 0):
        for expert in (2, 0, 1):
            part = weight.narrow(0, expert, 1).narrow(-1, axis_start, 128)
            own = row_max[expert : expert + 1] if form == "int8" else None
            part.write(values[expert : expert + 1, :, axis_start : axis_start + 128], row_max=own)
    assert equal(weight, quantize(values, form, group_size=group))  # type: ignore[arg-type]


@forms
def test_blocks_of_rows_make_no_difference(form: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(2, 3, 10, 128)
    at_once = quantize(values, form, group_size=group)  # type: ignore[arg-type]
    monkeypatch.setattr("accessory.quant.weight._AT_ONCE", 3 * 128)
    assert equal(quantize(values, form, group_size=group), at_once)  # type: ignore[arg-type]


@forms
def test_tensors_and_back(form: str, group: int) -> None:
    weight = quantize(draw(2, 8, 128), form, group_size=group)  # type: ignore[arg-type]
    again = copy.deepcopy(weight)
    assert equal(weight, again)
    assert (again.format, again.shape) == (weight.format, (2, 8, 128))
    assert (again.to("meta").device.type, again.to("meta").shape) == ("meta", (2, 8, 128))
    assert again.format.group == (1 if form == "int8" else group)


# ---- bad input -------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_a_line() -> None:
    for arguments, message in (
        (((4, 64), "int3"), "quant=int3 is unknown: it may be int8, int4, nf4, fp8, mxfp4"),
        (((4, 96), "nf4"), "nf4 in groups of 64 does not divide 96 inputs"),
        (((4, 96), "int4"), "use int8, or fewer ranks, or for int4 a group size of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.empty(*arguments)
    with pytest.raises(ValueError, match="group size 48 is not offered: it may be 32 or 64"):
        QuantizedWeight.empty((4, 96), "int4", group_size=48)
    weight = quantize(draw(4, 128), "int4")
    with pytest.raises(ValueError, match="a cut of 32 inputs at 64 goes through a group of 64"):
        weight.narrow(1, 64, 32)
    with pytest.raises(ValueError, match="cannot be flattened"):
        weight.flatten(0, 1)
    with pytest.raises(ValueError, match=r"shape \(4, 64\) do not fill"):
        weight.write(draw(4, 64))
    with pytest.raises(ValueError, match="is for int8, one for each of"):
        weight.write(draw(4, 128), row_max=torch.ones(4))
    with pytest.raises(ValueError, match="is for int8, one for each of"):
        quantize(draw(4, 128), "int8", row_max=torch.ones(1))


@pytest.mark.parametrize("form", QUANT_FORMS)
@pytest.mark.parametrize("shape", [(6, 128), (3, 7, 128), (3, 2, 5, 128)])
def test_the_layout_for_gpus_changes_no_value(shape: tuple[int, ...], form: QuantForm) -> None:
    matrix = QuantizedParameter(shape, QuantArgs(type=form), torch.device("cpu"))
    matrix.to_local().write(torch.randn(shape))
    before = {name: tensor.clone() for name, tensor in matrix.to_local().tensors().items()}
    lay_out_for_gpu(matrix)
    after = matrix.to_local()
    for name, tensor in after.tensors().items():
        assert torch.equal(as_bits(tensor), as_bits(before[name]))
        if name != "codes":
            rows = tensor.flatten(1, -2) if tensor.dim() > 2 else tensor
            assert rows.stride(-2) == 1
            assert rows.data_ptr() == tensor.data_ptr(), "a product would copy it"
