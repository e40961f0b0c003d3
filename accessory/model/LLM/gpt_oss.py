"""gpt-oss-20b and 120b (https://arxiv.org/abs/2508.10925).

Every second layer sees a window alone; each head has a sink; all matrices but the embedding and the head have biases,
and the experts' gated units are limited. The weights of the chosen experts are the softmax of their logits, which is
their share of the softmax of all.
"""

from collections.abc import Mapping
from typing import Any

from accessory.config import ModelArgs
from accessory.model.LLM import gguf
from accessory.model.LLM.family import MODULES, SIZES, Family, natural

_KINDS = {"sliding_attention": True, "full_attention": False}


def _arguments(said: Mapping[str, Any]) -> dict[str, Any]:
    count = natural(said, "num_hidden_layers", 1)
    kinds = said.get("layer_types", [[*_KINDS][layer % 2] for layer in range(min(count, 2**10))])
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in [*_KINDS] for kind in kinds):
        raise ValueError(f"layer_types must name each of {count} layers {' or '.join(_KINDS)}, not {kinds!r}")
    if type(said["attention_bias"]) is not bool:
        raise ValueError(f"attention_bias must be true or false, not {said['attention_bias']!r}")
    windowed = [layer for layer, kind in enumerate(kinds) if _KINDS[kind]]
    return {
        "attention": {
            **dict.fromkeys(("qkv_bias", "o_bias"), said["attention_bias"]),
            "sinks": True,
            "window": natural(said, "sliding_window", 1) if windowed else None,
            "windowed": windowed,
        },
        "moe": {
            "bias": True,
            "clamp": {"alpha": said["swiglu_alpha"], "limit": said["swiglu_limit"]},
            "router": {"bias": True},
        },
    }


def _settings(args: ModelArgs) -> dict[str, Any]:
    own, clamp, kinds = args.attention, args.moe.clamp, [*_KINDS]
    if own.qkv_bias != own.o_bias or clamp is None:
        raise ValueError("gpt_oss has biases of q, k, v and o or of none, and limited gated units: correct the config")
    return {
        "attention_bias": own.qkv_bias,
        "layer_types": [kinds[args.window_of(layer) is None] for layer in range(args.n_layers)],
        # transformers asks for one where no layer has it, too.
        "sliding_window": own.window or 128,
        "swiglu_alpha": clamp.alpha,
        "swiglu_limit": clamp.limit,
    }


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    sizes={ours: theirs for ours, theirs in SIZES.items() if ours != "sliding_window"},
    experts={"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
    aliases={"num_experts": "num_local_experts"},
    defaults={
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    passed_over=frozenset({"initial_context_length", "experts_per_token"}),
    read=frozenset({"attention_bias", "layer_types", "sliding_window", "swiglu_alpha", "swiglu_limit"}),
    arguments=_arguments,
    settings=_settings,
    modules={**MODULES, "feed_forward.gate": "mlp.router"},
    tensors={
        **{f"attention.{own}_bias": f"self_attn.{own}_proj.bias" for own in "qkvo"},
        "attention.sinks": "self_attn.sinks",
        "feed_forward.gate.bias": "mlp.router.bias",
    },
    matrices={},
    gguf=gguf.Architecture(
        name="gpt-oss",
        settings={"sliding_window": "attention.sliding_window"},
        computed={"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        # Every second layer, from the first on, sees a window.
        fixed={"attention.sliding_window_pattern": (2,)},
        rounds_yarn=False,
        modules={**gguf.MODULES, "ffn_norm": "post_attention_norm"},
        names={
            **{f"attention.{own}_bias": f"attn_{own}.bias" for own in "qkv"},
            "attention.o_bias": "attn_output.bias",
            "attention.sinks": "attn_sinks.weight",
            "feed_forward.gate.bias": "ffn_gate_inp.bias",
        },
    ),
)
