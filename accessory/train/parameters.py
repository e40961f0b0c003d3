"""Which parameters a run trains, told by what they belong to."""

import math
from collections import Counter

from accessory.config import ModelArgs
from accessory.model.meta import MetaModel
from accessory.parallel.plan import Kind, parameter_shapes, split_of

# What a reader calls each kind.
_GROUPS: dict[Kind, str] = {
    "lora": "LoRA",
    "bias": "biases",
    "norm": "norms",
    "router": "router",
    "expert": "experts",
    "shared": "shared expert",
    "dense": "dense layers",
    "sink": "sinks",
    "correction": "correction biases",
    "attention": "attention",
    "embedding": "embedding",
    "head": "output head",
}


def describe_trainable(model: MetaModel) -> str:
    """One line: how many parameters train, of how many, and in which groups; of the whole model, not a rank's part."""
    trained: Counter[str] = Counter()
    whole = parameter_shapes(model.llma.args.replace(quant=None))
    total = sum(math.prod(shape) for _, shape in whole)
    for name, parameter in model.llma.named_parameters():
        if parameter.requires_grad:
            trained[_GROUPS[split_of(name).kind]] += parameter.numel()
    groups = ", ".join(f"{group} {count:,}" for group, count in trained.most_common())
    return f"training {trained.total():,} of {total:,} parameters: {groups}"


def warning_without_matrix(args: ModelArgs) -> str | None:
    """What to say where adapters were asked for and no matrix gets one, which learns little; None elsewhere."""
    if args.peft is None or args.peft.lora_rank > 0:
        return None
    others = (("biases", args.peft.bias_tuning), ("norms", args.peft.norm_tuning))
    trains = " and ".join(what for what, given in others if given)
    return (
        f"no adapter matrix trains (lora_rank is {args.peft.lora_rank}), only {trains} do: give "
        "--lora_rank 8, or another width, for LoRA"
    )
