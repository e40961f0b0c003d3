"""Mixtral 8x7B and 8x22B (Jiang et al., 2024, https://arxiv.org/abs/2401.04088)."""

from accessory.model.LLM import gguf
from accessory.model.LLM.family import MODULES, Family

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    experts={"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
    modules={**MODULES, "feed_forward.gate": "block_sparse_moe.gate"},
    matrices={single: f"block_sparse_moe.experts.{{E}}.{single}" for single in ("w1", "w2", "w3")},
    gguf=gguf.Architecture(name="llama", in_halves=False, width="feed_forward_length", modules=gguf.MODULES),
)
