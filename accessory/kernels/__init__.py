"""What PyTorch does far from the hardware's speed, each beside its plain PyTorch twin: products, and steps between."""

from .attention import SlotAttention, SlotAttentionReference, prompt_attention, tiles_attend
from .linear import (
    FEW_TOKENS,
    called_directly,
    few_token_linear,
    gathered_linear,
    gathering_pays,
    grouped_by_tiles,
    pairs_by_expert,
    plain_experts_synchronise,
)
from .native import native_variant, tiles_serve
from .pointwise import rotate_heads, steps_natively
from .quantized_ops import (
    dequantize,
    gathered_quantized_linear,
    grouped_quantized_linear,
    quantized_experts_synchronise,
    quantized_linear,
)
from .step_ops import add_rms_norm, gathered_gate, rms_norm, route, silu_gate, steps_serve, sum_pairs, turn_heads
from .tensors import meta_as_gpu, on_gpu

__all__ = [
    "FEW_TOKENS",
    "SlotAttention",
    "SlotAttentionReference",
    "add_rms_norm",
    "called_directly",
    "dequantize",
    "few_token_linear",
    "gathered_gate",
    "gathered_linear",
    "gathered_quantized_linear",
    "gathering_pays",
    "grouped_by_tiles",
    "grouped_quantized_linear",
    "meta_as_gpu",
    "native_variant",
    "on_gpu",
    "pairs_by_expert",
    "plain_experts_synchronise",
    "prompt_attention",
    "quantized_experts_synchronise",
    "quantized_linear",
    "rms_norm",
    "rotate_heads",
    "route",
    "silu_gate",
    "steps_natively",
    "steps_serve",
    "sum_pairs",
    "tiles_attend",
    "tiles_serve",
    "turn_heads",
]
