"""A model's parameters as 2-D DTensors: split by the plan over the model-parallel ranks, and by FSDP over the others.

With both axes in every parameter, gradient norms, checkpoints and counts see the whole model. Under "ddp" the
data-parallel axis is there as well, with every rank of it holding the same.
"""

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from accessory.model.transformer import Transformer
from accessory.parallel.box import Box
from accessory.parallel.placement import refuse_shared_heads
from accessory.parallel.plan import local_boxes, split_of
from accessory.parallel.state import ParallelState
from accessory.train.options import DataParallel


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
    """Turn the parameters of a model-parallel rank into sharded DTensors, in place.

    Each block is one unit of communication. Parameters, gradients and optimizer state keep the parameters' dtype
    and are split over the data-parallel ranks; products run in ``compute_dtype`` and gradients are summed (not
    averaged) in float32. Parameters on the meta device stay there, and take no memory yet.

    A single data-parallel rank needs no FSDP, whose copies between buffers take a good part of a step's time: there
    the layers cast the weights as they use them.

    Args:
        data_parallel: "fsdp" gathers a block's parameters for its forward and again for its backward pass; "sdp"
            keeps them from the one to the other; "ddp" splits nothing over the data-parallel ranks, each of which
            holds parameters, gradients and optimizer state whole.

    Raises:
        ValueError: ranks outnumber the key/value heads, whose copies would train apart; an unknown data_parallel.
    """
    if data_parallel not in get_args(DataParallel):
        raise ValueError(f"data_parallel is {data_parallel!r}: give one of {', '.join(get_args(DataParallel))}")
    refuse_shared_heads(model.args, model.state.mp_size)
    _distribute(model, mesh["mp"])
    if model.state.dp_size == 1:
        model.tok_embeddings.dtype = compute_dtype
        return
    # Inputs are not cast: tokens begin in the compute dtype, and rotations stay float32 as in inference.
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    # It would be cast as well; and what is chosen by it is to be what inference chooses.
    ignored = {own for name, own in model.named_parameters() if split_of(name).kind == "correction"}
    shard: Callable[[nn.Module], object]
    root: Callable[[nn.Module], object]
    if data_parallel == "ddp":
        shard = root = partial(replicate, mesh=mesh["dp"], mp_policy=policy, ignored_params=ignored)
    else:
        root = partial(
            fully_shard,
            mesh=mesh["dp"],
            mp_policy=policy,
            ignored_params=ignored,
            reshard_after_forward=False,
            shard_placement_fn=lambda parameter: Shard(_dp_axis(parameter, model.state.dp_size)),
        )
        shard = partial(root, reshard_after_forward=data_parallel == "fsdp")
    for block in model.layers:
        shard(block)
    root(model)  # stays gathered: the backward pass begins with its output head
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the count of learned tokens over all ranks, so gradients are to be summed. Gloo
            # cannot do the division that a factor asks for unless it is a plain sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def set_last_backward(model: nn.Module, *, last: bool) -> None:
    """Say before a backward pass whether it is the last of its step: a "ddp" model reduces gradients in that one alone.

    In those before, gradients are added up on each rank, in float32. That takes no memory that "ddp" would not need
    anyway. Any other model would have to keep gradients of its unsharded parameters, and reduces in every pass.
    """
    for module in model.modules():
        if isinstance(module, ReplicateModule):
            module.set_requires_gradient_sync(last, recurse=False)


def own_boxes(model: Transformer) -> dict[str, Box]:
    """The part of each whole parameter that lies on this rank; an empty one too, where ranks outnumber the rows."""
    args, state = model.args, model.state
    slices = local_boxes(args, placement=model.placement, rank=state.mp_rank, size=state.mp_size)
    boxes = {}
    for name, parameter in model.named_parameters():
        boxes[name] = slices[name]
        over_dp = parameter.placements[:-1] if isinstance(parameter, DTensor) else ()
        if any(not isinstance(placement, Replicate) for placement in over_dp):
            axis = _dp_axis(parameter, state.dp_size)
            boxes[name] = slices[name].chunk(axis, rank=state.dp_rank, size=state.dp_size)
    return boxes


def _distribute(model: Transformer, mp_mesh: DeviceMesh) -> None:
    for name, parameter in list(model.named_parameters()):
        axis = split_of(name).axis[model.placement]
        # A lone model-parallel rank splits nothing, and leaves every axis to FSDP.
        placement = Replicate() if axis is None or mp_mesh.size() == 1 else Shard(axis)
        whole = DTensor.from_local(parameter.data, mp_mesh, [placement], run_check=False)
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _dp_axis(parameter: nn.Parameter, dp_size: int) -> int:
    """Where FSDP cuts: axis 0, or the longest axis, that the plan leaves whole and the data-parallel ranks divide.

    By default FSDP cuts axis 0. Of stacked experts a rank may hold fewer than there are data-parallel ranks, and
    the last of these would then hold nothing. Axis 0 is the only one that it cuts unevenly.
    """
    assert isinstance(parameter, DTensor)
    # Integers are tensors of a quantized weight: the order of their last axis is its own, and all are to be cut alike.
    shape = parameter.shape if parameter.is_floating_point() else parameter.shape[:-1]
    split = parameter.placements[-1]  # over the model-parallel ranks
    taken = split.dim if isinstance(split, Shard) else None
    free = [axis for axis, size in enumerate(shape) if axis != taken and size % dp_size == 0]
    # Pieces along axis 0 are sent as they lie; along any other, FSDP copies them together.
    return 0 if 0 in free else max(free, key=lambda axis: parameter.shape[axis], default=0)
