"""What a training state consists of: tensors by name, the model's sizes, and the random generators."""

import random
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.fsdp import FSDPModule

from accessory.config import ModelArgs, differences
from accessory.errors import CheckpointError
from accessory.model.meta import MetaModel
from accessory.parallel.plan import is_moved

# Settings of a run, which a resumed one may change.
_FREE_ARGS = ("max_batch_size", "max_seq_len", "load_balancing_weight", "z_loss_weight", "lora_dropout")


def reshard(model: nn.Module) -> None:
    """Free what FSDP has gathered and still keeps, so that the model's parameters are the sharded ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def tensors_of(
    model: MetaModel, optimizer: torch.optim.Optimizer, *, without_frozen: bool = False
) -> dict[str, Tensor]:
    """All tensors of a training state by the names of the checkpoint; they are the state's own."""
    reshard(model)
    tensors: dict[str, Tensor] = {}
    frozen = frozen_of(model) if without_frozen else ()
    for name, parameter in model.named_parameters():
        if name in frozen:
            continue
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def frozen_of(model: MetaModel) -> Set[str]:
    """The parameters that a run leaves as they are."""
    args, prefix = model.llma.args, "llma."
    named = model.named_parameters()
    return {name for name, own in named if not (own.requires_grad or is_moved(name.removeprefix(prefix), args))}


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory, which training does not change."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(tensors)  # type: ignore[return-value]
    finally:
        stager.close()


def prime(optimizer: torch.optim.Optimizer, *, empty: bool) -> None:
    """Give a new optimizer the tensors of one that has taken steps, to be filled, or take them away (``empty``)."""
    if empty:
        optimizer.state.clear()
    if empty or optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a step that changes no parameter
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def check_same_model(path: Path, saved: dict[str, Any], args: ModelArgs) -> None:
    """Hold the sizes in a checkpoint against the model's.

    Raises:
        CheckpointError: names the folder and the fields that differ.
    """
    own = args.to_dict()
    if args.owns_corrections:  # where the state has none they go on from what the run was built with
        saved = ModelArgs.from_dict(saved).with_corrections().to_dict()
    found = differences(own, saved)
    differing = [f"{name} {theirs} (here {ours})" for name, ours, theirs in found if name not in _FREE_ARGS]
    if differing:
        raise CheckpointError(
            f"{path} holds the state of another model: {', '.join(differing)}; "
            "resume with the model's own config, or choose another output_dir"
        )


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of all random generators of this process, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def seed_rank(seed: int, rank: int) -> None:
    """Begin all random generators anew, on every rank in another way."""
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed)
