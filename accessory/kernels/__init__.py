"""Products for which PyTorch stays far from the hardware, each beside its plain PyTorch twin."""

from .linear import FEW_TOKENS, few_token_linear, gathered_linear, gathered_linear_reference, gathering_pays
from .native import native_available, native_variant

__all__ = [
    "FEW_TOKENS",
    "few_token_linear",
    "gathered_linear",
    "gathered_linear_reference",
    "gathering_pays",
    "native_available",
    "native_variant",
]
