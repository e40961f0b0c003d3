"""Products for which PyTorch stays far from the hardware, each beside its plain PyTorch twin."""

from .attention import SlotAttention, SlotAttentionReference
from .linear import (
    FEW_TOKENS,
    called_directly,
    few_token_linear,
    gathered_linear,
    gathered_linear_reference,
    gathering_pays,
)
from .native import native_available, native_variant
from .pointwise import choose_experts, gate, rms_norm, rotate_heads, steps_natively, weighted_sum
from .quantized import plain_values, quantized_linear_reference, round_activations
from .quantized_native import NativeWeight
from .quantized_ops import dequantize, described, gathered_quantized_linear, grouped_quantized_linear, quantized_linear

__all__ = [
    "FEW_TOKENS",
    "NativeWeight",
    "SlotAttention",
    "SlotAttentionReference",
    "called_directly",
    "choose_experts",
    "dequantize",
    "described",
    "few_token_linear",
    "gate",
    "gathered_linear",
    "gathered_linear_reference",
    "gathered_quantized_linear",
    "gathering_pays",
    "grouped_quantized_linear",
    "native_available",
    "native_variant",
    "plain_values",
    "quantized_linear",
    "quantized_linear_reference",
    "rms_norm",
    "rotate_heads",
    "round_activations",
    "steps_natively",
    "weighted_sum",
]
