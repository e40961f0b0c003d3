"""What a model is: its sizes, its adapters, and how its matrices are quantized, as config.json holds them."""

from .checks import read_json
from .model import ModelArgs, MoEArgs
from .peft import LORA_TARGETS, PEFT_TYPES, PeftArgs
from .quant import QUANT_FORMS, QuantArgs, QuantForm, quant_from_dict

__all__ = [
    "LORA_TARGETS",
    "PEFT_TYPES",
    "QUANT_FORMS",
    "MoEArgs",
    "ModelArgs",
    "PeftArgs",
    "QuantArgs",
    "QuantForm",
    "quant_from_dict",
    "read_json",
]
