"""A quantized weight: its tensors, its slices, and how it is filled.

Shape letters: E experts, R rows (outputs), D depth (inputs).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accessory.config import QuantForm
from accessory.config.quant import DEFAULT_GROUP_SIZE
from accessory.errors import shown_bytes
from accessory.quant import gptq
from accessory.quant.formats import Format, format_of
from accessory.quant.gptq import InputMoments

_AT_ONCE = 2**20  # values that are quantized at a time: bounds the float32 temporaries


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (..., R, D) in 8 or 4 bits. Any axes may stand before R: experts, or w1 beside w3.

    Inputs are quantized in groups of neighbours (a row of int8 is one), so only the last axis has an inner order: all
    tensors are cut, moved and viewed alike along the others. Its format says what they hold.

    Attributes:
        depth: D.
        kept: what `accessory.kernels` keeps about these very tensors; stale once their memory has moved.

    Raises:
        ValueError: tensors that do not fit the format, or each other.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    depth: int = field(init=False, repr=False, compare=False)
    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        depth, own = self.format.depth(self.codes), self.tensors()
        object.__setattr__(self, "depth", depth)
        fits = own.keys() == self.format.tensors.keys()
        for name, stored in self.format.tensors.items() if fits else ():
            tensor = own[name]
            fits = tensor.dtype == stored.dtype and tensor.shape[:-1] == self.codes.shape[:-1]
            fits = fits and tensor.shape[-1] * (stored.inputs or depth) == depth
            if not fits:
                break
        if not fits:
            shown = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in own.items())
            raise ValueError(f"{shown} do not fit a weight in {self.format.key}")

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        form: QuantForm,
        *,
        group_size: int = DEFAULT_GROUP_SIZE,
        device: torch.device | str = "cpu",
    ) -> "QuantizedWeight":
        """Unfilled tensors for a weight of this shape.

        Args:
            group_size: 32 or 64, of int4.

        Raises:
            ValueError: unknown form; a group size that does not serve, or does not divide the inputs.
        """
        own, depth = format_of(form, group_size), shape[-1]
        if depth % own.group:
            raise ValueError(
                f"{form} in groups of {own.group} does not divide {depth} inputs of a weight (or of a rank's slice of "
                "it): use int8, or fewer ranks, or for int4 a group size of 32"
            )
        sizes = {name: (*shape[:-1], stored.elements(depth)) for name, stored in own.tensors.items()}
        return cls(
            own,
            **{name: torch.empty(size, dtype=own.tensors[name].dtype, device=device) for name, size in sizes.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a checkpoint keeps them: 'codes', 'scale', and with int4 'zero'."""
        named = {"codes": self.codes, "scale": self.scale}
        return named if self.zero is None else {**named, "zero": self.zero}

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., R, D), of the weight that this stands for."""
        return (*self.codes.shape[:-1], self.depth)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of all tensors, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def __reduce__(self) -> tuple[type, tuple[Format, Tensor, Tensor, Tensor | None]]:
        return QuantizedWeight, (self.format, self.codes, self.scale, self.zero)  # a copy's memory is elsewhere

    def dequantize(self, dtype: torch.dtype = torch.float32, *, in_steps: bool = False) -> Tensor:
        """The plain weight (..., R, D) in PyTorch alone, on any device; `kernels.dequantize` is the faster way.

        Args:
            in_steps: with levels in 8 bits, as beside 8-bit activations.
        """
        return self.format.decode(self.codes, self.scale, self.zero, in_steps=in_steps).to(dtype)

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

    def stacked(self) -> "QuantizedWeight":
        """As the only expert of a stack."""
        return self._each(lambda tensor: tensor[None])

    def gathered(self, index: Tensor) -> "QuantizedWeight":
        """Copies of experts (the first axis) by their numbers."""
        return self._each(lambda tensor: tensor.index_select(0, index))

    def narrow(self, axis: int, start: int, length: int) -> "QuantizedWeight":
        """The part [start, start + length) along an axis, sharing memory.

        Raises:
            ValueError: a cut through a group of inputs.
        """
        axis %= len(self.shape)
        if axis < len(self.shape) - 1:
            return self._each(lambda tensor: tensor.narrow(axis, start, length))
        group = self.format.group
        if start % group or length % group:
            raise ValueError(
                f"a cut of {length} inputs at {start} goes through a group of {group}: use int8, fewer ranks, or for "
                "int4 a group size of 32"
            )
        own = self.tensors()
        for name, stored in self.format.tensors.items():
            if stored.inputs:
                own[name] = own[name].narrow(axis, start // stored.inputs, length // stored.inputs)
        return QuantizedWeight(self.format, **own)

    def write(self, values: Tensor, *, row_max: Tensor | None = None) -> "QuantizedWeight":
        """Quantize ``values`` (..., R, D), in any floating dtype, into these tensors; returns itself.

        Together with `narrow` this fills a weight slice by slice. The work goes on in float32 on the values' device,
        about a million of them at a time.

        Args:
            row_max: (..., R), for int8 where these are only a part of longer rows (of another rank, or of a slice
                along the inputs): the largest magnitude of each whole row. See `row_maximum`.

        Raises:
            ValueError: another shape; infinities or NaN among the values; row_max with another form.
        """
        if tuple(values.shape) != self.shape:
            raise ValueError(f"values of shape {tuple(values.shape)} do not fill a weight of {self.shape}")
        if row_max is not None and (not self.format.whole_rows or row_max.shape != values.shape[:-1]):
            raise ValueError(f"row_max {tuple(row_max.shape)} is for int8, one for each of {tuple(values.shape[:-1])}")
        for index in _row_slices(self.shape):
            part = values[index].float()
            _check_finite(part)
            encoded = self.format.encode(part, *(() if row_max is None else (row_max[index],)))
            for kept, new in zip(self.tensors().values(), encoded, strict=True):
                kept[index] = new.to(kept.device)
        return self

    def keep(self, codes: Tensor, factors: Tensor) -> bool:
        """Take codes (..., R, D) of this format as they are, where all of a group have one factor; returns whether.

        Args:
            factors: of each code, float32 (..., R, D).

        Raises:
            ValueError: infinities or NaN among the values.
        """
        own = factors.unflatten(-1, (-1, self.format.group))
        if not torch.equal(own, own[..., :1].expand_as(own)):
            return False
        for index in _row_slices(self.shape):
            _check_finite(codes[index].float() * factors[index])
        self.codes.copy_(codes)
        self.scale.copy_(own[..., 0])
        return True

    def _each(self, change: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        zero = None if self.zero is None else change(self.zero)
        return QuantizedWeight(self.format, change(self.codes), change(self.scale), zero)


def quantize_calibrated(values_RD: Tensor, moments: InputMoments, form: Format) -> QuantizedWeight:
    """A matrix in a format that can be `Format.calibrated`, with an eye on its inputs; see `gptq`.

    Raises:
        ValueError: infinities or NaN among the values, or among what its inputs were.
    """
    values_RD = values_RD.float()
    _check_finite(values_RD)
    if not bool(moments.sums.isfinite().all()):
        raise ValueError("its inputs in the calibration have infinities or NaN")
    return QuantizedWeight(form, *gptq.encode(values_RD, moments, form.group))


def quantize(
    values: Tensor, form: QuantForm, *, group_size: int = DEFAULT_GROUP_SIZE, row_max: Tensor | None = None
) -> QuantizedWeight:
    """A weight (..., R, D) in 8 or 4 bits, on its own device; see `QuantizedWeight.empty` and `write`."""
    empty = QuantizedWeight.empty(tuple(values.shape), form, group_size=group_size, device=values.device)
    return empty.write(values, row_max=row_max)


def _check_finite(values: Tensor) -> None:
    if values.numel() and not bool(values.abs().amax().isfinite()):  # isfinite of them all took 6 times as long
        raise ValueError("a weight with infinities or NaN cannot be quantized")


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
