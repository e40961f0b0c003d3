"""Weights in 8 and 4 bits; `accessory.products` multiplies with them."""

from .gptq import InputMoments
from .int8 import row_maximum
from .parameter import TENSOR_DTYPES, QuantizedParameter, as_bits, as_stored, lay_out_for_gpu, weight_of
from .weight import QuantizedWeight, quantize, quantize_calibrated, shown_quantized

__all__ = [
    "TENSOR_DTYPES",
    "InputMoments",
    "QuantizedParameter",
    "QuantizedWeight",
    "as_bits",
    "as_stored",
    "lay_out_for_gpu",
    "quantize",
    "quantize_calibrated",
    "row_maximum",
    "shown_quantized",
    "weight_of",
]
