"""How llama.cpp calls the parts of a family, as data; what a GGUF file says is put in Hugging Face's words with it.

The facts are those of llama.cpp's src/models and of the package gguf (constants.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accessory.config import ModelArgs

# Their modules by ours, in a layer.
MODULES: Mapping[str, str] = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate_inp",
}
QK_NORMS: Mapping[str, str] = {"attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm"}
GATED: Mapping[str, str] = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}
DENSE: Mapping[str, str] = {f"feed_forward.{own}": theirs for own, theirs in GATED.items()}
SHARED: Mapping[str, str] = {f"feed_forward.shared.{own}": f"{theirs}_shexp" for own, theirs in GATED.items()}
CORRECTION: Mapping[str, str] = {"feed_forward.gate.correction_bias": "exp_probs_b.bias"}
EXPERT_WIDTH = "expert_feed_forward_length"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family as one of llama.cpp's architectures. Keys are given without the architecture before them.

    Attributes:
        name: as general.architecture has it.
        in_halves: its rotary embedding turns the two halves of a head against one another (NEOX), as Hugging Face's
            does, so that queries' and keys' rows lie as there; else neighbours (NORM), as ours does.
        width: the key of the width inside an expert.
        settings: keys by what Hugging Face calls the same.
        computed: what it computes whatever a file says, in Hugging Face's settings.
        absent: what it takes where a file lacks a key, or says 0; the same.
        tensors: settings that are true where a layer has a tensor, and false where it has not.
        fixed: keys that must have one of these values, if they are there; the first is written.
        rounds_yarn: its yarn moves the bounds of what is slowed down to whole places, as llama.cpp always does; else
            llama.cpp computes nearly the same.
        refuses: what it cannot hold of a model; empty where it can.
        modules: its modules by ours, in a layer.
        names: the same of tensors that are no module's weight.
    """

    name: str
    in_halves: bool = True
    width: str = EXPERT_WIDTH
    settings: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rounds_yarn: bool = True
    refuses: Callable[[ModelArgs], str] = lambda args: ""
    modules: Mapping[str, str]
    names: Mapping[str, str] = field(default_factory=dict)
