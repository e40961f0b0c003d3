"""What a model family is: how its Hugging Face folders say what the shared blocks are given, as data.

A family has a file of its own beside this one, and a place in `FAMILIES`; nothing else names it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accessory.config import ModelArgs

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
# An expert's matrices, where all experts lie in `mlp`.
MATRICES: Mapping[str, str] = {
    single: f"mlp.experts.{{E}}.{theirs}"
    for single, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
}
EXPERTS: Mapping[str, str] = {name: name for name in ("num_experts", "num_experts_per_tok", "norm_topk_prob")}
# Norms of whole queries and keys, or of each of their heads.
QK_NORMS: Mapping[str, str] = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}


def _nothing(said: Any) -> dict[str, Any]:
    del said
    return {}


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
        arguments: further settings of ours, as `ModelArgs.from_dict` takes them, by a config.json with its defaults.
        settings: further settings of a config.json, by ours.
        modules: its modules by ours, in a layer.
        matrices: the three matrices of an expert by ours, with {E} for its number.
    """

    name: str
    architecture: str
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    experts: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    passed_over: frozenset[str] = frozenset()
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    settings: Callable[[ModelArgs], dict[str, Any]] = _nothing
    modules: Mapping[str, str]
    matrices: Mapping[str, str]
