"""What a model is: its sizes, its adapters, and how its matrices are quantized, as config.json holds them."""

from .checks import differences, part_of_config, read_json
from .model import AttentionArgs, ClampArgs, DenseArgs, ModelArgs, MoEArgs, RopeArgs, RouterArgs
from .peft import LORA_TARGETS, PEFT_TYPES, PeftArgs, peft_from_dict, with_adapters
from .quant import QUANT_FORMS, QuantArgs, QuantForm

__all__ = [
    "LORA_TARGETS",
    "PEFT_TYPES",
    "QUANT_FORMS",
    "AttentionArgs",
    "ClampArgs",
    "DenseArgs",
    "MoEArgs",
    "ModelArgs",
    "PeftArgs",
    "QuantArgs",
    "QuantForm",
    "RopeArgs",
    "RouterArgs",
    "differences",
    "part_of_config",
    "peft_from_dict",
    "read_json",
    "with_adapters",
]
