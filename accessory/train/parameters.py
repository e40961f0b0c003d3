"""Which parameters a run trains, told by what they belong to."""

import math
from collections import Counter

from accessory.config import ModelArgs
from accessory.model.meta import MetaModel
from accessory.parallel.plan import parameter_shapes

# The first whose text stands in a parameter's name.
_GROUPS = {
    "LoRA": "lora_",
    "biases": "bias",
    "norms": "norm",
    "router": "gate.",
    "experts": ".experts.",
    "attention": ".attention.",
    "embedding": "tok_embeddings",
    "output head": "output.",
}


def describe_trainable(model: MetaModel) -> str:
    """One line: how many parameters train, of how many, and in which groups; of the whole model, not a rank's part."""
    trained: Counter[str] = Counter()
    whole = parameter_shapes(model.llma.args.replace(quant=None))
    total = sum(math.prod(shape) for _, shape in whole)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[next(group for group, part in _GROUPS.items() if part in name)] += parameter.numel()
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
