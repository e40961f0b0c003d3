"""A model made for training of which no rank ever holds a whole copy.

Parameters are created without memory, sharded, and only then given any: each rank reads the piece that will stay.
"""

from collections.abc import Callable

import torch

from accessory.config import ModelArgs
from accessory.model.factory import build_transformer
from accessory.model.pretrained import Pretrained, fill_parameters
from accessory.model.transformer import Transformer
from accessory.parallel.ops import local
from accessory.parallel.plan import split_of
from accessory.parallel.state import ParallelState, agreed, all_ranks
from accessory.train.init import init_weights
from accessory.train.options import DataParallel
from accessory.train.sharding import Meshes, own_boxes, shard_model


def build_for_training(
    pretrained: Pretrained,
    state: ParallelState,
    mesh: Meshes,
    *,
    data_parallel: DataParallel,
    compute_dtype: torch.dtype,
    expert_placement: str = "auto",
    before_sharding: Callable[[Transformer], None] | None = None,
    seed: int = 0,
    fill: bool = True,
) -> Transformer:
    """A sharded Transformer; collective over all ranks of the run.

    What trains is float32; what is frozen is held in the compute dtype, since no small change of it can be lost.

    Args:
        pretrained: the checkpoint; with none in it (`Pretrained.untrained`) the weights are those of `init_weights`.
        mesh: of `device_mesh`.
        data_parallel, compute_dtype: as `shard_model` takes them.
        before_sharding: changes the model, whose parameters have no memory yet, for instance to recompute
            activations, or not to train some of them.
        seed: of the weights that no checkpoint gives.
        fill: False leaves the weights to a training state that is loaded next, but for correction biases that begin.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: as `MetaModel.from_pretrained` and `shard_model`, on all
            ranks alike.
    """
    everyone, n_tokens, gaps = all_ranks(), pretrained.tokenizer.n_words, pretrained.tokenizer.gaps

    def build() -> Transformer:
        meta = torch.device("meta")
        refuse_nothing_to_train(pretrained.args)
        llma = build_transformer(
            pretrained.args,
            state,
            expert_placement=expert_placement,
            dtype=compute_dtype,
            trained_dtype=torch.float32,
            device=meta,
            n_tokens=n_tokens,
        )
        llma.leave_out(gaps)
        if before_sharding is not None:
            before_sharding(llma)
        shard_model(llma, mesh, data_parallel=data_parallel, compute_dtype=compute_dtype)
        llma.to_empty(device=state.device)
        for name, parameter in llma.named_parameters():
            if pretrained.begins_corrections and split_of(name).kind == "correction":
                local(parameter).zero_()
        return llma

    def give_weights() -> None:
        if not pretrained.folders:
            agreed(everyone, lambda: init_weights(llma, seed=seed))
            return
        parameters = {name: local(parameter) for name, parameter in llma.named_parameters()}
        boxes = own_boxes(llma)
        assert all(tuple(tensor.shape) == boxes[name].size for name, tensor in parameters.items())
        fill_parameters(parameters, boxes, pretrained, state, everyone=everyone, seed=seed)

    # Parameters made in a caller's inference_mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        model = (pretrained.args, n_tokens, gaps, bool(pretrained.folders))
        llma = agreed(everyone, build, (*model, data_parallel, compute_dtype, expert_placement, seed, state.ep.size))
        if fill:
            give_weights()
    return llma


def refuse_nothing_to_train(args: ModelArgs) -> None:
    """Raise ValueError where adapters are asked for and every one of them is switched off, or weights are quantized."""
    if args.peft is None and args.quant is not None:
        raise ValueError(
            f"quantized weights ({args.quant.type}) cannot train: train adapters above them with --lora_rank 8, or "
            "start from weights that are not quantized, without --quant"
        )
    if args.peft is not None and not args.peft.trains:
        raise ValueError(
            "nothing would train: lora_rank is below 1, bias_tuning and norm_tuning are false: give --lora_rank 8, or "
            "--bias_tuning or --norm_tuning, or train all weights with --llama_type mistral"
        )
