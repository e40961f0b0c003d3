"""OLMoE-1B-7B (Muennighoff et al., 2024, https://arxiv.org/abs/2409.02060).

Queries and keys are normalised over all heads together, and may be clipped; the weights of the chosen experts do not
add up to 1.
"""

from accessory.config import ModelArgs
from accessory.model.LLM import gguf
from accessory.model.LLM.family import EXPERTS, MATRICES, MODULES, QK_NORMS, Family


def _refuses(args: ModelArgs) -> str:
    """Norms of queries and of keys, and the output's matrix, are as wide as the model there."""
    widths = {f"n_{name} * head_dim": getattr(args, f"n_{name}") * args.head_dim for name in ("heads", "kv_heads")}
    return ", ".join(f"{name} {width} beside dim {args.dim}" for name, width in widths.items() if width != args.dim)


OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    experts=EXPERTS,
    aliases={"num_local_experts": "num_experts"},
    defaults={
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    },
    arguments=lambda said: {"attention": {"qk_norm": "full", "clip": said.get("clip_qkv")}},
    settings=lambda args: {"clip_qkv": args.attention.clip},
    read=frozenset({"clip_qkv"}),
    modules={**MODULES, **QK_NORMS},
    matrices=MATRICES,
    gguf=gguf.Architecture(
        name="olmoe",
        width="feed_forward_length",
        computed={"clip_qkv": None, "norm_topk_prob": False},
        fixed={"expert_weights_norm": (False,)},
        refuses=_refuses,
        modules={**gguf.MODULES, **gguf.QK_NORMS},
    ),
)
