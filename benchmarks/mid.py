"""The shapes 'mid' (Mixtral's, 0.79 B parameters) and 'mid-qwen' (Qwen3's with 128 small experts, 1.34 B), as
transformers' models and as checkpoints of this library."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from accessory.checkpoint.containers import save_archive
from accessory.checkpoint.convert import split
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.layouts import MISTRAL
from accessory.checkpoint.layouts.hf import config_of
from accessory.checkpoint.loader import load_parameters
from accessory.checkpoint.write import cut_out
from accessory.config import AttentionArgs, ModelArgs, MoEArgs
from accessory.files import new_folder
from accessory.model.transformer import Transformer
from accessory.parallel.plan import local_boxes
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
    max_seq_len=4096,
    moe=MoEArgs(num_experts=8, num_experts_per_tok=2),
)
SHAPES = {
    "mid": ARGS,
    "mid-qwen": ARGS.replace(
        family="qwen3_moe",
        hidden_dim=384,
        head_dim=128,
        attention=AttentionArgs(qk_norm="head"),
        moe=MoEArgs(num_experts=128, num_experts_per_tok=8),
    ),
}


def transformers_config(args: ModelArgs, **changes: Any) -> PreTrainedConfig:
    """Such a model as transformers takes it, with other settings where they are given."""
    settings = config_of(args, torch.bfloat16)[1] | changes
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


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


def transformers_model(args: ModelArgs) -> PreTrainedModel:
    """Theirs with random weights in bfloat16."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers_config(args), dtype=torch.bfloat16).eval()


@torch.no_grad()
def with_weights_of(theirs: PreTrainedModel, args: ModelArgs) -> Transformer:
    """Ours, of a transformers model's weights."""
    state = ParallelState.single("cpu")
    model = Transformer(args, state, dtype=torch.bfloat16).eval()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        theirs.save_pretrained(folder)
        boxes = local_boxes(args, state, placement=model.placement)
        load_parameters(dict(model.named_parameters()), boxes, [Folder(folder)], args, state)
    return model


def write_checkpoint(folder: Path, model: Transformer, *, files: int) -> Path:
    """``folder``/converted in ``files`` shards, with the real Mixtral tokenizer."""
    released = folder / "released"
    with new_folder(released) as aside:
        save_archive(aside / "consolidated.00.pth", cut_out(dict(model.named_parameters()), MISTRAL, model.args))
        (aside / "params.json").write_text(json.dumps(model.args.to_dict()))
        add_tokenizer(aside)
    split(released, folder / "converted", mp=files)
    shutil.rmtree(released)
    return folder / "converted"


def add_tokenizer(folder: Path) -> None:
    """Put the real Mixtral tokenizer beside a model."""
    import mistral_common  # here alone: who wants the shape need not have it

    shutil.copyfile(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
