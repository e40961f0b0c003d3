"""Qwen3's mixtures of experts, 30B-A3B, 235B-A22B and Coder (https://arxiv.org/abs/2505.09388).

Queries and keys are normalised head by head before they are turned; every layer has experts.
"""

from accessory.model.LLM.family import EXPERTS, MATRICES, MODULES, QK_NORMS, SIZES, Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sizes={ours: theirs for ours, theirs in SIZES.items() if ours != "sliding_window"}
    | {"hidden_dim": "moe_intermediate_size"},
    experts=EXPERTS,
    aliases={"num_local_experts": "num_experts"},
    defaults={
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
    },
    fixed={"use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    # Of layers without experts, and of the window that is not used.
    passed_over=frozenset({"intermediate_size", "sliding_window", "max_window_layers"}),
    arguments=lambda said: {"attention": {"qk_norm": "head"}},
    settings=lambda args: {"intermediate_size": args.hidden_dim},
    modules={**MODULES, **QK_NORMS},
    matrices=MATRICES,
)
