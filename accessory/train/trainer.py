"""One optimizer step of a model that is spread over data- and model-parallel ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.data.collate import Batch
from accessory.model.meta import MetaModel
from accessory.model.transformer import Transformer
from accessory.parallel.ops import local, reduce_from_region
from accessory.parallel.plan import layer_of, split_of
from accessory.train.optim import clip_gradients
from accessory.train.precision import judge_step
from accessory.train.sharding import set_last_backward

# The micro-batches of one rank for one step; examples and labels alone are rows of a text each.
MicroBatches = Sequence[Batch | tuple[Tensor, Tensor]]


class StepResult(NamedTuple):
    """What one optimizer step measured, the same on every rank.

    Attributes:
        loss: cross-entropy, mean over the learned tokens of all ranks, natural logarithm.
        balance_loss: the load-balancing loss before its weight, mean over micro-batches; 1 is even.
        z_loss: the router's z-loss before its weight, mean over micro-batches; None where it has no weight.
        grad_norm: of all gradients together, before clipping.
        tokens: of all ranks, without padding.
        learned: those of them that the loss is over.
        padding: share of the rows' places that hold no token.
        pairs_LE: float32 (layers, experts) on the CPU: pairs of token and expert; zeros in layers without experts.
        loss_scale: factor on the loss in this step, in float16; None in other dtypes.
        skipped: gradients in float16 overflowed and the step was not taken.
    """

    loss: float
    balance_loss: float
    z_loss: float | None
    grad_norm: float
    tokens: int
    learned: int
    padding: float
    pairs_LE: Tensor
    loss_scale: float | None = None
    skipped: bool = False


def train_step(
    model: MetaModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: MicroBatches,
    *,
    lr: float,
    clip_grad: float,
    scaler: torch.amp.GradScaler | None = None,
    bias_update_rate: float = 0.0,
) -> StepResult:
    """One optimizer step over all micro-batches of all data-parallel ranks.

    The loss is the sum over learned tokens divided by their count over all ranks and micro-batches, so that it does
    not depend on how the examples are dealt out; gradients are summed over the ranks accordingly.

    Args:
        micro_batches: of this rank; all ranks must have equally many.
        lr: learning rate; a group of the optimizer has ``rate`` times that.
        clip_grad: limit of the gradients' global norm; 0 or less: none.
        scaler: for float16; a step whose gradients overflow is skipped.
        bias_update_rate: of `move_corrections`; 0: the routers' correction biases stay.

    Raises:
        FloatingPointError: loss or gradient are not finite (with a scaler: and its scale has fallen below 1); on
            every rank alike, and the step is not taken.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)
    loss_scale = None if scaler is None else scaler.get_scale()
    (loss, balance, z_loss), (learned, places), pairs_LE = _gradients(model, micro_batches, scaler)
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = clip_gradients(model.parameters(), clip_grad, model.llma.state)
    taken = judge_step(scaler, loss, balance + (z_loss or 0.0), grad_norm)
    if taken:
        optimizer.step()
        if bias_update_rate:
            move_corrections(model.llma, pairs_LE, bias_update_rate)
    optimizer.zero_grad(set_to_none=True)
    args = model.llma.args
    tokens = round(pairs_LE[args.moe_layers[0]].sum().item() / args.moe.num_experts_per_tok)
    return StepResult(
        loss,
        balance,
        z_loss,
        grad_norm,
        tokens=tokens,
        learned=learned,
        padding=1 - tokens / places,
        pairs_LE=pairs_LE,
        loss_scale=loss_scale,
        skipped=not taken,
    )


@torch.no_grad()
def move_corrections(llma: Transformer, pairs_LE: Tensor, rate: float) -> None:
    """After a step, b_e += rate * sign(mean load - load_e) in each router: who had too little is chosen sooner.

    Balance without a loss (Wang et al., 2024, https://arxiv.org/abs/2408.15664), as DeepSeek-V3 has it
    (https://arxiv.org/abs/2412.19437).

    Args:
        pairs_LE: (layers, experts) of all data-parallel ranks and micro-batches.
    """
    state = llma.state
    # Should a model-parallel rank choose otherwise, all must move alike. Pairs are whole numbers, and in float64 so are
    # their sums: an even load moves nothing.
    pairs_LE = reduce_from_region(pairs_LE.to(state.device, torch.float64), state.mp_group)
    signs_LE = (pairs_LE.sum(-1, keepdim=True) - pairs_LE.shape[-1] * pairs_LE).sign().float()
    for name, parameter in llma.named_parameters():
        if split_of(name).kind == "correction":
            local(parameter).add_(signs_LE[layer_of(name)], alpha=rate)


def _gradients(
    model: MetaModel, micro_batches: MicroBatches, scaler: torch.amp.GradScaler | None
) -> tuple[tuple[float, float, float | None], tuple[int, int], Tensor]:
    """Backward passes of all micro-batches, and what they come to over all data-parallel ranks.

    Returns:
        Cross-entropy, balance and z-loss; learned tokens, and places of all rows; pairs of token and expert.
    """
    args, state, count = model.llma.args, model.llma.state, len(micro_batches)
    batches = [Batch(*own) for own in micro_batches]
    learned = [(own.labels[:, 1:] != 0).sum().to(state.device) for own in batches]
    places = sum(own.examples.numel() for own in batches)
    counts = torch.stack([torch.stack(learned).sum(), torch.tensor(places, device=state.device)])
    all_learned, all_places = reduce_from_region(counts, state.dp_group)
    sums: dict[str, Tensor] = {}
    pairs_LE = torch.zeros(args.n_layers, args.moe.num_experts, device=state.device)
    for number, (batch, own_learned) in enumerate(zip(batches, learned, strict=True), start=1):
        set_last_backward(model.llma, last=number == count)
        loss, extras, counts_LE = model.training_losses(
            batch.examples.to(state.device), batch.labels.to(state.device), batch.lengths
        )
        parts = {"loss": loss * (own_learned / all_learned.clamp(min=1))}
        total = parts["loss"] + sum(value * weight / count for value, weight in extras.values())
        (total if scaler is None else scaler.scale(total)).backward()
        # These are the same on all data-parallel ranks; the sum below would count them once for each.
        parts |= {name: value / count / state.dp_size for name, (value, _) in extras.items()}
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
        pairs_LE += counts_LE
    # Model-parallel ranks hold equal values; should one compute otherwise, all must judge the same numbers.
    of_dp = reduce_from_region(torch.stack(list(sums.values())), state.dp_group)
    of_all = reduce_from_region(of_dp, state.mp_group) / state.mp_size
    losses = dict(zip(sums, of_all.tolist(), strict=True))
    found = losses["loss"], losses["load_balancing"], losses.get("z_loss")
    return found, (int(all_learned), int(all_places)), pairs_LE.cpu()
