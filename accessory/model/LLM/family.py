"""What a model family is: how its Hugging Face folders say what the shared blocks are given, as data.

A family has a file of its own beside this one, and a place in `FAMILIES`; nothing else names it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accessory.config import ModelArgs
from accessory.model.LLM.gguf import Architecture

# transformers' settings by ours, as most families have them.
SIZES: Mapping[str, str] = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "sliding_window": "sliding_window",
}
# Their modules by ours, in a layer.
MODULES: Mapping[str, str] = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate",
}
_GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# An expert's matrices, where all experts lie in `mlp`; and the same of a layer without experts, and a shared one.
MATRICES: Mapping[str, str] = {single: f"mlp.experts.{{E}}.{theirs}" for single, theirs in _GATED.items()}
DENSE: Mapping[str, str] = {f"feed_forward.{own}": f"mlp.{theirs}" for own, theirs in _GATED.items()}
SHARED: Mapping[str, str] = {
    f"feed_forward.shared.{own}": f"mlp.shared_experts.{theirs}" for own, theirs in _GATED.items()
}
EXPERTS: Mapping[str, str] = {name: name for name in ("num_experts", "num_experts_per_tok", "norm_topk_prob")}
# Norms of whole queries and keys, or of each of their heads.
QK_NORMS: Mapping[str, str] = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}


def _nothing(said: Any) -> dict[str, Any]:
    del said
    return {}


def dense_layers(said: Mapping[str, Any], has_experts: Callable[[int], bool]) -> dict[str, Any]:
    """The argument ``dense``, where some of the layers have no experts."""
    count = said.get("num_hidden_layers")
    # Of anything but a number `ModelArgs` has its own word to say.
    layers = [layer for layer in range(count if type(count) is int else 0) if not has_experts(layer)]
    return {"dense": {"layers": layers, "hidden_dim": said["intermediate_size"]}} if layers else {}


def natural(said: Mapping[str, Any], name: str, least: int = 0) -> int:
    """A setting that must be a whole number.

    Raises:
        ValueError: it is none.
    """
    value = said[name]
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number from {least} on, not {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: of its name, its config.json, and its tensors' names in Hugging Face's folders.

    Attributes:
        name: as transformers' model_type has it, and our config.json.
        architecture: transformers' class of it.
        sizes: its settings by ours.
        experts: the same for the experts' (`MoEArgs`).
        aliases: how other versions of transformers call some of its settings, and how these are called here.
        defaults: what transformers takes for its settings that a config.json leaves out.
        fixed: settings that this computation has in one way only, and those ways; the first is written.
        passed_over: settings that do not change what is computed, beside those of all families.
        read: settings that ``arguments`` makes something of. Of the rotary embedding's partial_rotary_factor it is said
            here alone that a model may have it.
        extra_layers: the setting that says how many layers for predicting several tokens at once stand behind the last
            one in its folders; they are left out. None: there are none.
        arguments: further settings of ours, as `ModelArgs.from_dict` takes them, by a config.json with its defaults.
        settings: further settings of a config.json, by ours.
        modules: its modules by ours, in a layer.
        tensors: the same of tensors that are no module's weight.
        matrices: the three matrices of an expert by ours, with {E} for its number; none: those of a layer lie in one
            tensor each for gate and up, by turns, and for down, transposed, and have biases.
        gguf: what llama.cpp makes of it; None: nothing that is known here.
    """

    name: str
    architecture: str
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    experts: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    passed_over: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    extra_layers: str | None = None
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    settings: Callable[[ModelArgs], dict[str, Any]] = _nothing
    modules: Mapping[str, str]
    tensors: Mapping[str, str] = field(default_factory=dict)
    matrices: Mapping[str, str]
    gguf: Architecture | None = None
