"""Checkpoints written by the tests themselves, independently of the library's own writer and plan.

Everything starts from a transformers MixtralForCausalLM with random weights, so that its logits and greedy tokens
are the truth. The names and cuts below are spelled out from the format's description, not from the library.

transformers is imported where it is used: ranks import test modules, and need not wait for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import MixtralConfig, MixtralForCausalLM


def random_mixtral(seed: int, **sizes: Any) -> MixtralForCausalLM:
    """A small random model in float32; sizes are transformers' names.

    Its experts run in a plain loop: transformers' grouped products refuse odd sizes.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
        "initializer_range": 0.15,
        "sliding_window": None,
        **sizes,
    }
    config = MixtralConfig(**settings, experts_implementation="eager")
    model = MixtralForCausalLM(config).eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def random_prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[1, *torch.randint(3, 384, (length - 1,), generator=generator).tolist()] for length in lengths]


@torch.no_grad()
def hf_logits(hf: MixtralForCausalLM, tokens: list[int]) -> Tensor:
    return hf(torch.tensor([tokens])).logits[0]


def hf_greedy(hf: MixtralForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens through transformers' own cache; nothing ends them early."""
    hf.generation_config.eos_token_id = None
    return hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)[0, len(prompt) :].tolist()


def accessory_config(config: MixtralConfig) -> dict[str, Any]:
    """config.json of the accessory form."""
    theta = config.rope_parameters["rope_theta"]
    # Hugging Face's factor divides the positions, rope_scaling multiplies them.
    linear = config.rope_parameters.get("rope_type") == "linear"
    scaling = {"rope_scaling": 1 / config.rope_parameters["factor"]} if linear else {}
    return {
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "head_dim": config.head_dim,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "max_batch_size": 32,
        "max_seq_len": 512,
        "moe": {"num_experts_per_tok": config.num_experts_per_tok, "num_experts": config.num_local_experts},
        **scaling,
    }


def whole_tensors(model: MixtralForCausalLM) -> dict[str, Tensor]:
    """The torrent release's names: nothing split, an expert's matrices one by one, rotary pairs interleaved."""
    config, state = model.config, model.state_dict()

    def interleaved(weight: Tensor, heads: int) -> Tensor:
        halves = weight.view(heads, 2, config.head_dim // 2, -1)
        return halves.transpose(1, 2).reshape(heads * config.head_dim, -1).contiguous()

    tensors = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"layers.{layer}."
        attention = {name: state[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkvo"}
        tensors[f"{ours}attention.wq.weight"] = interleaved(attention["q"], config.num_attention_heads)
        tensors[f"{ours}attention.wk.weight"] = interleaved(attention["k"], config.num_key_value_heads)
        tensors[f"{ours}attention.wv.weight"] = attention["v"]
        tensors[f"{ours}attention.wo.weight"] = attention["o"]
        tensors[f"{ours}attention_norm.weight"] = state[f"{theirs}input_layernorm.weight"]
        tensors[f"{ours}ffn_norm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
        tensors[f"{ours}feed_forward.gate.weight"] = state[f"{theirs}mlp.gate.weight"]
        for expert in range(config.num_local_experts):
            gate, up = state[f"{theirs}mlp.experts.gate_up_proj"][expert].chunk(2)
            matrices = {"w1": gate, "w3": up, "w2": state[f"{theirs}mlp.experts.down_proj"][expert]}
            for name, matrix in matrices.items():
                tensors[f"{ours}feed_forward.experts.{expert}.{name}.weight"] = matrix
    return {name: tensor.clone() for name, tensor in tensors.items()}


def base_shard(tensors: Mapping[str, Tensor], file: int, files: int, experts: int) -> dict[str, Tensor]:
    """Shard ``file`` of ``files`` in the base form, with the prefix ``llma.``."""
    cut_rows = ("wq.weight", "wk.weight", "wv.weight", "output.weight")
    cut_columns = ("wo.weight", "tok_embeddings.weight")
    shard = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            if file * experts // files <= expert < (file + 1) * experts // files:
                shard[f"llma.{name}"] = tensor
        elif name.endswith(cut_rows):
            shard[f"llma.{name}"] = tensor.chunk(files, 0)[file].clone()
        elif name.endswith(cut_columns):
            shard[f"llma.{name}"] = tensor.chunk(files, 1)[file].clone()
        else:
            shard[f"llma.{name}"] = tensor
    return shard


def sparse_shard(tensors: Mapping[str, Tensor], file: int, files: int, experts: int) -> dict[str, Tensor]:
    """Shard ``file`` of ``files`` in the sparse form: slices of every expert stacked, w2 transposed."""
    shard = {
        name: tensor for name, tensor in base_shard(tensors, file, files, experts).items() if ".experts." not in name
    }
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    for layer in layers:
        moe = f"layers.{layer}.feed_forward"
        for matrix in ("w1", "w2", "w3"):
            axis = 1 if matrix == "w2" else 0
            slices = [
                tensors[f"{moe}.experts.{expert}.{matrix}.weight"].chunk(files, axis)[file] for expert in range(experts)
            ]
            rows = [part.T if matrix == "w2" else part for part in slices]
            shard[f"llma.{moe}.{matrix}"] = torch.cat(rows).contiguous()
    return shard


def write_checkpoint(
    folder: Path, model: MixtralForCausalLM, tokenizer: Path, *, files: int, form: str = "base"
) -> Path:
    """A folder in the accessory form "base" or "sparse", or as "released" (one consolidated.00.pth)."""
    folder.mkdir(parents=True)
    tensors, config = whole_tensors(model), accessory_config(model.config)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    if form == "released":
        torch.save(tensors, folder / "consolidated.00.pth")
        params = {key: value for key, value in config.items() if not key.startswith("max_")}
        (folder / "params.json").write_text(json.dumps(params))
        return folder
    cut = {"base": base_shard, "sparse": sparse_shard}[form]
    for file in range(files):
        shard = cut(tensors, file, files, model.config.num_local_experts)
        torch.save({"model": shard}, folder / f"consolidated.{file:02d}-of-{files:02d}.model.pth")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "meta.json").write_text(json.dumps({"llama_type": "mistral"}))
    return folder


def small_config(**changes: Any) -> dict[str, Any]:
    """config.json of a model that runs at 1, 2, 4 and 8 ranks and whose vocabulary is `small_tokenizer`'s."""
    return {
        "dim": 64,
        "hidden_dim": 48,
        "head_dim": 8,
        "n_layers": 2,
        "n_heads": 8,
        "n_kv_heads": 8,
        "vocab_size": 384,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_batch_size": 32,
        "max_seq_len": 512,
        "moe": {"num_experts_per_tok": 2, "num_experts": 8},
        **changes,
    }


def random_tensors(config: Mapping[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Whole tensors of a random model of these sizes, by the torrent release's names; needs no transformers."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden, heads = config["dim"], config["hidden_dim"], config["n_heads"] * config["head_dim"]
    kv_heads = config["n_kv_heads"] * config["head_dim"]
    experts = config["moe"]["num_experts"]

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.15).to(dtype)

    def norm() -> Tensor:
        return (torch.rand(dim, generator=generator) + 0.5).to(dtype)

    tensors = {
        "tok_embeddings.weight": matrix(config["vocab_size"], dim),
        "norm.weight": norm(),
        "output.weight": matrix(config["vocab_size"], dim),
    }
    for layer in range(config["n_layers"]):
        block = f"layers.{layer}."
        tensors[f"{block}attention.wq.weight"] = matrix(heads, dim)
        tensors[f"{block}attention.wk.weight"] = matrix(kv_heads, dim)
        tensors[f"{block}attention.wv.weight"] = matrix(kv_heads, dim)
        tensors[f"{block}attention.wo.weight"] = matrix(dim, heads)
        tensors[f"{block}attention_norm.weight"] = norm()
        tensors[f"{block}ffn_norm.weight"] = norm()
        tensors[f"{block}feed_forward.gate.weight"] = matrix(experts, dim)
        for expert in range(experts):
            for name, shape in {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}.items():
                tensors[f"{block}feed_forward.experts.{expert}.{name}.weight"] = matrix(*shape)
    return tensors


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    files: int,
    form: str = "base",
    tokenizer: Path | None = None,
) -> Path:
    """A folder of whole tensors in the accessory form "base" or "sparse", or as "released"."""
    folder.mkdir(parents=True)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    if form == "released":
        torch.save(dict(tensors), folder / "consolidated.00.pth")
        params = {key: value for key, value in config.items() if not key.startswith("max_")}
        (folder / "params.json").write_text(json.dumps(params))
        return folder
    cut = {"base": base_shard, "sparse": sparse_shard}[form]
    for file in range(files):
        shard = cut(tensors, file, files, config["moe"]["num_experts"])
        torch.save({"model": shard}, folder / f"consolidated.{file:02d}-of-{files:02d}.model.pth")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "meta.json").write_text(json.dumps({"llama_type": "mistral"}))
    return folder
