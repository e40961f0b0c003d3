"""GLM-4.5, 4.6 and Air (https://arxiv.org/abs/2508.06471).

An expert's score is the sigmoid of its logit; a bias on the scores, which balances the load, counts for the choice
alone. Beside the chosen experts every token visits a shared one; the first layers have none at all. Only the first half
of each head is turned.
"""

from collections.abc import Mapping
from typing import Any

from accessory.config import ModelArgs
from accessory.model.LLM import gguf
from accessory.model.LLM.family import (
    DENSE,
    MATRICES,
    MODULES,
    QK_NORMS,
    SHARED,
    SIZES,
    Family,
    dense_layers,
    natural,
)

_ROUTER = {"groups": "n_group", "groups_chosen": "topk_group", "scale": "routed_scaling_factor"}


def _arguments(said: Mapping[str, Any]) -> dict[str, Any]:
    first, shared = natural(said, "first_k_dense_replace"), natural(said, "n_shared_experts", 1)
    for name in ("use_qk_norm", "attention_bias"):
        if type(said[name]) is not bool:
            raise ValueError(f"{name} must be true or false, not {said[name]!r}")
    return {
        "attention": {"qkv_bias": said["attention_bias"], "qk_norm": "head" if said["use_qk_norm"] else "none"},
        "moe": {
            "shared_hidden_dim": shared * natural(said, "moe_intermediate_size", 1),
            "router": {
                "score": "sigmoid",
                "correction": True,
                "eps": 1e-20,
                "float32": True,
                **{ours: said[theirs] for ours, theirs in _ROUTER.items()},
            },
        },
        "load_balancing_weight": 0.0,
        **dense_layers(said, lambda layer: layer >= first),
    }


def _settings(args: ModelArgs) -> dict[str, Any]:
    dense = 0 if args.dense is None else len(args.dense.layers)
    if args.moe_layers[0] != dense:
        raise ValueError(f"dense.layers are {args.dense and args.dense.layers}, and glm4_moe has the first ones alone")
    return {
        "attention_bias": args.attention.qkv_bias,
        "use_qk_norm": args.attention.qk_norm == "head",
        "first_k_dense_replace": dense,
        "intermediate_size": args.hidden_dim if args.dense is None else args.dense.hidden_dim,
        "n_shared_experts": args.moe.shared_hidden_dim // args.hidden_dim,
        "num_nextn_predict_layers": 0,
        **{theirs: getattr(args.moe.router, ours) for ours, theirs in _ROUTER.items()},
    }


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    sizes={ours: theirs for ours, theirs in SIZES.items() if ours != "sliding_window"}
    | {"hidden_dim": "moe_intermediate_size"},
    experts={
        "num_experts": "n_routed_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "norm_topk_prob": "norm_topk_prob",
    },
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    defaults={
        "num_key_value_heads": 8,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    },
    read=frozenset(
        {"first_k_dense_replace", "n_shared_experts", "intermediate_size", "use_qk_norm", "attention_bias"}
        | {"partial_rotary_factor", *_ROUTER.values()}
    ),
    extra_layers="num_nextn_predict_layers",
    arguments=_arguments,
    settings=_settings,
    modules={**MODULES, **QK_NORMS, **DENSE, **SHARED},
    tensors={
        **{f"attention.{own}_bias": f"self_attn.{own}_proj.bias" for own in "qkv"},
        "feed_forward.gate.correction_bias": "mlp.gate.e_score_correction_bias",
    },
    matrices=MATRICES,
    gguf=gguf.Architecture(
        name="glm4moe",
        settings={
            "intermediate_size": "feed_forward_length",
            "first_k_dense_replace": "leading_dense_block_count",
            "n_shared_experts": "expert_shared_count",
            "n_group": "expert_group_count",
            "topk_group": "expert_group_used_count",
            "routed_scaling_factor": "expert_weights_scale",
            "norm_topk_prob": "expert_weights_norm",
            "num_nextn_predict_layers": "nextn_predict_layers",
        },
        absent={
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
        },
        tensors={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
        fixed={"expert_gating_func": (2, 0)},
        modules={
            **gguf.MODULES,
            **gguf.QK_NORMS,
            **gguf.DENSE,
            **gguf.SHARED,
            "ffn_norm": "post_attention_norm",
        },
        names={**{f"attention.{own}_bias": f"attn_{own}.bias" for own in "qkv"}, **gguf.CORRECTION},
    ),
)
