"""Activations that are computed again in the backward pass instead of being kept (Chen et al., 2016,
https://arxiv.org/abs/1604.06174).

The choice of experts is kept, as little as it takes. A router that rounds differently the second time could choose
other experts: nothing would be raised, and gradients would be those of experts that the loss never saw.
"""

from functools import partial
from types import MethodType
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, checkpoint, create_selective_checkpoint_contexts

from accessory.model import exchange  # noqa: F401  (defines the operator)
from accessory.model.transformer import Transformer
from accessory.train.options import RecomputePolicy

# Values and places of the chosen experts: the products that follow and top-k's own backward pass read these. And how
# many tokens other ranks send, which they are not asked for again.
_KEPT = [torch.ops.aten.topk.default, torch.ops.accessory.exchange_counts.default]

# The hooks of FSDP around spread experts lie inside what is computed again, and mark for a profiler what they do. That
# differs where the backward pass first asks for a tensor behind the experts, as of a shared one.
SAC_IGNORED_OPS.update(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)


def recompute_activations(model: Transformer, policy: RecomputePolicy) -> None:
    """Make a finished model keep less of its forward passes with gradients, in place; before `shard_model`.

    Parameters keep their names, and passes without gradients run as before.

    Args:
        policy: "full" keeps a block's input and computes the rest again, "moe" does so for the feed-forward part
            (router and experts, where a token takes most room) alone, "none" keeps everything.

    Raises:
        ValueError: another policy.
    """
    if policy not in get_args(RecomputePolicy):
        raise ValueError(f"the recomputation policy is {policy!r}: give one of {', '.join(get_args(RecomputePolicy))}")
    if policy == "none":
        return
    peft = model.args.peft
    random = peft is not None and peft.lora_dropout > 0
    for block in model.layers:
        _recompute(block if policy == "full" else block.get_submodule("feed_forward"), random)


def _recompute(module: nn.Module, random: bool) -> None:
    # The instance's forward and no wrapper module: names stay, and FSDP's hooks, which sit on __call__, gather the
    # parameters around both computations. A bound method, since a copy of the model must run its own.
    module.forward = MethodType(_forward_again if random else _forward, module)


def _forward_again(module: nn.Module, *inputs: Any) -> Any:
    return _forward(module, *inputs, random=True)


def _forward(module: nn.Module, *inputs: Any, random: bool = False) -> Any:
    forward = partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    # The second computation ends at the last tensor that the backward pass asks for. On every model-parallel rank
    # that is in the weighted sum of the experts, whether it has tokens or not: all meet the collectives before it
    # again, and none the sum over the ranks behind it.
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _KEPT),
        preserve_rng_state=random,  # of a block nothing but dropout is
    )
