"""What PyTorch does far from the hardware's speed: products, and the steps between.

`products`, `quantized`, `steps` and `attention` are what the model calls. Each function there chooses among a kernel of
the GPU (in `triton`), one of the CPU (in `cpu`), and its reference in plain PyTorch beside it.
"""

from .attention import SlotAttention, SlotAttentionReference, prompt_attention
from .cpu.library import native_variant, tiles_serve
from .products import (
    FEW_TOKENS,
    few_token_linear,
    gathered_linear,
    gathering_pays,
    grouped_by_tiles,
    pairs_by_expert,
    plain_experts_synchronise,
)
from .quantized import (
    dequantize,
    gathered_quantized_linear,
    grouped_quantized_linear,
    quantized_experts_synchronise,
    quantized_linear,
)
from .steps import add_rms_norm, gathered_gate, rms_norm, rotate, route, silu_gate, silu_gate_reference, sum_pairs
from .tensors import called_directly, meta_as_gpu, on_gpu

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
    "rotate",
    "route",
    "silu_gate",
    "silu_gate_reference",
    "sum_pairs",
    "tiles_serve",
]
