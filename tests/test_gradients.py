"""Gradients of every parameter: over several ranks those of one process, and there transformers' autograd."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import random_mixtral, whole_tensors, write_checkpoint
from models import assembled, load
from ranks import RankPool, on_ranks
from torch import Tensor

from accessory.checkpoint.layouts import load_args

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, (batch, length); trailing zeros are padding, label 0 is not learned."""

    examples: Tensor
    labels: Tensor


def random_batch(seed: int, lengths: list[int], width: int) -> Batch:
    """Rows of so many tokens, padded to ``width``; some labels, and those of the padding, are 0."""
    generator = torch.Generator().manual_seed(seed)
    examples = torch.randint(1, 384, (len(lengths), width), generator=generator)
    examples[torch.arange(width) >= torch.tensor(lengths)[:, None]] = 0
    learned = torch.rand(examples.shape, generator=generator) < 0.7
    return Batch(examples, examples * learned)


@torch.no_grad()
def send_all_to(hf: Any, expert: int) -> None:
    """Make every router choose ``expert`` first, whatever the token.

    The first channel of the residual stream becomes the same large number for every token, no layer adds to it,
    and the router reads a preference for the expert off it.
    """
    hf.model.embed_tokens.weight[:, 0] = 4.0
    for layer in hf.model.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.experts.down_proj[:, 0] = 0
        layer.mlp.gate.weight[:, 0] = 0
        layer.mlp.gate.weight[expert, 0] = 1.5


# Name -> sizes of the model, the expert that gets everything, and the batch.
CASES: dict[str, tuple[dict[str, Any], int | None, Batch]] = {
    "random": ({}, None, random_batch(0, [20, 20], 20)),
    "padding rows": ({}, None, random_batch(1, [9, 0, 16, 1], 16)),
    "top-3 of 4, odd slices": (
        {"num_experts_per_tok": 3, "num_local_experts": 4, "hidden_size": 36, "intermediate_size": 44},
        None,
        random_batch(2, [13, 7], 13),
    ),
    "idle experts": ({"num_local_experts": 16}, None, random_batch(3, [3], 3)),
    "all to one, top-1": ({"num_experts_per_tok": 1}, 5, random_batch(4, [20, 12], 20)),
    "all to one, top-2": ({}, 0, random_batch(5, [20, 12], 20)),
}


@dataclass(frozen=True)
class Gradients:
    """What one rank (or transformers) found; ``balance`` is None in eval mode."""

    loss: float
    balance: float | None
    by_name: dict[str, Tensor]


def gradients_on_rank(folder: Path, placement: str, batch: Batch, train: bool) -> Gradients:
    model = load(folder, placement).train(train)
    loss, extras = model(batch.examples, batch.labels)
    total = loss + sum(value * weight for value, weight in extras.values())
    total.backward()
    by_name = {name: parameter.grad for name, parameter in model.llma.named_parameters()}
    assert all(grad is not None for grad in by_name.values())
    balance = extras["load_balancing"][0].item() if train else None
    return Gradients(loss.item(), balance, by_name)


@pytest.fixture(scope="module")
def case(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """``case(name)`` is a transformers model and the folder of its checkpoint."""

    @cache
    def of(name: str) -> tuple[Any, Path]:
        sizes, expert, _ = CASES[name]
        hf = random_mixtral(3, **sizes)
        if expert is not None:
            send_all_to(hf, expert)
        folder = tmp_path_factory.mktemp("gradients") / "checkpoint"
        return hf, write_checkpoint(folder, hf, small_tokenizer, files=2)

    return of


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_find_the_gradients_of_a_single_process(
    name: str, size: int, ranks: Pools, case: Callable[[str], tuple[Any, Path]]
) -> None:
    _, folder = case(name)
    batch = CASES[name][2]
    args = load_args([folder / "config.json"])
    single = gradients_on_rank(folder, "auto", batch, True)
    for placement in ("expert", "tensor"):
        found = on_ranks(ranks, size, gradients_on_rank, folder, placement, batch, True)
        for rank in found:
            assert rank.loss == pytest.approx(single.loss, rel=1e-6)
            assert rank.balance == pytest.approx(single.balance, rel=1e-6)
        whole = assembled([rank.by_name for rank in found], args, placement)
        assert_gradients(whole, single.by_name)


def assert_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, relative: float = 3e-5) -> None:
    """Every parameter's gradient, to a share of its own largest element (rounding noise of the whole aside)."""
    assert ours.keys() == theirs.keys()
    largest = max(grad.abs().max().item() for grad in theirs.values())
    for name, expected in theirs.items():
        own = max(expected.abs().max().item(), 1e-3 * largest)
        difference = (ours[name] - expected).abs().max().item()
        assert difference <= relative * own, f"{name}: off by {difference / own:.1e} of its largest element"


# --- one process against transformers


def reference_loss(hf: Any, batch: Batch, balance_weight: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and load-balancing loss through transformers' logits and router logits."""
    output = hf(batch.examples, output_router_logits=True)
    top_k, learned, losses = hf.config.num_experts_per_tok, 0, torch.zeros(())
    for row, labels in zip(output.logits, batch.labels, strict=True):
        for position in range(1, len(labels)):
            if labels[position] != 0:
                learned += 1
                losses = losses + F.cross_entropy(row[position - 1], labels[position])
    kept = torch.cat([torch.arange(len(row)) <= last_token(row) for row in batch.examples])
    balance = torch.zeros(())
    for logits in output.router_logits:
        probs = logits[kept].softmax(-1)
        experts, tokens = probs.shape[1], probs.shape[0]
        counts = torch.zeros(experts)
        for chosen in probs.topk(top_k).indices:
            counts[chosen] += 1
        balance = balance + experts / (tokens * top_k) * (counts * probs.mean(0)).sum()
    return losses / learned, balance / len(output.router_logits) * balance_weight


def last_token(row: Tensor) -> int:
    """Place of a row's last token that is not padding, -1 where there is none."""
    return max((place for place, token in enumerate(row.tolist()) if token != 0), default=-1)


@pytest.mark.parametrize("train", [True, False], ids=["with balance", "cross-entropy alone"])
@pytest.mark.parametrize("name", CASES)
def test_a_single_process_finds_the_gradients_of_transformers(
    name: str, train: bool, case: Callable[[str], tuple[Any, Path]]
) -> None:
    hf, folder = case(name)
    batch = CASES[name][2]
    ours = gradients_on_rank(folder, "auto", batch, train)
    hf.zero_grad()
    loss, balance = reference_loss(hf, batch, 0.1)
    (loss + balance if train else loss).backward()
    assert ours.loss == pytest.approx(loss.item(), rel=1e-5)
    if train:
        assert ours.balance is not None
        assert ours.balance * 0.1 == pytest.approx(balance.item(), rel=1e-5)
    theirs = deepcopy(hf)
    for into, parameter in zip(theirs.parameters(), hf.parameters(), strict=True):
        into.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    # Splitting, stacking and permuting rows does to gradients what it does to weights.
    assert_gradients(released_names(ours.by_name), whole_tensors(theirs))


def released_names(by_name: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stacked experts taken apart: w13 holds w1 and w3."""
    apart = {}
    for name, grad in by_name.items():
        if ".experts." not in name:
            apart[name] = grad
            continue
        prefix = name[: name.index(".experts.")]
        for expert, matrices in enumerate(grad):
            parts = {"w2": matrices} if name.endswith(".w2") else dict(zip(("w1", "w3"), matrices, strict=True))
            for matrix, value in parts.items():
                apart[f"{prefix}.experts.{expert}.{matrix}.weight"] = value
    return apart


def test_the_cases_are_what_they_are_called(case: Callable[[str], tuple[Any, Path]]) -> None:
    for name, (sizes, expert, batch) in CASES.items():
        hf, folder = case(name)
        kept = torch.cat([torch.arange(len(row)) <= last_token(row) for row in batch.examples])
        with torch.no_grad():
            _, stats = load(folder).llma(batch.examples, kept.view(batch.examples.shape))
        assert stats.counts_E.shape == (2, sizes.get("num_local_experts", 8))
        top_k = hf.config.num_experts_per_tok
        assert (stats.counts_E.sum(-1) == kept.sum() * top_k).all()
        if expert is not None:
            assert (stats.counts_E[:, expert] == kept.sum()).all()
        if name == "all to one, top-1":
            assert (stats.counts_E > 0).sum(-1).tolist() == [1, 1]
        if name == "idle experts":  # at 4 ranks of 4 experts each, some rank has nothing to do
            assert (stats.counts_E.view(2, 4, 4).sum(-1) == 0).any()
