"""Qwen3's mixtures of experts, 30B-A3B, 235B-A22B and Coder (https://arxiv.org/abs/2505.09388).

Queries and keys are normalised head by head before they are turned; some layers may have no experts.
"""

from collections.abc import Mapping
from typing import Any

from accessory.config import ModelArgs
from accessory.model.LLM import gguf
from accessory.model.LLM.family import DENSE, EXPERTS, MATRICES, MODULES, QK_NORMS, SIZES, Family, dense_layers, natural


def _arguments(said: Mapping[str, Any]) -> dict[str, Any]:
    step, without = natural(said, "decoder_sparse_step", 1), said["mlp_only_layers"]
    if not isinstance(without, list):
        raise ValueError(f"mlp_only_layers must be a list of layers' numbers, not {without!r}")
    dense = dense_layers(said, lambda layer: layer not in without and (layer + 1) % step == 0)
    return {"attention": {"qk_norm": "head"}, **dense}


def _settings(args: ModelArgs) -> dict[str, Any]:
    dense = args.dense
    return {
        "intermediate_size": args.hidden_dim if dense is None else dense.hidden_dim,
        "mlp_only_layers": [] if dense is None else [*dense.layers],
        "decoder_sparse_step": 1,
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sizes={ours: theirs for ours, theirs in SIZES.items() if ours != "sliding_window"}
    | {"hidden_dim": "moe_intermediate_size"},
    experts=EXPERTS,
    aliases={"num_local_experts": "num_experts"},
    defaults={
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    },
    fixed={"use_sliding_window": (False,)},
    passed_over=frozenset({"sliding_window", "max_window_layers"}),  # of the window that is not used
    read=frozenset({"intermediate_size", "decoder_sparse_step", "mlp_only_layers"}),
    arguments=_arguments,
    settings=_settings,
    modules={**MODULES, **QK_NORMS, **DENSE},
    matrices=MATRICES,
    gguf=gguf.Architecture(
        name="qwen3moe",
        computed={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
        fixed={"expert_weights_norm": (True,)},
        modules={**gguf.MODULES, **gguf.QK_NORMS},
    ),
)
