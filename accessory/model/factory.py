"""A Transformer of any family, built with adapters (llama_type "mistral_peft") or without.

What is added, and what of it trains, stands in `ModelArgs.peft`; the layers that have it in model/lora.py.
"""

import torch
from torch import nn

from accessory.config import ModelArgs
from accessory.model.layers import PLAIN
from accessory.model.lora import adapted_layers
from accessory.model.transformer import Transformer
from accessory.parallel.plan import trains
from accessory.parallel.state import ParallelState, Place


def build_transformer(
    args: ModelArgs,
    state: ParallelState,
    *,
    expert_placement: str = "auto",
    dtype: torch.dtype = torch.float32,
    trained_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    n_tokens: int | None = None,
) -> Transformer:
    """A Transformer of either llama_type, with adapters where ``args.peft`` asks for them; uninitialised.

    Args:
        trained_dtype: of the parameters that train; None: ``dtype``, as the others.
        n_tokens: as `Transformer` takes it.

    Raises:
        ValueError: as `Transformer`.
    """
    trained_dtype = trained_dtype or dtype
    peft = args.peft
    adapters = Place(trained_dtype, state.device if device is None else device)
    llma = Transformer(
        args,
        state,
        expert_placement=expert_placement,
        dtype=trained_dtype if peft is None else dtype,
        device=device,
        layers=PLAIN if peft is None else adapted_layers(peft, state, adapters),
        n_tokens=n_tokens,
    )
    if peft is not None:
        _freeze(llma, trained_dtype)
    return llma


def _freeze(llma: Transformer, dtype: torch.dtype) -> None:
    """Leave to training what ``llma.args.peft`` says, in this dtype, and no other parameter."""
    for name, parameter in list(llma.named_parameters()):
        if not trains(name, llma.args):
            parameter.requires_grad_(False)
        elif parameter.dtype != dtype:
            owner, _, attribute = name.rpartition(".")
            setattr(llma.get_submodule(owner), attribute, nn.Parameter(parameter.to(dtype)))
