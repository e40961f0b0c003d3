"""An adapter as a folder of Hugging Face's peft library.

Experts are named one by one, as they were in transformers 4; peft (0.19 and later) turns such a folder itself into
updates of transformers 5's stacked experts, and other programs read it as it is. The rows of q and k lie in another
order there (see docs/checkpoints.md), so those of their lora_b do too.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.convert import with_vocabulary
from accessory.checkpoint.formats import base_sources
from accessory.checkpoint.manifest import Manifest
from accessory.checkpoint.weights import StoredWeights, is_finite
from accessory.config import ModelArgs
from accessory.errors import CheckpointError
from accessory.files import new_folder, write_json
from accessory.text.template import TEMPLATE_NAME

_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.experts": "block_sparse_moe.experts",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_PREFIX = "base_model.model.model."
_NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]


def export_adapter(
    adapter: str | Path, destination: str | Path, *, llama_config: Sequence[str | Path] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; norms that trained go along as modules_to_save.

    The chat template of the form that was trained goes along too.

    Args:
        llama_config: config files for a folder that has none, or to overrule it.

    Raises:
        ValueError: the folder has no LoRA, or biases that are not zero, for which Hugging Face's Mixtral has no place.
        FileExistsError: the destination is not empty.
        CheckpointError, FileNotFoundError: the folder cannot be read, or holds infinities or NaN.
        OSError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    manifest = Manifest.read(adapter)
    args = with_vocabulary(manifest, manifest.load_args(llama_config))
    if args.peft is None or args.peft.lora_rank < 1:
        raise ValueError(f"{manifest.folder} has no LoRA (its config has no lora_rank): there is nothing to export")
    weights = StoredWeights(manifest, args, partial=True)
    tensors: dict[str, Tensor] = {}
    biased = []
    for source in base_sources(args, 1):
        name = source.key
        kept = "lora_" in name or (args.peft.norm_tuning and name.endswith("norm.weight"))
        if source.parameter not in weights.held or not (kept or name.endswith("bias")):
            continue
        tensor = weights.read(source.parameter, source.box).reshape(source.shape)
        if not is_finite(tensor):
            raise CheckpointError(
                f"{manifest.folder}: {name} has infinities or NaN: copy the folder again, or take an earlier step's"
            )
        if kept:
            tensors[_key(name)] = _rows_in_halves(tensor, args) if _is_rotated(name) else tensor
        elif tensor.any():
            biased.append(name)
    if biased:
        more = f" and {len(biased) - 1} more" if biased[1:] else ""
        raise ValueError(
            f"{manifest.folder}: {biased[0]}{more} is not zero, and Hugging Face's Mixtral has no biases: train "
            "with bias_tuning false, or merge the adapter and keep the format"
        )
    if not any("lora_" in name for name in tensors):
        raise ValueError(f"{manifest.folder} holds no lora_a and lora_b: it is a base, not an adapter")
    with new_folder(Path(destination)) as aside:
        path = aside / "adapter_model.safetensors"
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            reason = f"free space, or choose another destination (safetensors: {error})"
            raise OSError(f"{path} cannot be written: {reason}") from None
        write_json(aside / "adapter_config.json", _config(args, norms=any("norm" in name for name in tensors)))
        if (template := manifest.folder / TEMPLATE_NAME).is_file():
            shutil.copyfile(template, aside / TEMPLATE_NAME)


def _config(args: ModelArgs, *, norms: bool) -> dict[str, object]:
    assert args.peft is not None
    assert args.peft.lora_alpha is not None
    modules = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "experts": ["w1", "w2", "w3"]}
    alpha = args.peft.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": args.peft.lora_rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,  # of training, which is over; peft has none for stacked experts
        "bias": "none",
        "target_modules": [name for target in args.peft.lora_targets for name in modules[target]],
        "modules_to_save": _NORMS if norms else None,
        "inference_mode": True,
    }


def _key(name: str) -> str:
    for ours, theirs in _MODULES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return _PREFIX + name.replace(".lora_a.", ".lora_A.").replace(".lora_b.", ".lora_B.")


def _is_rotated(name: str) -> bool:
    return name.endswith((".wq.lora_b.weight", ".wk.lora_b.weight"))


def _rows_in_halves(tensor: Tensor, args: ModelArgs) -> Tensor:
    """Rotary pairs (0, 1), (2, 3), ... of each head's rows, first all the first of them and then the second."""
    pairs = tensor.unflatten(0, (-1, args.head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous(memory_format=torch.contiguous_format)
