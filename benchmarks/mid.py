"""The shape 'mid' (0.79 B parameters), as a transformers model and as a checkpoint of this library."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from accessory.checkpoint.containers import save_archive
from accessory.checkpoint.convert import split
from accessory.checkpoint.layouts import MISTRAL
from accessory.checkpoint.write import cut_out
from accessory.config import ModelArgs, MoEArgs
from accessory.files import new_folder
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState

ARGS = ModelArgs(
    dim=1024,
    hidden_dim=3584,
    n_layers=8,
    n_heads=16,
    n_kv_heads=4,
    head_dim=64,
    vocab_size=32000,
    rope_theta=1e6,
    moe=MoEArgs(num_experts=8, num_experts_per_tok=2),
)


def mixtral_config(args: ModelArgs = ARGS, **changes: Any) -> MixtralConfig:
    """The shape, or another one, as transformers takes it."""
    sizes = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "num_local_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.num_experts_per_tok,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": 4096,
    }
    return MixtralConfig(**(sizes | changes))


def random_model(args: ModelArgs = ARGS, device: str = "cpu") -> Transformer:
    """Ours alone, with random weights in bfloat16."""
    torch.manual_seed(0)
    model = Transformer(args, ParallelState.single(device), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02)
    return model


def transformers_mid() -> MixtralForCausalLM:
    """Random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        return MixtralForCausalLM._from_config(mixtral_config(), dtype=torch.bfloat16).eval()


@torch.no_grad()
def copy_weights(theirs: MixtralForCausalLM, ours: Transformer) -> None:
    """Give our model the weights of a transformers model."""
    state = theirs.state_dict()

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(0, (-1, 2, ARGS.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    ours.tok_embeddings.weight.copy_(state["model.embed_tokens.weight"])
    ours.norm.weight.copy_(state["model.norm.weight"])
    ours.output.weight.copy_(state["lm_head.weight"])
    for number, block in enumerate(ours.layers):
        layer = f"model.layers.{number}."
        block.attention.wq.weight.copy_(interleaved(state[f"{layer}self_attn.q_proj.weight"]))
        block.attention.wk.weight.copy_(interleaved(state[f"{layer}self_attn.k_proj.weight"]))
        block.attention.wv.weight.copy_(state[f"{layer}self_attn.v_proj.weight"])
        block.attention.wo.weight.copy_(state[f"{layer}self_attn.o_proj.weight"])
        block.attention_norm.weight.copy_(state[f"{layer}input_layernorm.weight"])
        block.ffn_norm.weight.copy_(state[f"{layer}post_attention_layernorm.weight"])
        block.feed_forward.gate.weight.copy_(state[f"{layer}mlp.gate.weight"])
        experts = block.feed_forward.experts
        experts.w13.flatten(1, 2).copy_(state[f"{layer}mlp.experts.gate_up_proj"])
        experts.w2.copy_(state[f"{layer}mlp.experts.down_proj"])


def write_checkpoint(folder: Path, model: Transformer, *, files: int) -> Path:
    """``folder``/converted in ``files`` shards, with the real Mixtral tokenizer."""
    import mistral_common  # here alone: who wants the shape need not have it

    released = folder / "released"
    with new_folder(released) as aside:
        save_archive(aside / "consolidated.00.pth", cut_out(dict(model.named_parameters()), MISTRAL, ARGS))
        (aside / "params.json").write_text(json.dumps(ARGS.to_dict()))
        tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
        shutil.copyfile(tokenizer, aside / "tokenizer.model")
    split(released, folder / "converted", mp=files)
    shutil.rmtree(released)
    return folder / "converted"
