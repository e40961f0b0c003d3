"""Weights in 8 and 4 bits, as data; `accessory.kernels` multiplies with them."""

from .formats import FORMATS, ROW_TENSORS, TENSOR_DTYPES, Format, format_of, row_maximum
from .gptq import InputMoments
from .parameter import QuantizedParameter, as_bits, as_stored, lay_out_for_gpu, weight_of
from .weight import QuantizedWeight, quantize, quantize_calibrated, shown_quantized

__all__ = [
    "FORMATS",
    "ROW_TENSORS",
    "TENSOR_DTYPES",
    "Format",
    "InputMoments",
    "QuantizedParameter",
    "QuantizedWeight",
    "as_bits",
    "as_stored",
    "format_of",
    "lay_out_for_gpu",
    "quantize",
    "quantize_calibrated",
    "row_maximum",
    "shown_quantized",
    "weight_of",
]
