"""A quantized weight as parameters of a module, so that whatever splits, shards, moves or saves them takes it along."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accessory.config import QuantArgs
from accessory.pages import in_large_pages
from accessory.quant.formats import TENSOR_DTYPES, Format, format_of
from accessory.quant.weight import QuantizedWeight

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


class QuantizedParameter(nn.Module):
    """Stands where a matrix's parameter stood; frozen and uninitialised until a loader fills it.

    Its parameters are named as the checkpoint's tensors are, such as "int4_codes" and "int4_scale". All are integers,
    floats as their bits: FSDP's mixed precision and ``module.to(dtype)`` change what is floating.

    Args:
        shape: (..., R, D) of the weight (R outputs, D inputs).
    """

    def __init__(self, shape: tuple[int, ...], quant: QuantArgs, device: torch.device) -> None:
        super().__init__()
        self.shape, self.format = shape, format_of(quant.type, quant.group_size)
        empty = QuantizedWeight.empty(shape, quant.type, group_size=quant.group_size, device=device)
        self._dtypes = [tensor.dtype for tensor in empty.tensors().values()]
        self._kept: tuple[list[Tensor], list[int], QuantizedWeight] | None = None
        for name, tensor in empty.tensors().items():
            bits = as_bits(in_large_pages(tensor))
            self.register_parameter(f"{quant.type}_{name}", nn.Parameter(bits, requires_grad=False))

    def to_local(self) -> QuantizedWeight:
        """This rank's weight, in the parameters' own memory."""
        # Asked for by every product of a decoded token: kept for as long as the parameters are the same tensors at
        # the same addresses. FSDP moves the memory below its parameters, and DTensors give a new tensor each time.
        own = [_local(parameter) for parameter in self._parameters.values() if parameter is not None]
        if torch.compiler.is_compiling():
            return self._weight(own)
        places = [tensor.data_ptr() for tensor in own]
        if self._kept is None or places != self._kept[1] or any(map(operator.is_not, own, self._kept[0])):
            self._kept = own, places, self._weight(own)
        return self._kept[2]

    def _weight(self, own: list[Tensor]) -> QuantizedWeight:
        pairs = zip(own, self._dtypes, strict=True)
        stored = (bits if bits.dtype == dtype else bits.view(dtype) for bits, dtype in pairs)
        return QuantizedWeight(self.format, *stored)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}


def lay_out_for_gpu(model: nn.Module) -> None:
    """Make the scales and zero points of a group neighbours over the rows, as the GPU's kernels read them.

    For inference: what FSDP shards has to be contiguous.
    """
    for module in model.modules():
        if isinstance(module, QuantizedParameter):
            for name, parameter in module.named_parameters():
                if not name.endswith("_codes"):
                    first = 0 if parameter.dim() == 2 else 1  # behind the experts' axis, all but the last one are rows
                    parameter.data = parameter.data.movedim(-1, first).contiguous().movedim(first, -1)


def as_bits(tensor: Tensor) -> Tensor:
    """A tensor of a quantized weight as integers, in the same memory."""
    return tensor.view(_BITS[tensor.dtype]) if tensor.dtype in _BITS else tensor


def as_stored(name: str, bits: Tensor) -> Tensor:
    """The inverse of `as_bits`, for a parameter or tensor of this name."""
    return bits.view(TENSOR_DTYPES[name.rpartition(".")[2]])


def weight_of(own: Format, parameters: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight whose tensors these are, by the names of `QuantizedParameter`."""
    return QuantizedWeight(
        own, **{name: as_stored(f"{own.name}_{name}", parameters[f"{own.name}_{name}"]) for name in own.tensors}
    )


def _local(parameter: Tensor) -> Tensor:
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()
