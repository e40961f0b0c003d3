"""Recomputed activations: the same gradients, less kept, and the experts of the first choice."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from checkpoints import random_mixtral, write_checkpoint
from ranks import error_of
from test_gradients import Batch, random_batch, send_all_to
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accessory.config import ModelArgs, MoEArgs
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained, load_transformer
from accessory.model.router import Router
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState
from accessory.train import recompute
from accessory.train.init import init_weights
from accessory.train.recompute import recompute_activations
from accessory.train.sharding import device_mesh, shard_model

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = ("none", "moe", "full")
LAYERS = 2

# Name -> changed sizes of the model, the expert that gets every token, and the batch.
CASES: dict[str, tuple[dict[str, Any], int | None, Batch]] = {
    "random": ({}, None, random_batch(0, [20, 9, 16, 1], 20)),
    "all to one": ({"num_experts_per_tok": 1}, 5, random_batch(4, [20, 12, 7, 12], 20)),
}


class Pass(NamedTuple):
    """What two micro-batches gave on one rank.

    Attributes:
        losses: every loss's value.
        grads: whole, by the parameters' names.
        sums: sizes of the tensors that were summed over the model-parallel ranks, in order.
    """

    losses: list[float]
    grads: dict[str, Tensor]
    sums: list[int]


@contextmanager
def movable_choice() -> Iterator[Callable[[int], None]]:
    """Gives ``move(by)``: what top-k reads, and it alone, is moved on by so many experts from then on."""
    topk, moved_by = Tensor.topk, 0

    def moved(probs: Tensor, *args: Any, **kwargs: Any) -> Any:
        return topk(probs.roll(moved_by, -1), *args, **kwargs)

    def move(by: int) -> None:
        nonlocal moved_by
        moved_by = by

    with mock.patch.object(Tensor, "topk", moved):
        yield move


@contextmanager
def counted_sums(group: Any) -> Iterator[list[int]]:
    """A list that gets the size of every tensor that is summed over the group."""
    all_reduce, sizes = torch.distributed.all_reduce, []

    def counting(x: Tensor, **settings: Any) -> Any:
        if settings["group"] is group:
            sizes.append(x.numel())
        return all_reduce(x, **settings)

    with mock.patch("torch.distributed.all_reduce", counting):
        yield sizes


def passes_on_rank(
    folder: Path, mp_size: int, placement: str, batch: Batch, settings: dict[str, Any], moved_on: int = -1
) -> list[Pass]:
    """The same two micro-batches under every policy; on one rank of a model the second choice may be moved.

    Args:
        settings: of `shard_model`, and ``ep_size``.
    """
    settings = dict(settings)
    state = ParallelState.init(mp_size, "cpu", ep_size=settings.pop("ep_size", 1))
    moves = moved_on == (state.mp_rank if state.ep.size == 1 else state.ep.rank)
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    passes = []
    for policy in POLICIES:
        llma = load_transformer(pretrained, state, dtype=torch.float32, expert_placement=placement)
        recompute_activations(llma, policy)
        shard_model(llma, device_mesh(state), **settings)
        model, losses = MetaModel(llma, pretrained.tokenizer).train(), []
        with counted_sums(state.mp_group) as sums, movable_choice() as move:
            for rows in (slice(0, 2), slice(2, 4)):
                own = [part[rows].chunk(state.dp_size)[state.dp_rank] for part in (batch.examples, batch.labels)]
                loss, extras, _ = model.training_losses(*own)
                assert extras.keys() == {"load_balancing", "z_loss"}
                move(1 if moves else 0)
                (loss + sum(value * weight for value, weight in extras.values())).backward()
                move(0)
                losses += [loss.item(), *(value.item() for value, _ in extras.values())]
        grads = {name: parameter.grad.full_tensor() for name, parameter in llma.named_parameters()}
        passes.append(Pass(losses, grads, sums))
    return passes


@pytest.fixture(scope="module")
def folders(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of each case, whose z-loss has a weight."""
    folders = {}
    for name, (sizes, expert, _) in CASES.items():
        hf = random_mixtral(3, **sizes)
        if expert is not None:
            send_all_to(hf, expert)
        folder = write_checkpoint(tmp_path_factory.mktemp("recompute") / "base", hf, small_tokenizer, files=2)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "z_loss_weight": 0.01}))
        folders[name] = folder
    return folders


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement", "settings"),
    [
        (1, 1, "auto", {}),
        (2, 1, "auto", {}),
        (1, 2, "expert", {}),
        (1, 2, "tensor", {}),
        (2, 2, "expert", {}),
        (2, 2, "tensor", {}),
        (2, 2, "expert", {"compute_dtype": torch.bfloat16, "data_parallel": "sdp"}),
        (2, 2, "tensor", {"data_parallel": "ddp"}),
        (2, 1, "auto", {"ep_size": 2, "compute_dtype": torch.bfloat16}),
        (2, 1, "auto", {"ep_size": 2}),
        (2, 2, "tensor", {"ep_size": 2, "data_parallel": "ddp"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_gradients_are_those_of_kept_activations(
    case: str,
    dp_size: int,
    mp_size: int,
    placement: str,
    settings: dict[str, Any],
    ranks: Any,
    folders: dict[str, Path],
) -> None:
    by_rank = ranks(dp_size * mp_size).run(passes_on_rank, folders[case], mp_size, placement, CASES[case][2], settings)
    for kept, moe, full in by_rank:
        assert_same_passes(kept, moe, full)
        # Not one sum over the ranks more for the experts, and only those behind attention for whole blocks.
        assert len(moe.sums) == len(kept.sums)
        assert len(full.sums) == len(kept.sums) + (2 * LAYERS if mp_size > 1 else 0)
        assert (len(kept.sums) > 0) == (mp_size > 1)
    for first in range(0, dp_size * mp_size, mp_size):
        for rank in by_rank[first : first + mp_size]:
            assert [one.sums for one in rank] == [one.sums for one in by_rank[first]]


def assert_same_passes(kept: Pass, *others: Pass) -> None:
    for other in others:
        assert other.losses == kept.losses
        assert other.grads.keys() == kept.grads.keys()
        for name, grad in kept.grads.items():
            assert torch.equal(other.grads[name], grad), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("placement", "ep_size"), [("expert", 1), ("tensor", 1), ("auto", 2)])
def test_no_rank_can_choose_otherwise(
    case: str, placement: str, ep_size: int, ranks: Any, folders: dict[str, Path]
) -> None:
    """Not even one alone, which would meet other shapes, or the peers in other sums or exchanges."""
    arguments = (folders[case], 2 // ep_size, placement, CASES[case][2], {"ep_size": ep_size})
    for (kept, *_), moved in zip(
        ranks(2).run(passes_on_rank, *arguments), ranks(2).run(passes_on_rank, *arguments, 1), strict=True
    ):
        assert_same_passes(kept, *moved)


# --- one process


def small_model(policy: Any = "none", layers: int = LAYERS, **sizes: Any) -> Transformer:
    """Random weights; the widths stand to one another as Mixtral's do."""
    settings: dict[str, Any] = {
        "dim": 64,
        "hidden_dim": 224,
        "n_heads": 8,
        "n_kv_heads": 2,
        "vocab_size": 64,
        "max_seq_len": 64,
        **sizes,
    }
    model = Transformer(ModelArgs(n_layers=layers, **settings), ParallelState.single("cpu"))
    init_weights(model, seed=0)
    with torch.no_grad():
        for block in model.layers:
            block.feed_forward.gate.weight.mul_(20)
    recompute_activations(model, policy)
    return model


def some_tokens() -> Tensor:
    return torch.randint(1, 64, (4, 48), generator=torch.Generator().manual_seed(1))


def loss_of(model: Transformer) -> Tensor:
    """Something that depends on every output of a training pass."""
    logits, stats = model(some_tokens())
    return logits.logsumexp(-1).mean() + logits.square().mean() + stats.probs_E.square().sum() + stats.squares.sum()


def grads_of(model: Transformer) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad.clone()
    return grads


class Storages(TorchDispatchMode):
    """Remembers, without keeping it, the memory of everything that is computed inside.

    More than autograd's saved tensors: what a closure or a cache holds is seen too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._sizes[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        return result

    def alive(self, apart_from: Iterable[Tensor]) -> int:
        """Bytes that someone still holds, without those of these tensors, of which views may have been made."""
        for tensor in apart_from:
            self._sizes.pop(StorageWeakRef(tensor.untyped_storage()), None)
        return sum(size for reference, size in self._sizes.items() if not reference.expired())


def bytes_kept(policy: str, layers: int) -> int:
    """Bytes alive between forward and backward pass."""
    model = small_model(policy, layers)
    with Storages() as storages:
        loss = loss_of(model)
    alive = storages.alive(model.parameters())
    loss.backward()  # which is what they are kept for
    return alive


def test_less_is_kept() -> None:
    kept = {policy: (bytes_kept(policy, 3) - bytes_kept(policy, 1)) / 2 for policy in POLICIES}
    stream = some_tokens().numel() * 64 * 4  # the input of a layer, float32
    # Measured: 23, 8.8 and 1.25 times the input; the last quarter is the routing, which at real widths is nothing.
    assert kept["none"] > 20 * stream
    assert kept["moe"] < kept["none"] / 2
    assert stream <= kept["full"] < 1.4 * stream


def test_names_and_passes_without_gradients_are_as_before() -> None:
    plain, names = small_model(), list(small_model().state_dict())
    for policy in ("moe", "full"):
        model = small_model(policy)
        assert list(model.state_dict()) == names
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        with mock.patch.object(recompute, "checkpoint", side_effect=AssertionError("recomputes")):
            for without_gradients in (torch.no_grad(), torch.inference_mode()):
                with without_gradients:
                    assert torch.equal(model(some_tokens())[0], plain(some_tokens())[0])
            with pytest.raises(AssertionError, match="recomputes"):
                model(some_tokens())


@pytest.mark.parametrize("policy", ["moe", "full"])
def test_a_copy_computes_with_its_own_weights(policy: str) -> None:
    model = small_model(policy)
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loss_of(copied).backward()
    plain = small_model()
    loss_of(plain).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    theirs = grads_of(plain)
    assert all(torch.equal(grad, theirs[name]) for name, grad in grads_of(copied).items())


def test_an_unknown_policy_is_refused() -> None:
    kind, message = error_of(small_model, "some")
    assert kind == "ValueError"
    assert "'some'" in message
    assert "give one of full, moe, none" in message


# --- a router that would choose otherwise the second time


def grads_with_choice_moved(policy: str) -> dict[str, Tensor]:
    model = small_model(policy)
    with movable_choice() as move:
        loss = loss_of(model)
        move(1)
        loss.backward()
    return grads_of(model)


def kept_nothing() -> Any:
    """Recomputation without the saved choice: what the tests here must be able to tell apart."""
    return mock.patch.object(recompute, "_KEPT", [])


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of an element from the other's, relative to the tensor's largest."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in theirs.items())


@pytest.mark.parametrize("policy", ["moe", "full"])
def test_the_first_choice_of_experts_holds(policy: str) -> None:
    """The probabilities are the same both times, so all gradients must be, to the bit."""
    truth = grads_with_choice_moved("none")
    found = grads_with_choice_moved(policy)
    assert all(torch.equal(found[name], grad) for name, grad in truth.items())
    with kept_nothing():  # raises nothing, and is wrong
        assert largest_difference(grads_with_choice_moved(policy), truth) > 0.5


def tied_model(policy: str) -> Transformer:
    """Top-1 of four experts, of which two at a time are equally probable for every token."""
    model = small_model(policy, moe=MoEArgs(num_experts=4, num_experts_per_tok=1))
    with torch.no_grad():
        for block in model.layers:
            gate = block.feed_forward.gate.weight
            gate[1::2] = gate[::2]
    return model


@torch.no_grad()
def nudge_routers(model: Transformer) -> None:
    """Move the routers' weights by as much as rounding would."""
    generator = torch.Generator().manual_seed(2)
    for block in model.layers:
        gate = block.feed_forward.gate.weight
        gate.add_(1e-6 * torch.randn(gate.shape, generator=generator))


def grads_with_ties_broken(policy: str) -> dict[str, Tensor]:
    model = tied_model(policy)
    loss = loss_of(model)
    nudge_routers(model)
    loss.backward()
    return grads_of(model)


@torch.no_grad()
def choices(model: Transformer) -> Tensor:
    chosen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, routing: chosen.append(routing.experts_TK))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    model(some_tokens())
    for handle in handles:
        handle.remove()
    return torch.stack(chosen)


@pytest.mark.parametrize("policy", ["moe", "full"])
def test_a_tie_that_rounding_breaks_the_other_way_changes_nothing(policy: str) -> None:
    model = tied_model("none")
    before = choices(model)
    loss_of(model).backward()
    truth = grads_of(model)
    nudge_routers(model)
    assert 0.2 < (choices(model) != before).float().mean() < 0.8
    assert largest_difference(grads_with_ties_broken(policy), truth) < 1e-4
    with kept_nothing():
        try:
            wrong = largest_difference(grads_with_ties_broken(policy), truth)
        except RuntimeError:
            return  # torch has noticed other products than in the forward pass, as when an expert's last token left
        assert wrong > 0.1
