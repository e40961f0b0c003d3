"""A model's parameters as 2-D DTensors: split by the plan over the model-parallel ranks, and by FSDP over the others.

With both axes in every parameter, gradient norms, checkpoints and counts see the whole model.
"""

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from accessory.model.LLM.mistral import Transformer
from accessory.parallel.plan import refuse_shared_heads, split_of
from accessory.parallel.state import ParallelState

DataParallel = Literal["fsdp", "sdp"]


def device_mesh(state: ParallelState) -> DeviceMesh:
    """The mesh (dp, mp) over the groups that `ParallelState.init` laid out: neighbours in rank share a model."""
    if state.mp_group is None or state.dp_group is None:
        raise ValueError("training needs process groups for both axes: make the state with ParallelState.init")
    ranks = torch.arange(state.dp_size * state.mp_size).view(state.dp_size, state.mp_size)
    groups = [state.dp_group, state.mp_group]
    mesh = DeviceMesh.from_group(groups, state.device.type, mesh=ranks, mesh_dim_names=("dp", "mp"))
    mesh._flatten("all")
    return mesh


def shard_model(
    model: Transformer,
    mesh: DeviceMesh,
    *,
    data_parallel: DataParallel = "fsdp",
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Turn the parameters, which hold a model-parallel rank's slices by now, into sharded DTensors, in place.

    Each block is one unit of communication. Parameters, gradients and optimizer state keep the parameters' dtype
    and are split over the data-parallel ranks; products run in ``compute_dtype`` and gradients are summed (not
    averaged) in float32.

    Args:
        data_parallel: "fsdp" gathers a block's parameters for its forward and again for its backward pass; "sdp"
            keeps them from the one to the other.

    Raises:
        ValueError: ranks outnumber the key/value heads, whose copies would train apart.
    """
    state = model.state
    refuse_shared_heads(model.args, state.mp_size)
    _distribute(model, mesh["mp"])
    shard = partial(
        fully_shard,
        mesh=mesh["dp"],
        mp_policy=MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        reshard_after_forward=data_parallel == "fsdp",
        shard_placement_fn=partial(_dp_placement, dp_size=state.dp_size),
    )
    for block in model.layers:
        shard(block)
    shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the count of learned tokens over all ranks, so gradients are to be summed. Gloo
            # cannot do the division that a factor asks for unless it is a plain sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _distribute(model: Transformer, mp_mesh: DeviceMesh) -> None:
    for name, parameter in list(model.named_parameters()):
        axis = split_of(name).axis[model.placement]
        placement = Replicate() if axis is None else Shard(axis)
        whole = DTensor.from_local(parameter.data, mp_mesh, [placement], run_check=False)
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _dp_placement(parameter: nn.Parameter, dp_size: int) -> Shard | None:
    """The longest axis that the plan leaves whole and the data-parallel ranks divide; None: axis 0, unevenly.

    By default FSDP cuts axis 0. Of stacked experts a rank may hold fewer than there are data-parallel ranks, and
    the last of these would then hold nothing.
    """
    assert isinstance(parameter, DTensor)
    taken = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
    free = [axis for axis, size in enumerate(parameter.shape) if axis not in taken and size % dp_size == 0]
    return Shard(max(free, key=lambda axis: parameter.shape[axis])) if free else None
