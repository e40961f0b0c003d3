"""A quantized weight: its tensors, its slices, and how it is filled.

Shape letters: E experts, R rows (outputs), D depth (inputs).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from accessory.config import QUANT_FORMS, QuantForm
from accessory.errors import shown_bytes
from accessory.kernels import NativeWeight, dequantize, described
from accessory.kernels.quantized import GROUPS, NF4_GROUP, depth_of, form_of
from accessory.quant import gptq, int4, int8, nf4
from accessory.quant.gptq import InputMoments

_AT_ONCE = 2**20  # values that are quantized at a time: bounds the float32 temporaries


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (..., R, D) in 8 or 4 bits. Any axes may stand before R: experts, or w1 beside w3.

    Inputs are quantized in groups of neighbours (a row of int8 is one), so only the last axis has an inner order: all
    tensors are cut, moved and viewed alike along the others. `accessory.kernels.quantized` says what they hold.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], form: QuantForm, *, group_size: int = 64, device: torch.device | str = "cpu"
    ) -> "QuantizedWeight":
        """Unfilled tensors for a weight of this shape.

        Args:
            group_size: 32 or 64, of int4.

        Raises:
            ValueError: unknown form; a group size that does not serve, or does not divide the inputs.
        """
        group = _group(form, shape[-1], group_size)
        if form == "int8":
            codes = torch.empty(shape, dtype=torch.int8, device=device)
            return cls(codes, torch.empty(*shape[:-1], 1, device=device))
        codes = torch.empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device)
        groups = (*shape[:-1], shape[-1] // group)
        if form == "nf4":
            return cls(codes, torch.empty(groups, device=device))
        scale = torch.empty(groups, dtype=torch.bfloat16, device=device)
        return cls(codes, scale, torch.empty(groups, dtype=torch.uint8, device=device))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "QuantizedWeight":
        """The inverse of `tensors`."""
        return cls(tensors["codes"], tensors["scale"], tensors.get("zero"))

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a checkpoint keeps them: 'codes', 'scale', and with int4 'zero'."""
        named = {"codes": self.codes, "scale": self.scale}
        return named if self.zero is None else {**named, "zero": self.zero}

    @property
    def form(self) -> QuantForm:
        form: QuantForm = form_of(self.codes, self.zero)  # type: ignore[assignment]
        return form

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; with int8 the rank's whole row."""
        return self.shape[-1] // max(1, self.scale.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., R, D), of the weight that this stands for."""
        return (*self.codes.shape[:-1], depth_of(self.codes))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of all tensors, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @cached_property
    def native(self) -> NativeWeight | None:
        """As the native library reads it, None where it does not; stale once the tensors' memory has moved."""
        return described(self.codes, self.scale, self.zero)

    def __reduce__(self) -> tuple[type, tuple[Tensor, Tensor, Tensor | None]]:
        return QuantizedWeight, (self.codes, self.scale, self.zero)  # a copy's memory is elsewhere

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The plain weight (..., R, D)."""
        return dequantize(self.codes, self.scale, self.zero, dtype)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        return self._each(lambda tensor: tensor.to(device))

    def flatten(self, start: int, end: int) -> "QuantizedWeight":
        """Axes ``start`` to ``end`` become one; the last axis, of the inputs, cannot be among them."""
        if end % self.codes.dim() == self.codes.dim() - 1:
            raise ValueError("the inputs of a quantized weight cannot be flattened into another axis")
        return self._each(lambda tensor: tensor.flatten(start, end))

    def __getitem__(self, index: int) -> "QuantizedWeight":
        """One expert's (the first axis)."""
        return self._each(lambda tensor: tensor[index])

    def narrow(self, axis: int, start: int, length: int) -> "QuantizedWeight":
        """The part [start, start + length) along an axis, sharing memory.

        Raises:
            ValueError: a cut through a group of inputs.
        """
        axis %= len(self.shape)
        if axis < len(self.shape) - 1:
            return self._each(lambda tensor: tensor.narrow(axis, start, length))
        if self.form == "int8":
            return QuantizedWeight(self.codes.narrow(axis, start, length), self.scale)
        group = self.group_size
        if start % group or length % group:
            raise ValueError(
                f"a cut of {length} inputs at {start} goes through a group of {group}: use int8, fewer ranks, or for "
                "int4 a group size of 32"
            )

        def cut(tensor: Tensor) -> Tensor:
            shared = 2 if tensor is self.codes else group  # inputs for each element
            return tensor.narrow(axis, start // shared, length // shared)

        return self._each(cut)

    def write(self, values: Tensor, *, row_max: Tensor | None = None) -> "QuantizedWeight":
        """Quantize ``values`` (..., R, D), in any floating dtype, into these tensors; returns itself.

        Together with `narrow` this fills a weight slice by slice. The work goes on in float32 on the values' device,
        about a million of them at a time.

        Args:
            row_max: (..., R), for int8 where these are only a part of longer rows (of another rank, or of a slice
                along the inputs): the largest magnitude of each whole row. See `int8.row_maximum`.

        Raises:
            ValueError: another shape; infinities or NaN among the values; row_max with another form.
        """
        if tuple(values.shape) != self.shape:
            raise ValueError(f"values of shape {tuple(values.shape)} do not fill a weight of {self.shape}")
        if row_max is not None and (self.form != "int8" or row_max.shape != values.shape[:-1]):
            raise ValueError(f"row_max {tuple(row_max.shape)} is for int8, one for each of {tuple(values.shape[:-1])}")
        for index in _row_slices(self.shape):
            part = values[index].float()
            _check_finite(part)
            encoded = self._encode(part, None if row_max is None else row_max[index])
            for kept, new in zip(self.tensors().values(), encoded, strict=True):
                kept[index] = new.to(kept.device)
        return self

    def _encode(self, values_RD: Tensor, row_max: Tensor | None) -> tuple[Tensor, ...]:
        if self.form == "int8":
            return int8.encode(values_RD, row_max)
        return nf4.encode(values_RD) if self.form == "nf4" else int4.encode(values_RD, self.group_size)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        zero = None if self.zero is None else change(self.zero)
        return QuantizedWeight(change(self.codes), change(self.scale), zero)


def quantize_calibrated(values_RD: Tensor, moments: InputMoments, *, group_size: int = 64) -> QuantizedWeight:
    """A matrix in int4, with an eye on its inputs; see `gptq`.

    Raises:
        ValueError: infinities or NaN among the values, or among what its inputs were.
    """
    values_RD = values_RD.float()
    _check_finite(values_RD)
    if not bool(moments.sums.isfinite().all()):
        raise ValueError("its inputs in the calibration have infinities or NaN")
    return QuantizedWeight(*gptq.encode(values_RD, moments, group_size))


def quantize(
    values: Tensor, form: QuantForm, *, group_size: int = 64, row_max: Tensor | None = None
) -> QuantizedWeight:
    """A weight (..., R, D) in 8 or 4 bits, on its own device; see `QuantizedWeight.empty` and `write`."""
    empty = QuantizedWeight.empty(tuple(values.shape), form, group_size=group_size, device=values.device)
    return empty.write(values, row_max=row_max)


def _check_finite(values: Tensor) -> None:
    if values.numel() and not bool(values.abs().amax().isfinite()):  # isfinite of them all took 6 times as long
        raise ValueError("a weight with infinities or NaN cannot be quantized")


def _group(form: str, depth: int, group_size: int) -> int:
    if form not in QUANT_FORMS:
        raise ValueError(f"quant={form} is unknown: it may be {', '.join(QUANT_FORMS)}")
    if form == "int8":
        return depth
    group = NF4_GROUP if form == "nf4" else group_size
    if form == "int4" and group not in GROUPS:
        raise ValueError(f"group size {group} is not offered: it may be {' or '.join(map(str, GROUPS))}")
    if depth % group:
        raise ValueError(
            f"{form} in groups of {group} does not divide {depth} inputs of a weight (or of a rank's slice of it): "
            "use int8, or fewer ranks, or for int4 a group size of 32"
        )
    return group


def _row_slices(shape: tuple[int, ...]) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut a weight (..., R, D) into blocks (r, D) of at most about _AT_ONCE values."""
    rows = max(1, _AT_ONCE // max(1, shape[-1]))
    for place in range(math.prod(shape[:-2])):
        index: list[int] = []
        for size in reversed(shape[:-2]):
            place, at = divmod(place, size)
            index.insert(0, at)
        for begin in range(0, shape[-2], rows):
            yield (*index, slice(begin, begin + rows))


def shown_quantized(count: int, weights: int) -> str:
    """What quantized matrices take, for a message: ``count`` bytes for so many weights, beside bfloat16's two each."""
    plain = 2 * weights
    return f"{shown_bytes(count)}, {count / max(1, plain):.1%} of bfloat16's {shown_bytes(plain)}"
