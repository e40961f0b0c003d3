"""A random Mixtral whose quantized twin transformers computes: each matrix is replaced by its dequantized values."""

import copy
from typing import Any

import torch
from checkpoints import random_mixtral

from accessory.config import QuantArgs
from accessory.quant import quantize

# At 4 ranks every slice of wo and w2 has whole groups of 64 inputs.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.06,
}


def mixtral_to_quantize(seed: int, **sizes: Any) -> Any:
    return random_mixtral(seed, **{**SIZES, **sizes})


@torch.no_grad()
def quantized_by_hand(hf: Any, quant: QuantArgs) -> Any:
    """A copy with the values that quantization leaves, in float32; the rows of a matrix know nothing of each other."""
    hf = copy.deepcopy(hf)
    for name, parameter in hf.named_parameters():
        layers = "self_attn" in name or "experts" in name
        if parameter.dim() >= 2 and (layers or (quant.head and name.startswith("lm_head"))):
            parameter.copy_(quantize(parameter, quant.type, group_size=quant.group_size).dequantize())
    return hf
