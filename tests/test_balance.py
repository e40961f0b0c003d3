"""The router's losses and the training loss, against references written out token by token."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from checkpoints import random_mixtral, write_checkpoint
from models import load
from torch import Tensor

from accessory.config import ModelArgs, MoEArgs
from accessory.model.balance import RouterStats, load_balancing_loss, router_z_loss
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained, load_transformer
from accessory.model.router import Routing
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState
from accessory.text.tokenizer import Tokenizer
from accessory.train.init import init_weights
from accessory.train.sharding import device_mesh, shard_model

pytestmark = pytest.mark.usefixtures("one_thread")


def routing_of(logits_TE: Tensor, top_k: int) -> Routing:
    probs = logits_TE.softmax(-1)
    weights, experts = probs.topk(top_k)
    return Routing(weights / weights.sum(-1, keepdim=True), experts, probs, logits_TE)


def stats_of(layers: Sequence[Tensor], top_k: int, counted: Tensor | None = None) -> RouterStats:
    return RouterStats.stacked([routing_of(logits, top_k).stats(counted) for logits in layers])


def loss_of(layers: Sequence[Tensor], top_k: int, counted: Tensor | None = None) -> Tensor:
    """The library's loss for router logits (T, E) of each layer."""
    return load_balancing_loss(stats_of(layers, top_k, counted), top_k)


def reference(layers: Sequence[Tensor], top_k: int, counted: Sequence[bool]) -> float:
    """Mean over layers of E / (N k) * sum over experts of count_e * mean p_e, in Python numbers."""
    total = 0.0
    for logits in layers:
        experts = logits.shape[1]
        counts, sums, tokens = [0] * experts, [0.0] * experts, 0
        for row, counts_too in zip(logits.tolist(), counted, strict=True):
            if not counts_too:
                continue
            tokens += 1
            scale = sum(math.exp(value) for value in row)
            for expert, value in enumerate(row):
                sums[expert] += math.exp(value) / scale
            for expert in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
                counts[expert] += 1
        total += experts / (tokens * top_k) * sum(c * s / tokens for c, s in zip(counts, sums, strict=True))
    return total / len(layers)


def random_logits(seed: int, layers: int, tokens: int, experts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(tokens, experts, generator=generator) for _ in range(layers)]


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 1), (16, 3), (6, 6), (1, 1)])
def test_loss_is_the_written_out_one(experts: int, top_k: int) -> None:
    layers = random_logits(experts, layers=3, tokens=23, experts=experts)
    counted = [token % 3 != 0 for token in range(23)]
    expected = reference(layers, top_k, counted)
    assert loss_of(layers, top_k, torch.tensor(counted)).item() == pytest.approx(expected, rel=1e-5)
    assert loss_of(layers, top_k).item() == pytest.approx(reference(layers, top_k, [True] * 23), rel=1e-5)


def test_worked_by_hand() -> None:
    # Two experts, top-1, three tokens with p = (3/4, 1/4), (3/4, 1/4), (1/4, 3/4): counts 2 and 1,
    # mean p = 7/12 and 5/12, so 2 / 3 * (2 * 7/12 + 1 * 5/12) = 19/18.
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]).log()
    assert loss_of([logits], 1).item() == pytest.approx(19 / 18)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_an_even_spread_gives_one_and_one_expert_gives_the_most(top_k: int) -> None:
    experts = 6
    # Token t prefers experts t, t + 1, ... in turn: every expert gets the same tokens.
    even = torch.stack([torch.arange(6.0).roll(shift) for shift in range(experts)])
    assert loss_of([even, even], top_k).item() == pytest.approx(1.0)
    # All choose the same k experts with near certainty: E / k.
    one = torch.tensor([[100.0] * top_k + [0.0] * (experts - top_k)]).repeat(5, 1)
    assert loss_of([one], top_k).item() == pytest.approx(experts / top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_loss_is_k_times_ours(top_k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    (logits,) = random_logits(7, layers=1, tokens=24, experts=8)
    counted = torch.tensor([[True] * 12, [True] * 5 + [False] * 7])
    theirs = load_balancing_loss_func((logits,), 8, top_k, counted.long())
    assert loss_of([logits], top_k, counted.flatten()).item() == pytest.approx(theirs.item() / top_k, rel=1e-5)


@pytest.mark.parametrize("loss_from", [load_balancing_loss, router_z_loss])
def test_no_counted_token_gives_zero_and_a_finite_gradient(loss_from: Callable[[RouterStats, int], Tensor]) -> None:
    (logits,) = random_logits(0, layers=1, tokens=4, experts=4)
    logits.requires_grad_()
    loss = loss_from(stats_of([logits], 2, torch.zeros(4, dtype=torch.bool)), 2)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_z_loss_worked_by_hand(top_k: int) -> None:
    # Sums of the exponentials: e and e^2 in the first layer, e^3 and e^-1 in the second; the third token of each is
    # padding. So the squares of the logarithms are 1, 4 and 9, 1, whose means over tokens are 2.5 and 5.
    quarter = torch.ones(4) / 4
    first = torch.stack([quarter.log() + 1, quarter.log() + 2, quarter.log() + 50])
    second = torch.stack([quarter.log() + 3, quarter.log() - 1, quarter.log() + 50])
    stats = stats_of([first, second], top_k, torch.tensor([True, True, False]))
    assert router_z_loss(stats, top_k).item() == pytest.approx(3.75)


# --- MetaModel.forward


@pytest.fixture
def model(small_tokenizer: Path) -> MetaModel:
    """A small model in training mode, with weights large enough for its routers to differ between tokens."""
    args = ModelArgs(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        hidden_dim=16,
        vocab_size=384,
        max_seq_len=64,
        moe=MoEArgs(num_experts=4, num_experts_per_tok=2),
        load_balancing_weight=0.25,
    )
    llma = Transformer(args, ParallelState.single("cpu"))
    init_weights(llma, seed=0)
    with torch.no_grad():
        for parameter in llma.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return MetaModel(llma, Tokenizer(small_tokenizer)).train()


def tokens_of(seed: int, *lengths: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 384, (len(lengths), width), generator=generator)
    rows[torch.arange(width) >= torch.tensor(lengths)[:, None]] = 0
    return rows


def balance_of(model: MetaModel, examples: Tensor, labels: Tensor) -> float:
    _, extras = model(examples, labels)
    ((name, (value, weight)),) = extras.items()
    assert (name, weight) == ("load_balancing", 0.25)
    return value.item()


def test_forward_counts_every_token_but_padding(small_tokenizer: Path, tmp_path: Path) -> None:
    """Prompt tokens (label 0) and a token 0 inside a row count; trailing zeros do not. Oracle: transformers."""
    hf = random_mixtral(5)
    model = load(write_checkpoint(tmp_path / "checkpoint", hf, small_tokenizer, files=1)).train()
    examples = tokens_of(1, 12, 5, 0, 1, width=12)
    examples[0, 4] = examples[1, 2] = 0
    labels = examples.clone()
    labels[0, :9] = 0
    counted = [token < length for length in (12, 5, 0, 1) for token in range(12)]
    with torch.no_grad():
        layers = hf(examples, output_router_logits=True).router_logits
    _, extras = model(examples, labels)
    value, weight = extras["load_balancing"]
    assert weight == 0.1
    assert value.item() == pytest.approx(reference(layers, 2, counted), rel=1e-5)


def test_padding_changes_nothing(model: MetaModel) -> None:
    short = tokens_of(2, 9, 9, width=9)
    wide = torch.zeros(3, 20, dtype=torch.int64)
    wide[:2, :9] = short
    loss, extras = model(short, short)
    padded_loss, padded_extras = model(wide, wide)
    assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert padded_extras["load_balancing"][0].item() == pytest.approx(extras["load_balancing"][0].item(), rel=1e-6)


def test_labels_are_shifted_and_zeros_are_not_learned(model: MetaModel) -> None:
    examples = tokens_of(3, 10, 7, width=10)
    labels = tokens_of(4, 10, 7, width=10)
    labels[0, 3:6] = 0
    with torch.no_grad():
        logits, _ = model.llma(examples)
        loss, _ = model(examples, labels)
        losses = [
            float(logits[row, place - 1].logsumexp(0) - logits[row, place - 1, labels[row, place]])
            for row in range(2)
            for place in range(1, 10)
            if labels[row, place] != 0
        ]
        assert len(losses) == 6 + 6
        assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        # The label of the first token has nothing before it to be predicted from.
        labels[:, 0] = 17
        assert model(examples, labels)[0].item() == loss.item()


def test_labels_do_not_touch_the_balance(model: MetaModel) -> None:
    examples = tokens_of(5, 10, 6, width=10)
    assert balance_of(model, examples, examples) == balance_of(model, examples, torch.zeros_like(examples))


def test_nothing_to_learn_gives_zero_and_finite_gradients(model: MetaModel) -> None:
    for examples in (tokens_of(6, 10, 6, width=10), torch.zeros(2, 10, dtype=torch.int64), torch.ones(1, 1).long()):
        model.zero_grad()
        loss, extras = model(examples, torch.zeros_like(examples))
        assert loss.item() == 0
        (loss + sum(value * weight for value, weight in extras.values())).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_extra_losses_come_in_training_alone(model: MetaModel) -> None:
    examples = tokens_of(7, 10, width=10)
    loss, extras = model(examples, examples)
    assert extras["load_balancing"][0].requires_grad
    eval_loss, none = model.eval()(examples, examples)
    assert none == {}
    assert eval_loss.item() == loss.item()


def test_statistics_are_sums(model: MetaModel) -> None:
    """Those of two rows are those of each row added up, so that data-parallel ranks can add theirs."""
    rows = tokens_of(8, 10, 10, width=10)
    with torch.no_grad():
        both, first, second = (model.llma(part)[1] for part in (rows, rows[:1], rows[1:]))
    assert torch.equal(both.counts_E, first.counts_E + second.counts_E)
    torch.testing.assert_close(both.probs_E, first.probs_E + second.probs_E)
    torch.testing.assert_close(both.squares, first.squares + second.squares)
    assert (both.counts_E.sum(-1) == 40).all()
    torch.testing.assert_close(both.probs_E.sum(-1), torch.full((2,), 20.0))


def test_examples_that_do_not_fit_are_refused(model: MetaModel) -> None:
    examples = tokens_of(9, 10, width=10)
    for one, other in ((examples, examples[:, :9]), (examples[0], examples[0]), (examples, examples[0])):
        with pytest.raises(ValueError, match="examples and labels must both be"):
            model(one, other)
    too_long = torch.ones(1, 65, dtype=torch.int64)
    with pytest.raises(ValueError, match="65 tokens long, the model's max_seq_len is 64"):
        model(too_long, too_long)
    with pytest.raises(ValueError, match="reads text only"):
        model(examples, examples, images=torch.zeros(1))


# --- training_losses over several ranks, against transformers' router logits

Z_WEIGHT = 0.03


class RouterCourse(NamedTuple):
    """What one rank found: the losses' values and weights, the pairs, and the z-loss's gradients by name."""

    extras: dict[str, tuple[float, float]]
    counts_LE: Tensor
    grads: dict[str, Tensor]


def router_batch() -> Tensor:
    """Four rows of unequal length, so that data-parallel ranks count unequally many tokens."""
    return tokens_of(11, 12, 3, 7, 9, width=12)


def z_loss_on_rank(folder: Path, mp_size: int, placement: str) -> RouterCourse:
    state = ParallelState.init(mp_size, "cpu")
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    llma = load_transformer(pretrained, state, dtype=torch.float32, expert_placement=placement)
    shard_model(llma, device_mesh(state))
    model = MetaModel(llma, pretrained.tokenizer).train()
    own = router_batch().chunk(state.dp_size)[state.dp_rank]
    _, extras, counts_LE = model.training_losses(own, own)
    assert not counts_LE.requires_grad
    extras["z_loss"][0].backward()
    found = {name: parameter.grad for name, parameter in llma.named_parameters()}
    grads = {name: grad.full_tensor() for name, grad in found.items() if grad is not None}
    return RouterCourse({name: (value.item(), weight) for name, (value, weight) in extras.items()}, counts_LE, grads)


@pytest.fixture(scope="module")
def z_folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("z-loss") / "base", random_mixtral(5), small_tokenizer, files=2)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "z_loss_weight": Z_WEIGHT}))
    return folder


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement"),
    [(1, 1, "auto"), (2, 1, "auto"), (1, 2, "expert"), (1, 2, "tensor"), (2, 2, "expert"), (2, 2, "tensor")],
)
def test_z_loss_is_that_of_transformers_router_logits(
    dp_size: int, mp_size: int, placement: str, ranks: Any, z_folder: Path
) -> None:
    hf, examples = random_mixtral(5), router_batch()
    kept = (examples != 0).flatten()
    layers = [logits[kept] for logits in hf(examples, output_router_logits=True).router_logits]
    expected = torch.stack([logits.exp().sum(-1).log().pow(2).mean() for logits in layers]).mean()
    expected.backward()
    counts = torch.stack([logits.topk(2).indices.flatten().bincount(minlength=8).float() for logits in layers])

    for found in ranks(dp_size * mp_size).run(z_loss_on_rank, z_folder, mp_size, placement):
        assert found.extras["z_loss"] == (pytest.approx(expected.item(), rel=1e-5), Z_WEIGHT)
        balance = reference([logits.detach() for logits in layers], 2, [True] * int(kept.sum()))
        assert found.extras["load_balancing"] == (pytest.approx(balance, rel=1e-5), 0.1)
        assert torch.equal(found.counts_LE, counts)
        for layer, block in enumerate(hf.model.layers):
            theirs = {
                "feed_forward.gate": block.mlp.gate.weight.grad,
                "attention_norm": block.input_layernorm.weight.grad,
            }
            for name, grad in theirs.items():
                ours = found.grads[f"layers.{layer}.{name}.weight"]
                torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
        torch.testing.assert_close(
            found.grads["tok_embeddings.weight"], hf.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6
        )


def test_z_loss_is_given_where_it_has_a_weight(model: MetaModel) -> None:
    examples = tokens_of(12, 10, 4, width=10)
    without = model.training_losses(examples, examples)
    assert without.extras.keys() == {"load_balancing"}
    model.llma.args = model.llma.args.replace(z_loss_weight=0.5)
    losses = model.training_losses(examples, examples)
    assert losses.extras["z_loss"][1] == 0.5
    assert losses.loss.item() == without.loss.item()
    assert torch.equal(losses.counts_LE, without.counts_LE)
    assert losses.counts_LE.sum().item() == 14 * 2 * 2
    # forward gives the same, in training alone.
    loss, extras = model(examples, examples)
    assert loss.item() == losses.loss.item()
    assert {name: value.item() for name, (value, _) in extras.items()} == {
        name: value.item() for name, (value, _) in losses.extras.items()
    }
    assert model.eval()(examples, examples)[1] == {}


def test_statistics_are_float32_in_bfloat16(model: MetaModel) -> None:
    """A sum over many tokens would lose its last ones in the compute dtype."""
    model.bfloat16()
    model.llma.args = model.llma.args.replace(z_loss_weight=0.5)
    examples = tokens_of(13, 10, width=10)
    _, stats = model.llma(examples)
    assert {sums.dtype for sums in stats} == {torch.float32}
    assert {value.dtype for value, _ in model.training_losses(examples, examples).extras.values()} == {torch.float32}


def losses_without_collectives(folder: Path) -> None:
    state = ParallelState.init(1, "cpu")
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    model = MetaModel(load_transformer(pretrained, state, dtype=torch.float32), pretrained.tokenizer)
    with mock.patch("torch.distributed.all_reduce", side_effect=AssertionError("a collective")) as all_reduce:
        loss, extras = model.eval()(router_batch(), router_batch())
        assert all_reduce.call_count == 0
        with pytest.raises(AssertionError, match="a collective"):
            model.train()(router_batch(), router_batch())
        assert all_reduce.call_count == 1
    assert loss.item() > 0
    assert extras == {}


def test_only_training_sums_over_data_parallel_ranks(ranks: Any, z_folder: Path) -> None:
    ranks(2).run(losses_without_collectives, z_folder)
