"""A model's parameters as DTensors over its meshes: the plan splits them along the inner axes, FSDP along the first.

With all axes in every parameter, gradient norms, checkpoints and counts see the whole model. Under "ddp" the first axis
is there as well, with every rank of it holding the same. Of experts that are spread over all data-parallel ranks no two
ranks hold the same, and FSDP has no part in them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from accessory.model.moe import MoE
from accessory.model.transformer import Transformer, TransformerBlock
from accessory.parallel.box import Box
from accessory.parallel.placement import refuse_shared_heads
from accessory.parallel.plan import cut_axis, local_boxes, split_of
from accessory.parallel.state import ParallelState, Ranks
from accessory.train.options import DataParallel


class Meshes(NamedTuple):
    """The two meshes of `ParallelState`, of which axes of one rank may be missing.

    Attributes:
        dense: (dp, mp).
        experts: (efsdp, ep, mp), or (ep, mp) where efsdp has one rank; the dense one where ep has.
    """

    dense: DeviceMesh
    experts: DeviceMesh

    def of(self, name: str) -> DeviceMesh:
        """The mesh over which a parameter lies."""
        return self.experts if split_of(name).per_expert else self.dense


def device_mesh(state: ParallelState) -> Meshes:
    """The meshes over the groups that `ParallelState.init` laid out."""
    if state.mp_group is None or state.dp_group is None:
        raise ValueError("training needs process groups for both axes: make the state with ParallelState.init")

    def over(**axes: Ranks) -> DeviceMesh:
        ranks = torch.arange(state.dp_size * state.mp_size).view([axis.size for axis in axes.values()])
        groups = [axis.group for axis in axes.values()]
        return DeviceMesh.from_group(groups, state.device.type, mesh=ranks, mesh_dim_names=tuple(axes))  # type: ignore[arg-type]

    dense = over(dp=state.dp, mp=state.mp)
    dense._flatten("all")
    if state.ep.size == 1:
        return Meshes(dense, dense)
    efsdp = {"efsdp": state.efsdp} if state.efsdp.size > 1 else {}
    return Meshes(dense, over(**efsdp, ep=state.ep, mp=state.mp))


def shard_model(
    model: Transformer,
    mesh: Meshes,
    *,
    data_parallel: DataParallel = "fsdp",
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Turn the parameters of a model-parallel rank into sharded DTensors, in place.

    Each block is one unit of communication, and where experts are spread these are one more. Parameters, gradients and
    optimizer state keep the parameters' dtype and are split over the data-parallel ranks; products run in
    ``compute_dtype`` and gradients are summed (not averaged) in float32. Parameters on the meta device stay there, and
    take no memory yet.

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
    _distribute(model, mesh)
    if model.state.dp_size == 1:
        model.tok_embeddings.dtype = compute_dtype
        return
    # Inputs are not cast: tokens begin in the compute dtype, and rotations stay float32 as in inference.
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    ep_size = model.state.ep.size
    ignored = {own for name, own in model.named_parameters() if unit_of(name, model.state.dp_size, ep_size) is None}

    def unit(module: nn.Module, over: DeviceMesh, *, reshards: bool) -> None:
        if data_parallel == "ddp":
            replicate(module, mesh=over, mp_policy=policy, ignored_params=ignored)
            return
        fully_shard(
            module,
            mesh=over,
            mp_policy=policy,
            ignored_params=ignored,
            reshard_after_forward=reshards and data_parallel == "fsdp",
            shard_placement_fn=lambda parameter: Shard(_dp_axis(parameter, over.size())),
        )

    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        if "efsdp" in _names(mesh.experts) and isinstance(block.feed_forward, MoE):
            unit(block.feed_forward.experts, mesh.experts["efsdp"], reshards=True)
        unit(block, mesh.dense["dp"], reshards=True)
    unit(model, mesh.dense["dp"], reshards=False)  # stays gathered: the backward pass begins with its output head
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the count of learned tokens over all ranks, so gradients are to be summed. Gloo
            # cannot do the division that a factor asks for unless it is a plain sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


class Unit(NamedTuple):
    """Parameters that are gathered together, and their gradients summed.

    Attributes:
        module: by its name; "" is the model.
        ranks: over which they lie, or of which each has them whole.
        spread: these are those of efsdp, and not of dp.
    """

    module: str
    ranks: int
    spread: bool = False


def unit_of(name: str, dp_size: int, ep_size: int) -> Unit | None:
    """The unit of a parameter in a model that is sharded over so many ranks; None: FSDP has no part in it.

    A correction would be cast as well, and what is chosen by it is to be what inference chooses. Experts of which no
    rank has a copy are as parameters are where one data-parallel rank is all.
    """
    row, efsdp_size = split_of(name), dp_size // ep_size
    spread = row.per_expert and ep_size > 1
    if dp_size == 1 or row.kind == "correction" or (spread and efsdp_size == 1):
        return None
    layer = re.match(r"layers\.\d+", name)
    if layer is None:
        return Unit("", dp_size)
    return Unit(f"{layer[0]}.feed_forward.experts", efsdp_size, spread=True) if spread else Unit(layer[0], dp_size)


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
    state = model.state
    boxes = local_boxes(model.args, state, placement=model.placement)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        for axis, kind in zip(_names(parameter.device_mesh), parameter.placements, strict=True):
            if axis in ("dp", "efsdp") and not isinstance(kind, Replicate):
                ranks = state.dp if axis == "dp" else state.efsdp
                boxes[name] = boxes[name].chunk(kind.dim, rank=ranks.rank, size=ranks.size)  # type: ignore[attr-defined]
    return boxes


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    assert mesh.mesh_dim_names is not None
    return mesh.mesh_dim_names


def _distribute(model: Transformer, mesh: Meshes) -> None:
    """Make each parameter, of which this rank holds its part, a DTensor over the axes that the plan cuts by."""
    for name, parameter in list(model.named_parameters()):
        over = mesh.of(name)
        over = over["ep", "mp"] if "ep" in _names(over) else over["mp"]
        # A lone rank splits nothing, and leaves every axis to FSDP.
        axes = (
            cut_axis(name, model.args, placement=model.placement, size=size, mesh=axis)  # type: ignore[arg-type]
            for axis, size in zip(_names(over), over.shape, strict=True)
        )
        kinds = [Replicate() if axis is None else Shard(axis) for axis in axes]
        whole = DTensor.from_local(parameter.data, over, kinds, run_check=False)
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _dp_axis(parameter: nn.Parameter, dp_size: int) -> int:
    """`sharded_axis` of a parameter that lies on the inner axes."""
    assert isinstance(parameter, DTensor)
    taken = [kind.dim for kind in parameter.placements if isinstance(kind, Shard)]
    return sharded_axis(tuple(parameter.shape), taken, dp_size, packed=not parameter.is_floating_point())


def sharded_axis(shape: tuple[int, ...], taken: Sequence[int], dp_size: int, *, packed: bool) -> int:
    """Where FSDP cuts: axis 0, or the longest axis, that the plan leaves whole and the data-parallel ranks divide.

    By default FSDP cuts axis 0. Of stacked experts a rank may hold fewer than there are data-parallel ranks, and
    the last of these would then hold nothing. Axis 0 is the only one that it cuts unevenly.

    Args:
        shape: of the whole parameter.
        taken: axes that the plan cuts.
        packed: it is a tensor of a quantized weight: the order of its last axis is its own, and all of the weight's are
            to be cut alike.
    """
    kept = shape[:-1] if packed else shape
    free = [axis for axis, size in enumerate(kept) if axis not in taken and size % dp_size == 0]
    # Pieces along axis 0 are sent as they lie; along any other, FSDP copies them together.
    return 0 if 0 in free else max(free, key=lambda axis: shape[axis], default=0)
