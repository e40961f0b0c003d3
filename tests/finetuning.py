"""Runs of main_finetune.py on a tiny model: on the ranks of a pool, or as processes of their own."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoints import random_tensors, small_config, write_folder
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import accessory
from accessory.data.cache import CACHE_VARIABLE
from accessory.launch.launcher import Launch
from accessory.log import setup_logging
from accessory.train.finetune import finetune
from accessory.train.interruption import Stop
from accessory.train.options import FinetuneOptions

EXAMPLES, PRODUCT = 53, 8
PER_EPOCH = 7  # steps, one of them smaller

# What a line of log.jsonl says about the machine and not about the model.
OF_THE_MACHINE = ("tokens_per_s", "learned_per_s", "memory", "mfu")


@dataclass(frozen=True)
class Setting:
    """A model to start from, data, and a cache for its tokens."""

    folder: Path
    max_words: int = 48

    @property
    def model(self) -> Path:
        return self.folder / "base"

    @property
    def environment(self) -> dict[str, str]:
        return {CACHE_VARIABLE: str(self.folder / "cache")}

    def arguments(self, output: Path, **changes: Any) -> list[str]:
        """The command's arguments; True is a flag alone, a tuple several values, None leaves an option out."""
        options: dict[str, Any] = {
            "pretrained_path": self.model,
            "data_config": self.folder / "data.yaml",
            "output_dir": output,
            "max_words": self.max_words,
            "epochs": 5,
            "warmup_epochs": 0.5,
            "lr": 2e-3,
            "clip_grad": 2.0,
            "weight_decay": 0.1,
            "precision": "fp32",
            "device": "cpu",
            "save_iteration_interval": 0,
            "save_interval": 100,
            **changes,
        }
        given = {name: value for name, value in options.items() if value is not None}
        pairs = ([f"--{name}"] if value is True else [f"--{name}", *_texts(value)] for name, value in given.items())
        return [part for pair in pairs for part in pair]


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]


def make_setting(
    folder: Path,
    tokenizer: Path,
    *,
    examples: int = EXAMPLES,
    all_to: int | None = None,
    prompt_type: str = "None",
    **sizes: Any,
) -> Setting:
    """Write a random model of ``small_config`` with ``sizes``, and Alpaca records of several lengths.

    The template ``prompt_type`` makes examples longer than the plain instruction, with which steps are quick.
    ``all_to`` is the expert that every router chooses first, whatever the token.
    """
    config = small_config(**{"dim": 32, "hidden_dim": 16, **sizes})
    tensors = random_tensors(config, 5)
    if all_to is not None:
        send_all_to(tensors, all_to)
    write_folder(folder / "base", tensors, config, files=1, tokenizer=tokenizer)
    words = ("list", "method", "number", "of", "the", "value")
    records = [
        {"instruction": f"Say {words[number % 6]}", "output": " ".join(words[: 1 + number % 6] * (1 + number % 3))}
        for number in range(examples)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "data.yaml").write_text(
        f"META:\n- path: {folder / 'data.json'}\n  type: text\n  prompt_type: '{prompt_type}'\n"
    )
    return Setting(folder, 48 if prompt_type == "None" else 160)


def send_all_to(tensors: dict[str, Tensor], expert: int) -> None:
    """The residual stream's first channel is one large number, which no layer changes and the routers read."""
    for name, tensor in tensors.items():
        if name == "tok_embeddings.weight":
            tensor[:, 0] = 4.0
        elif name.endswith(("wo.weight", "w2.weight")):
            tensor[0] = 0
        elif name.endswith("gate.weight"):
            tensor[:, 0] = 0
            tensor[expert, 0] = 1.5


def finetune_on_rank(setting: Setting, arguments: Sequence[str]) -> Stop:
    """For the ranks of a pool, whose group is the run's."""
    os.environ.update(setting.environment)
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        return finetune(
            FinetuneOptions.parse(arguments), Launch(rank=rank, world_size=size, local_rank=rank, local_size=size)
        )
    finally:
        setup_logging(rank)  # closes output.log


def layout(dp_size: int, mp_size: int, accum_iter: int = 2, *, ep_size: int = 1) -> dict[str, int]:
    """Options with which a step takes PRODUCT examples."""
    return {
        "model_parallel_size": mp_size,
        **({"expert_parallel_size": ep_size} if ep_size > 1 else {}),
        "batch_size": PRODUCT // dp_size // accum_iter,
        "accum_iter": accum_iter,
    }


def log_lines(output: Path) -> list[dict[str, Any]]:
    """What the run wrote of each step, without what is said of the machine."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines]


def losses(output: Path) -> list[float]:
    """By step; every step from 1 on has one line."""
    lines = log_lines(output)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported model, the shards' side by side."""
    return {
        f"{file.name}: {name}": tensor
        for file in sorted(folder.glob("consolidated.*.pth"))
        for name, tensor in torch.load(file, weights_only=True)["model"].items()
    }


def state_tensors(folder: Path) -> dict[str, Tensor]:
    """The whole tensors of a training state, model and optimizer."""
    whole = folder.with_name(f"{folder.name}.whole.pt")
    dcp_to_torch_save(folder, whole)
    tensors: dict[str, Tensor] = torch.load(whole, weights_only=True)
    whole.unlink()
    return tensors


def latest_state(output: Path) -> Path:
    return output / "checkpoints" / (output / "checkpoints" / "latest").read_text().strip()


PYTHON = Path(sys.executable)
SCRIPT = Path(accessory.__file__).parent / "main_finetune.py"


def alone(arguments: Sequence[str]) -> list[str | Path]:
    """The command as one process."""
    return [PYTHON, SCRIPT, *arguments]


def under_torchrun(size: int, arguments: Sequence[str], *settings: str) -> list[str | Path]:
    """The command as so many ranks; ``settings`` are torchrun's."""
    return [PYTHON.with_name("torchrun"), "--standalone", "--nproc-per-node", str(size), *settings, SCRIPT, *arguments]


def with_nproc(size: int, arguments: Sequence[str]) -> list[str | Path]:
    """The command as so many ranks that it starts itself; 1: as one process."""
    return [PYTHON, "-m", "accessory", "finetune", "--nproc", str(size), *arguments]
