"""Adapters written by the tests themselves: random ones, their files, and a plain model that has them by hand.

Names and cuts are spelled out from the format's description, as in checkpoints.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from checkpoints import base_shard
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM

RANK = 4
PEFT: dict[str, Any] = {"lora_rank": RANK, "lora_alpha": 6, "bias_tuning": True, "norm_tuning": True}
SCALE = 6 / RANK


def adapter_shapes(config: Mapping[str, Any], rank: int = RANK) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the base form for LoRA and biases everywhere; ``config`` is the content of config.json."""
    dim, hidden = config["dim"], config["hidden_dim"]
    heads, kv_heads = (config[name] * config["head_dim"] for name in ("n_heads", "n_kv_heads"))
    attention = {"wq": (heads, dim), "wk": (kv_heads, dim), "wv": (kv_heads, dim), "wo": (dim, heads)}
    expert = {"w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
    matrices = {}
    for layer in range(config["n_layers"]):
        matrices |= {f"layers.{layer}.attention.{name}": shape for name, shape in attention.items()}
        for number in range(config["moe"]["num_experts"]):
            prefix = f"layers.{layer}.feed_forward.experts.{number}"
            matrices |= {f"{prefix}.{name}": shape for name, shape in expert.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in matrices.items():
        shapes[f"{name}.lora_a.weight"] = (rank, columns)
        shapes[f"{name}.lora_b.weight"] = (rows, rank)
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def random_adapter(config: Mapping[str, Any], seed: int, *, biases: bool = True) -> dict[str, Tensor]:
    """Whole tensors, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if name.endswith("bias") else 0.2)
        for name, shape in adapter_shapes(config).items()
        if biases or not name.endswith("bias")
    }


def adapter_shard(tensors: Mapping[str, Tensor], file: int, files: int, experts: int) -> dict[str, Tensor]:
    """Shard ``file`` of ``files`` in the base form; base tensors may be among them."""
    shard = base_shard(tensors, file, files, experts)
    for name, tensor in tensors.items():
        if ".attention.wo." in name and name.endswith("lora_a.weight"):
            shard[f"llma.{name}"] = tensor.chunk(files, 1)[file].clone()
        elif ".attention.w" in name and ".wo." not in name and name.endswith(("lora_b.weight", "bias")):
            shard[f"llma.{name}"] = tensor.chunk(files, 0)[file].clone()
    return shard


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    files: int,
    tokenizer: Path,
    peft: Mapping[str, Any] = PEFT,
) -> Path:
    """A folder of llama_type "mistral_peft"."""
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    for file in range(files):
        shard = adapter_shard(tensors, file, files, config["moe"]["num_experts"])
        torch.save({"model": shard}, folder / f"consolidated.{file:02d}-of-{files:02d}.model.pth")
    (folder / "config.json").write_text(json.dumps({**config, **peft}))
    (folder / "meta.json").write_text(json.dumps({"llama_type": "mistral_peft"}))
    return folder


class Adapter(nn.Module):
    """lora_a, lora_b and bias of one matrix, trained."""

    def __init__(self, tensors: Mapping[str, Tensor], matrix: str, scale: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(tensors[f"{matrix}.lora_{half}.weight"].clone()) for half in "ab")
        bias = tensors.get(f"{matrix}.bias")
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.matrix, self.scale = matrix, scale

    def forward(self, x: Tensor) -> Tensor:
        update = self.scale * (x @ self.a.T) @ self.b.T
        return update if self.bias is None else update + self.bias


class PlainLinear(nn.Module):
    """A matrix of transformers' attention beside its adapter, whose rows lie in the order of the rotary pairs."""

    def __init__(self, linear: nn.Linear, adapter: Adapter, head_dim: int | None) -> None:
        super().__init__()
        self.linear, self.adapter, self.head_dim = linear, adapter, head_dim

    def forward(self, x: Tensor) -> Tensor:
        update = self.adapter(x)
        if self.head_dim is not None:  # from pairs (0, 1), (2, 3), ... to halves
            update = update.unflatten(-1, (-1, self.head_dim // 2, 2)).transpose(-1, -2).flatten(-3)
        return self.linear(x) + update


class PlainExperts(nn.Module):
    """The experts in a loop, one matrix after another."""

    def __init__(self, experts: Any, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self.experts = experts
        self.adapters = nn.ModuleDict({name.replace(".", "_"): adapter for name, adapter in adapters.items()})

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(len(self.experts.gate_up_proj)):
            w1, w3 = self.experts.gate_up_proj[expert].chunk(2)
            a1, a2, a3 = (self.adapters[f"{expert}_{name}"] for name in ("w1", "w2", "w3"))
            tokens, choice = torch.where(top_k_index == expert)
            rows = x[tokens]
            hidden = F.silu(rows @ w1.T + a1(rows)) * (rows @ w3.T + a3(rows))
            y = hidden @ self.experts.down_proj[expert].T + a2(hidden)
            out = out.index_add(0, tokens, y * top_k_weights[tokens, choice, None])
        return out


def add_by_hand(hf: MixtralForCausalLM, tensors: Mapping[str, Tensor], scale: float = SCALE) -> MixtralForCausalLM:
    """Put an adapter into a transformers model, in place, and freeze the rest but the norms; returns it."""
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_("norm" in name)
    for number, layer in enumerate(hf.model.layers):
        for name in "qkvo":
            adapter = Adapter(tensors, f"layers.{number}.attention.w{name}", scale)
            head_dim = hf.config.head_dim if name in "qk" else None
            linear = getattr(layer.self_attn, f"{name}_proj")
            setattr(layer.self_attn, f"{name}_proj", PlainLinear(linear, adapter, head_dim))
        prefix = f"layers.{number}.feed_forward.experts."
        adapters = {
            f"{expert}.{name}": Adapter(tensors, f"{prefix}{expert}.{name}", scale)
            for expert in range(hf.config.num_local_experts)
            for name in ("w1", "w2", "w3")
        }
        layer.mlp.experts = PlainExperts(layer.mlp.experts, adapters)
    return hf


def trained_by_hand(hf: MixtralForCausalLM) -> dict[str, nn.Parameter]:
    """The parameters that train in a model of `add_by_hand`, by the names of the base form."""
    found = {"norm.weight": hf.model.norm.weight}
    for number, layer in enumerate(hf.model.layers):
        found[f"layers.{number}.attention_norm.weight"] = layer.input_layernorm.weight
        found[f"layers.{number}.ffn_norm.weight"] = layer.post_attention_layernorm.weight
    for module in hf.modules():
        if isinstance(module, Adapter):
            found[f"{module.matrix}.lora_a.weight"], found[f"{module.matrix}.lora_b.weight"] = module.a, module.b
            if module.bias is not None:
                found[f"{module.matrix}.bias"] = module.bias
    return found


_ENDINGS = {"lora_a": "lora_a.weight", "lora_b": "lora_b.weight", "bias": "bias"}


def by_base_names(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by the library's names, the experts' taken apart."""
    apart: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        prefix, experts, stacked = name.partition(".experts.")
        if not experts:
            apart[name] = tensor
            continue
        matrix, _, kind = stacked.partition("_")
        for expert, own in enumerate(tensor):
            parts = {"w2": own} if matrix == "w2" else dict(zip(("w1", "w3"), own, strict=True))
            for single, value in parts.items():
                apart[f"{prefix}.experts.{expert}.{single}.{_ENDINGS.get(kind, 'weight')}"] = value
    return apart
