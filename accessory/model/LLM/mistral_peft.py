"""The Mixtral transformer of mistral.py with adapters put into it: llama_type "mistral_peft".

What is added, and what of it trains, stands in `ModelArgs.peft`; the layers' part of it in model/lora.py.
"""

import torch
from torch import nn

from accessory.config import ModelArgs
from accessory.model.LLM.mistral import Transformer
from accessory.model.lora import AdaptedColumnLinear, AdaptedExperts, AdaptedRowLinear
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
    whole_trains = args.peft is None
    llma = Transformer(
        args,
        state,
        expert_placement=expert_placement,
        dtype=trained_dtype if whole_trains else dtype,
        device=device,
        n_tokens=n_tokens,
    )
    if not whole_trains:
        add_adapters(llma, dtype=trained_dtype)
    return llma


def add_adapters(llma: Transformer, *, dtype: torch.dtype) -> None:
    """Put the adapters of ``llma.args.peft`` into a finished model, in place, and freeze the rest.

    Args:
        dtype: of what trains.
    """
    peft = llma.args.peft
    assert peft is not None
    place = Place(dtype, llma.norm.weight.device)
    for block in llma.layers:
        attention = block.get_submodule("attention")
        for name in ("wq", "wk", "wv"):
            AdaptedColumnLinear.adapt(attention.get_submodule(name), peft, llma.state, place)
        AdaptedRowLinear.adapt(attention.get_submodule("wo"), peft, llma.state, place)
        AdaptedExperts.adapt(block.get_submodule("feed_forward.experts"), peft, llma.state, llma.placement, place)
    for name, parameter in list(llma.named_parameters()):
        if not trains(name, llma.args):
            parameter.requires_grad_(False)
        elif parameter.dtype != dtype:
            owner, _, attribute = name.rpartition(".")
            setattr(llma.get_submodule(owner), attribute, nn.Parameter(parameter.to(dtype)))
