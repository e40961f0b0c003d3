"""Experts spread over data-parallel ranks: the exchange by hand and beside the dispatcher of one process, gradients of
whole models beside those of one process, and what is sent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from adapters import random_adapter, write_adapter
from checkpoints import accessory_config, random_mixtral, write_checkpoint
from ranks import RankPool
from test_gradients import random_batch, send_all_to
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.config import QuantArgs
from accessory.model.dispatch import Dispatcher, Pairs, TrainedPairs
from accessory.model.exchange import ExchangingDispatcher
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.model.router import Routing
from accessory.model.units import silu_gate
from accessory.parallel.ops import local
from accessory.parallel.state import ParallelState, Ranks
from accessory.train import trainer
from accessory.train.build import build_for_training
from accessory.train.planner import EXCHANGES, SUMS
from accessory.train.recompute import recompute_activations
from accessory.train.sharding import device_mesh

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]


def routing_of(weights_TK: Tensor, experts_TK: Tensor) -> Routing:
    return Routing(weights_TK, experts_TK, weights_TK, weights_TK)


# -- the exchange


def ten_tokens_on_rank() -> dict[str, Any]:
    """Tokens are the numbers 1 to 10, on rank 0 the first six; expert e makes 10^e of 1, and is on rank e // 2."""
    rank = dist.get_rank()
    x_T1 = [torch.tensor([[1.0], [2], [3], [4], [5], [6]]), torch.tensor([[7.0], [8], [9], [10]])][rank]
    experts_T1 = [torch.tensor([[0], [2], [2], [3], [1], [2]]), torch.tensor([[2], [0], [2], [2]])][rank]
    weights_T1 = torch.full(x_T1.shape, 2.0)
    weight_E11 = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])[rank].view(2, 1, 1)
    for tensor in (x_T1, weights_T1, weight_E11):
        tensor.requires_grad_()
    state = ParallelState.init(1, "cpu", ep_size=2)
    pairs = ExchangingDispatcher(2, state.ep, Ranks())(x_T1, routing_of(weights_T1, experts_T1))
    y_A1 = pairs.product(pairs.rows, weight_E11)
    out_T1 = pairs.combine(y_A1, weights_T1)
    out_T1.sum().backward()
    assert x_T1.grad is not None
    assert weights_T1.grad is not None
    assert weight_E11.grad is not None
    return {
        "sent": pairs.home.rows.flatten().tolist(),
        "arrived": pairs.x_TD.flatten().tolist(),
        "offsets": pairs.offsets_E.tolist(),
        "sorted": pairs.rows.flatten().tolist(),
        "out": out_T1.flatten().tolist(),
        "x": x_T1.grad.flatten().tolist(),
        "weights": weights_T1.grad.flatten().tolist(),
        "weight": weight_E11.grad.flatten().tolist(),
    }


def test_ten_tokens_by_hand(ranks: Pools) -> None:
    first, second = ranks(2).run(ten_tokens_on_rank)
    # By expert: 0 and 1 are on rank 0, 2 and 3 on rank 1.
    assert first["sent"] == [1, 5, 2, 3, 6, 4]
    assert second["sent"] == [8, 7, 9, 10]
    # Rank 0 keeps 1 and 5 and gets 8; rank 1 gets 2, 3, 6 for expert 2 and 4 for expert 3, and keeps the rest.
    assert first["arrived"] == [1, 5, 8]
    assert second["arrived"] == [2, 3, 6, 4, 7, 9, 10]
    # By expert again.
    assert (first["sorted"], first["offsets"]) == ([1, 8, 5], [2, 3])
    assert (second["sorted"], second["offsets"]) == ([2, 3, 6, 7, 9, 10, 4], [6, 7])
    # Each token is where it was, twice what its expert made of it.
    assert first["out"] == [2, 400, 600, 8000, 100, 1200]
    assert second["out"] == [1400, 16, 1800, 2000]
    # The derivatives are twice the expert's factor; what the expert made; and twice the sum of an expert's tokens:
    # 1 + 8 and 5 on rank 0, 2 + 3 + 6 + 7 + 9 + 10 and 4 on rank 1.
    assert first["x"] == [2, 200, 200, 2000, 20, 200]
    assert second["x"] == [200, 2, 200, 200]
    assert first["weights"] == [1, 200, 300, 4000, 50, 600]
    assert second["weights"] == [700, 8, 900, 1000]
    assert (first["weight"], second["weight"]) == ([18, 10], [74, 8])


def drawn_on_rank(mp_size: int, ep_size: int, cases: int) -> list[float]:
    """The largest difference from one dispatcher that has all experts, of output and gradients, in each drawn case.

    Each model-parallel rank is a column that sends the pairs of its own experts.
    """
    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
    worst = []
    for case in range(cases):
        generator = torch.Generator().manual_seed(case)

        def drawn(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        count, dim, hidden = drawn(1, 3), drawn(1, 6), drawn(1, 6)
        total = count * mp_size * ep_size
        top_k = drawn(1, min(3, total))
        w13 = torch.randn(total, 2, hidden, dim, generator=generator)
        w2 = torch.randn(total, dim, hidden, generator=generator)
        # One data-parallel rank in two is sometimes empty; sometimes all tokens want the last experts alone.
        tokens = [0 if case % 3 == 1 and rank % 2 else drawn(1, 9) for rank in range(state.dp_size)]
        wanted = torch.arange(total) / total * (case % 4 == 2) * 10
        each = [
            (
                torch.randn(count, dim, generator=generator),
                torch.rand(count, top_k, generator=generator),
                (torch.rand(count, total, generator=generator) + wanted).topk(top_k).indices,
            )
            for count in tokens
        ]
        x, weights, experts = each[state.dp_rank]
        first = count * (state.ep.rank * mp_size + state.mp.rank)
        own = slice(first, first + count)
        truth = passed(Dispatcher(0, total, total), x, weights, experts, w13, w2)
        dispatcher = ExchangingDispatcher(count, state.ep, state.mp)
        for fused in (False, True):
            found = passed(dispatcher, x, weights, experts, w13[own], w2[own], fused=fused)
            differences = []
            for number, (ours, theirs) in enumerate(zip(found, truth, strict=True)):
                if number < 3:  # the output and what is the tokens': the columns' sum
                    dist.all_reduce(ours, group=state.mp_group)
                    expected = theirs
                else:  # what is the experts': of all tokens
                    expected = theirs.clone()
                    dist.all_reduce(expected, group=state.dp_group)
                    dist.all_reduce(ours, group=state.efsdp.group) if state.efsdp.size > 1 else None
                    expected = expected[own]
                assert ours.shape == expected.shape
                scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
                differences.append((ours - expected).abs().max().item() / scale if expected.numel() else 0.0)
            worst.append(max(differences))
    return worst


def passed(
    dispatcher: Any, x: Tensor, weights: Tensor, experts: Tensor, w13: Tensor, w2: Tensor, *, fused: bool = False
) -> list[Tensor]:
    """Output, and gradients of tokens, weights and both matrices."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weights, w13, w2)]
    pairs: Pairs = dispatcher(inputs[0], routing_of(inputs[1], experts))
    assert isinstance(pairs, TrainedPairs)
    if fused:
        out = pairs.fused(inputs[2], inputs[3], inputs[1])
    else:
        hidden = silu_gate(pairs.product(pairs.rows, inputs[2]))
        out = pairs.combine(pairs.product(hidden, inputs[3]), inputs[1])
    loss = (out * torch.arange(1.0, out.shape[-1] + 1)).sum()
    return [out.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(("size", "mp_size", "ep_size"), [(2, 1, 2), (4, 1, 2), (4, 2, 2)])
def test_drawn_exchanges_are_one_dispatcher(size: int, mp_size: int, ep_size: int, ranks: Pools) -> None:
    for differences in ranks(size).run(drawn_on_rank, mp_size, ep_size, 24):
        assert max(differences) < 1e-5


# -- whole models


class Row(NamedTuple):
    """A way of training: which model, and how it is spread and recomputed.

    Attributes:
        model: a key of `models`; in "one expert" all tokens choose the same one, and no other.
        quant: of the base.
    """

    model: str
    data_parallel: str = "fsdp"
    placement: str = "auto"
    policy: str = "none"
    quant: str | None = None
    compute_dtype: torch.dtype = torch.float32


ROWS = 8
# Of unequal length, some of them padding alone: at dp 4 whatever the fourth rank has of a micro-batch.
BATCH = random_batch(7, [13, 7, 16, 0, 5, 16, 2, 0], 16)


def built(paths: list[Path], row: Row, state: ParallelState) -> MetaModel:
    quant = None if row.quant is None else QuantArgs(type=row.quant, group_size=32 if row.quant == "int4" else 64)  # type: ignore[arg-type]
    pretrained = Pretrained.resolve(paths, max_seq_len=64, quant=quant)
    llma = build_for_training(
        pretrained,
        state,
        device_mesh(state),
        data_parallel=row.data_parallel,  # type: ignore[arg-type]
        compute_dtype=row.compute_dtype,
        expert_placement=row.placement,
        before_sharding=lambda llma: recompute_activations(llma, row.policy),  # type: ignore[arg-type]
    )
    return MetaModel(llma, pretrained.tokenizer, pretrained.llama_type).train()


def own_rows(state: ParallelState, examples: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two micro-batches of this rank's rows, each as wide as its longest, so that ranks have unlike lengths."""
    found = []
    for both in zip(examples.chunk(2), labels.chunk(2), strict=True):
        own = [part.chunk(state.dp_size)[state.dp_rank] for part in both]
        width = max(2, int((own[0] != 0).sum(1).max()))
        found.append((own[0][:, :width], own[1][:, :width]))
    return found


class Found(NamedTuple):
    """What the passes of one step gave: cross-entropy and balance loss, and whole gradients, on rank 0 alone."""

    losses: tuple[float, ...]
    gradients: dict[str, Tensor]


def gradients_on_rank(models: dict[str, list[Path]], rows: list[Row], mp_size: int, ep_size: int) -> list[Found]:
    state, found = ParallelState.init(mp_size, "cpu", ep_size=ep_size), []
    for row in rows:
        model = built(models[row.model], row, state)
        losses, _, _ = trainer._gradients(model, own_rows(state, BATCH.examples, BATCH.labels), None)
        gradients = {}
        assert_parts(model, state.efsdp.size if row.data_parallel == "ddp" else 1)
        for name, own in model.llma.named_parameters():
            if own.requires_grad:
                assert own.grad is not None, name
                gradients[name] = own.grad.full_tensor()  # type: ignore[operator]
        found.append(Found(losses[:2], gradients if dist.get_rank() == 0 else {}))
    return found


def assert_parts(model: MetaModel, copies: int) -> None:
    """A rank holds its share of the experts, of which there are so many copies, and no more."""
    for name, own in model.llma.named_parameters():
        if name.endswith(("experts.w13", "experts.w2")):
            assert local(own).numel() * dist.get_world_size() == own.numel() * copies


@pytest.fixture(scope="module")
def models(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    hf, one = random_mixtral(5, intermediate_size=64), random_mixtral(6, num_experts_per_tok=1)
    send_all_to(one, 5)
    config = accessory_config(hf.config)
    plain = write_checkpoint(folder / "plain", hf, small_tokenizer, files=2)
    adapter = write_adapter(folder / "adapter", random_adapter(config, 8), config, files=2, tokenizer=small_tokenizer)
    return {
        "plain": [plain],
        "adapted": [plain, adapter],
        "one expert": [write_checkpoint(folder / "one", one, small_tokenizer, files=1)],
    }


WAYS = [
    Row("plain", "fsdp", "expert"),
    Row("plain", "ddp", "tensor", "moe"),
    Row("one expert", "sdp", "expert", "full"),
    Row("adapted", "sdp", "tensor"),
    Row("adapted", "ddp", "expert", "full", "int8"),
    Row("adapted", "fsdp", "tensor", "moe", "int4"),
]


@pytest.fixture(scope="module")
def truth(ranks: Pools, models: dict[str, list[Path]]) -> dict[tuple[str, str | None], Found]:
    """Of one process, by model and quantization."""
    keys = list(dict.fromkeys((row.model, row.quant) for row in WAYS))
    (found,) = ranks(1).run(gradients_on_rank, models, [Row(model, quant=quant) for model, quant in keys], 1, 1)
    return dict(zip(keys, found, strict=True))


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "ep_size", "every"),
    [(2, 1, 2, 1), (4, 1, 2, 1), (4, 1, 4, 1), (2, 2, 2, 1), (4, 2, 2, 3), (4, 2, 4, 2)],
)
def test_gradients_are_those_of_one_process(
    dp_size: int, mp_size: int, ep_size: int, every: int, ranks: Pools, models: dict[str, list[Path]], truth: Any
) -> None:
    """Eight ranks take every second or third of the ways, which are slow on few cores."""
    ways = WAYS[every - 1 :: every]
    found, *others = ranks(dp_size * mp_size).run(gradients_on_rank, models, ways, mp_size, ep_size)
    for number, row in enumerate(ways):
        expected, own = truth[row.model, row.quant], found[number]
        assert own.losses == pytest.approx(expected.losses, rel=1e-6)
        assert all(other[number].losses == own.losses for other in others)
        assert_gradients(own.gradients, expected.gradients, str(row))


def assert_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max().item()
        difference = (ours[name] - gradient).abs().max().item()
        assert difference <= 1e-5 * largest, f"{what}: {name} is off by {difference} of {largest}"


# -- what is sent


class Exchanges(TorchDispatchMode):
    """Counts what a rank hands to exchanges.

    Attributes:
        payloads: of each exchange of rows, how many bytes leave for each rank.
        counts: bytes of each exchange of how many rows there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payloads: list[list[int]] = []
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            rows, _, leaving, _ = args
            self.payloads.append([count * rows.shape[1] * rows.element_size() for count in leaving])
        if func is torch.ops.accessory.exchange_counts.default:
            self.counts.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


class Sent(NamedTuple):
    """What a rank sent in the passes of a micro-batch; pairs of its tokens whose experts lie on other ranks of ep.

    Attributes:
        sums: of activations, over the model-parallel ranks.
    """

    exchanges: int
    counts: list[int]
    bytes: int
    elsewhere: int
    tokens: int
    pairs_elsewhere: int
    sums: int


def sent_on_rank(models: dict[str, list[Path]], rows: list[Row], mp_size: int, ep_size: int) -> list[Sent]:
    state, found = ParallelState.init(mp_size, "cpu", ep_size=ep_size), []
    for row in rows:
        model = built(models[row.model], row, state)
        experts = model.llma.args.moe.num_experts
        chosen: list[Tensor] = []
        for block in model.llma.layers:
            gate = block.get_submodule("feed_forward.gate")
            gate.register_forward_hook(lambda _, __, routing, to=chosen: to.append(routing.experts_TK))
        (own, *_) = own_rows(state, BATCH.examples, BATCH.labels)
        with Exchanges() as exchanges, mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as sums:
            loss, extras, _ = model.training_losses(*own)
            first_choices = torch.stack(chosen)  # not those of a second computation
            (loss + sum(value * weight for value, weight in extras.values())).backward()
        leave = [sum(part for rank, part in enumerate(parts) if rank != state.ep.rank) for parts in exchanges.payloads]
        on_LTK = first_choices // (experts // ep_size)  # which rank of ep, whatever the columns
        found.append(
            Sent(
                len(exchanges.payloads),
                exchanges.counts,
                sum(map(sum, exchanges.payloads)),
                sum(leave),
                own[0].numel(),
                int((on_LTK != state.ep.rank).sum()),
                sum(call.args[0].numel() == own[0].numel() * 32 for call in sums.call_args_list),
            )
        )
    return found


@pytest.mark.parametrize(("size", "mp_size", "ep_size"), [(2, 1, 2), (4, 2, 2)])
def test_what_is_sent(size: int, mp_size: int, ep_size: int, ranks: Pools, models: dict[str, list[Path]]) -> None:
    """The bytes that docs/scaling.md has, for each token and layer: no pair twice, none dropped."""
    layers, top_k, width, experts = 2, 2, 32, 8
    dtypes = {"none": torch.bfloat16, "moe": torch.float32, "full": torch.bfloat16}
    for policy, exchanges in EXCHANGES.items():
        dtype = dtypes[policy]
        rows = [Row("plain", "fsdp", place, policy, compute_dtype=dtype) for place in ("expert", "tensor")]
        by_rank = ranks(size).run(sent_on_rank, models, rows, mp_size, ep_size)
        for number, row in enumerate(rows):
            # In slices every model-parallel rank sends all pairs; else each those of its own experts.
            times = mp_size if row.placement == "tensor" else 1
            found = [sent[number] for sent in by_rank]
            assert all(sent.exchanges == exchanges * layers for sent in found)
            assert all(sent.counts == [4 * experts * times // mp_size] * layers for sent in found)
            if mp_size > 1:  # and one behind the head, for the gradient of what all ranks have
                assert {sent.sums for sent in found} == {SUMS[policy] * layers + 1}, (policy, row)
            tokens = sum(sent.tokens for sent in found) // mp_size
            pairs_elsewhere = sum(sent.pairs_elsewhere for sent in found) // mp_size
            per_pair = exchanges * width * dtype.itemsize * times
            assert sum(sent.bytes for sent in found) == layers * tokens * top_k * per_pair
            # The way back and both gradients are of the same rows, each from where it was sent.
            assert sum(sent.elsewhere for sent in found) == pairs_elsewhere * per_pair
