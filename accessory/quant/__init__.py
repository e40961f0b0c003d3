"""Weights in 8 and 4 bits, and products that take plain and quantized weights alike."""

from .gptq import InputMoments
from .int8 import row_maximum
from .parameter import TENSOR_DTYPES, QuantizedParameter, as_bits, as_stored, lay_out_for_gpu, weight_of
from .products import gathered_linear, grouped_linear, linear
from .weight import QuantizedWeight, quantize, quantize_calibrated, shown_quantized

__all__ = [
    "TENSOR_DTYPES",
    "InputMoments",
    "QuantizedParameter",
    "QuantizedWeight",
    "as_bits",
    "as_stored",
    "gathered_linear",
    "grouped_linear",
    "lay_out_for_gpu",
    "linear",
    "quantize",
    "quantize_calibrated",
    "row_maximum",
    "shown_quantized",
    "weight_of",
]
