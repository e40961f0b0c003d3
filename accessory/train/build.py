"""A model made for training of which no rank ever holds a whole copy.

Parameters are created without memory, sharded, and only then given any: each rank reads the piece that will stay.
"""

from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh

from accessory.checkpoint.reader import load_parameters
from accessory.model.LLM.mistral import Transformer
from accessory.model.pretrained import Pretrained
from accessory.model.requests import agreed
from accessory.parallel.ops import local
from accessory.parallel.state import ParallelState
from accessory.train.init import init_weights
from accessory.train.sharding import DataParallel, own_boxes, shard_model
from accessory.train.snapshot import over_all_ranks


def build_for_training(
    pretrained: Pretrained,
    state: ParallelState,
    mesh: DeviceMesh,
    *,
    data_parallel: DataParallel,
    compute_dtype: torch.dtype,
    expert_placement: str = "auto",
    before_sharding: Callable[[Transformer], None] | None = None,
    seed: int = 0,
    fill: bool = True,
) -> Transformer:
    """A sharded Transformer with float32 weights; collective over all ranks of the run.

    Args:
        pretrained: the checkpoint; with none in it (`Pretrained.untrained`) the weights are those of `init_weights`.
        mesh: of `device_mesh`.
        data_parallel, compute_dtype: as `shard_model` takes them.
        before_sharding: changes the model, whose parameters have no memory yet, for instance to recompute
            activations, or not to train some of them.
        seed: of the weights that no checkpoint gives.
        fill: False leaves the weights to a training state that is loaded next.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: as `MetaModel.from_pretrained` and `shard_model`, on all
            ranks alike.
    """
    everyone = over_all_ranks(state)

    def build() -> Transformer:
        meta = torch.device("meta")
        llma = Transformer(pretrained.args, state, expert_placement=expert_placement, dtype=torch.float32, device=meta)
        if before_sharding is not None:
            before_sharding(llma)
        shard_model(llma, mesh, data_parallel=data_parallel, compute_dtype=compute_dtype)
        llma.to_empty(device=state.device)
        return llma

    def give_weights() -> None:
        if not pretrained.manifests:
            init_weights(llma, seed=seed)
            return
        parameters = {name: local(parameter) for name, parameter in llma.named_parameters()}
        boxes = own_boxes(llma)
        assert all(tuple(tensor.shape) == boxes[name].size for name, tensor in parameters.items())
        load_parameters(parameters, boxes, pretrained.manifests, pretrained.args, state)

    # Parameters made in a caller's inference_mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        request = (pretrained.args, data_parallel, compute_dtype, expert_placement, bool(pretrained.manifests), seed)
        llma = agreed(everyone, build, request)
        if fill:
            agreed(everyone, give_weights)
    return llma
