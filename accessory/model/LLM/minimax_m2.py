"""MiniMax-M2 (https://github.com/MiniMax-AI/MiniMax-M2).

An expert's score is the sigmoid of its logit; a bias on the scores counts for the choice alone. Queries and keys are
normalised over all heads together, and only a part of each head is turned.
"""

from collections.abc import Mapping
from typing import Any

from accessory.model.LLM import gguf
from accessory.model.LLM.family import MODULES, QK_NORMS, Family

_ROOM = "block_sparse_moe"


def _arguments(said: Mapping[str, Any]) -> dict[str, Any]:
    if any(kind != 1 for kind in said.get("attn_type_list", [])):
        raise ValueError(f"attn_type_list is {said['attn_type_list']!r}: attention of other types than 1 is not known")
    return {
        "attention": {"qk_norm": "full", "rotary_dim": said.get("rotary_dim")},
        "moe": {"router": {"score": "sigmoid", "correction": True}},
        "load_balancing_weight": 0.0,
    }


MINIMAX_M2 = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    experts={"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
    aliases={"num_experts": "num_local_experts"},
    defaults={
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
    },
    # transformers computes so whatever they say.
    fixed={
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0,),
    },
    # Of modules for predicting further tokens, which its folders do not hold, and of its forerunner.
    passed_over=frozenset(
        {"use_mtp", "num_mtp_modules", "mtp_transformer_layers", "mlp_intermediate_size", "shared_moe_mode"}
        | {f"layernorm_{part}_beta" for part in ("full_attention", "linear_attention", "mlp")}
    ),
    read=frozenset({"attn_type_list", "rotary_dim", "partial_rotary_factor"}),
    arguments=_arguments,
    settings=lambda args: {"rotary_dim": args.rotary_dim},
    modules={**MODULES, **QK_NORMS, "feed_forward.gate": f"{_ROOM}.gate"},
    tensors={"feed_forward.gate.correction_bias": f"{_ROOM}.e_score_correction_bias"},
    matrices={single: f"{_ROOM}.experts.{{E}}.{single}" for single in ("w1", "w2", "w3")},
    gguf=gguf.Architecture(
        name="minimax-m2",
        fixed={"expert_gating_func": (2,), "expert_weights_norm": (True,)},
        modules={**gguf.MODULES, **gguf.QK_NORMS},
        names=gguf.CORRECTION,
    ),
)
