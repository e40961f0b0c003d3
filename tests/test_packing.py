"""Examples that share rows: which do, what they see of one another, and that a step is that of rows of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from adapters import random_adapter, write_adapter
from checkpoints import accessory_config, random_mixtral, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import RankPool
from torch import Tensor

from accessory.config import QuantArgs
from accessory.data.collate import Batch, Example, collate
from accessory.data.packing import PackedSampler, pack
from accessory.data.sampler import StepSampler
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.parallel.state import ParallelState
from accessory.train.build import build_for_training
from accessory.train.optim import adamw
from accessory.train.recompute import recompute_activations
from accessory.train.sharding import device_mesh
from accessory.train.trainer import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=300), room=st.integers(40, 120), seed=st.integers(0, 9)
)
def test_every_example_lies_whole_in_one_row(lengths: list[int], room: int, seed: int) -> None:
    tokens = np.array(lengths)
    rows = pack(tokens, room, seed=seed)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    sums = [int(tokens[row].sum()) for row in rows]
    assert max(sums) <= room
    # Best fit opens a row only where no other has room: two of them could never be one.
    assert sorted(sums)[0] + sorted(sums)[1] > room if len(sums) > 1 else True
    assert [row.tolist() for row in pack(tokens, room, seed=seed)] == [row.tolist() for row in rows]


def test_rows_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(900), 0.7, 5000).astype(int), 3, 4096)
    sampler = PackedSampler(lengths, 16, room=4096)
    assert sampler.filled > 0.99
    # Not by length: a step's examples are as mixed as all of them.
    steps = [[int(lengths[own]) for row in step for own in sampler.row(row)] for step in sampler.steps(0)]
    assert np.median([np.std(step) for step in steps]) > 0.8 * np.std(lengths)


def test_a_longer_example_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit into a row of 8"):
        pack(np.array([3, 9]), 8)


@pytest.mark.parametrize(("dp", "accum"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_a_step_holds_the_same_examples_whatever_the_split(dp: int, accum: int) -> None:
    lengths = np.random.default_rng(1).integers(2, 60, 200)
    sampler = PackedSampler(lengths, 4, room=64, seed=3)
    for epoch in (0, 1):
        seen = []
        for step in sampler.steps(epoch):
            dealt = [sampler.micro_batches(step, dp_rank=rank, dp_size=dp, accum=accum) for rank in range(dp)]
            rows = [row for rank in dealt for micro in rank for row in micro]
            assert sorted(rows) == sorted(step.tolist())
            seen += [example for row in rows for example in sampler.row(row)]
        assert sorted(seen) == list(range(200))
    assert [step.tolist() for step in sampler.steps(0)] != [step.tolist() for step in sampler.steps(1)]


def test_a_run_goes_on_with_the_same_rows_alone() -> None:
    lengths = np.random.default_rng(1).integers(2, 60, 200)
    sampler = PackedSampler(lengths, 4, room=64)
    state = sampler.state(1, 5)
    assert PackedSampler(lengths, 4, room=64).resume(state) == (1, 5)
    with pytest.raises(ValueError, match=r"packed into rows of 64 tokens, and now .* packed into rows of 80 tokens"):
        PackedSampler(lengths, 4, room=80).resume(state)
    with pytest.raises(ValueError, match="packed into rows of 64 tokens, and now it is each example in a row of its"):
        StepSampler(lengths, 4).resume(state)
    other = PackedSampler(lengths[::-1], 4, room=64)
    with pytest.raises(ValueError, match="other lengths or in another order"):
        other.resume({**state, "examples": len(other.lengths)})


def test_collate_puts_examples_one_behind_the_other() -> None:
    a, b, c = ((np.array(tokens), np.array(tokens)) for tokens in ([5, 6, 7], [8, 9], [3, 4]))
    batch = collate([[a, b], [c]])
    assert batch.examples.tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    # Nothing is learned of an example's first token: what stands before it is another example.
    assert batch.labels.tolist() == [[0, 6, 7, 0, 9], [0, 4, 0, 0, 0]]
    assert batch.lengths == (3, 2, 2, 3)
    assert collate([[a], [c]]).lengths is None


# --- the same step as unpacked

LENGTHS = (5, 9, 3, 12, 2, 7, 16, 4, 11, 6)
# Two micro-batches of the same examples: in rows of their own, and sharing some.
ALONE = [[[0], [1], [2], [3], [4]], [[5], [6], [7], [8], [9]]]
SHARED = [[[3, 4], [0, 1, 2]], [[6], [5, 8], [9, 7]]]


class Step(NamedTuple):
    loss: float
    balance: float
    tokens: int
    pairs_LE: Tensor
    gradients: dict[str, Tensor]


def examples() -> list[Example]:
    rng = np.random.default_rng(7)
    found = []
    for length in LENGTHS:
        tokens = rng.integers(3, 384, length)
        found.append((tokens, np.where(rng.random(length) < 0.7, tokens, 0)))
    return found


def steps_on_rank(paths: list[Path], mp_size: int, policy: Any, quant: QuantArgs | None) -> tuple[Step, Step]:
    """One step of the examples alone in their rows and one of shared rows, from the same weights."""
    state = ParallelState.init(mp_size, "cpu")
    pretrained = Pretrained.resolve(paths, max_seq_len=64, quant=quant)
    found = []
    for dealt in (ALONE, SHARED):
        llma = build_for_training(
            pretrained,
            state,
            device_mesh(state),
            data_parallel="fsdp",
            compute_dtype=torch.float32,
            before_sharding=lambda llma: recompute_activations(llma, policy),
        )
        model = MetaModel(llma, pretrained.tokenizer, pretrained.llama_type).train()
        optimizer = adamw(model.named_parameters(), lr=0.0, weight_decay=0.0)
        gradients: dict[str, Tensor] = {}

        def keep(*_: Any, model: MetaModel = model, kept: dict[str, Tensor] = gradients) -> None:
            for name, parameter in model.llma.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    kept[name] = parameter.grad.full_tensor()  # type: ignore[operator]

        optimizer.register_step_pre_hook(keep)
        own: list[Batch] = []
        for micro in dealt:
            rows = micro[state.dp_rank :: state.dp_size]
            own.append(collate([[examples()[index] for index in row] for row in rows]))
        result = train_step(model, optimizer, own, lr=0.0, clip_grad=0)
        found.append(Step(result.loss, result.balance_loss, result.tokens, result.pairs_LE, gradients))
    return found[0], found[1]


@pytest.fixture(scope="module")
def folders(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, and an adapter above it."""
    folder = tmp_path_factory.mktemp("packing")
    hf = random_mixtral(5)
    config = accessory_config(hf.config)
    base = write_checkpoint(folder / "base", hf, small_tokenizer, files=2)
    adapter = random_adapter(config, 8)
    return [base, write_adapter(folder / "adapter", adapter, config, files=2, tokenizer=small_tokenizer)]


@pytest.mark.parametrize("kind", ["full", "adapters", "quantized"])
@pytest.mark.parametrize(
    ("dp_size", "mp_size", "policy"), [(1, 1, "full"), (2, 1, "none"), (1, 2, "moe"), (2, 2, "full")]
)
def test_a_packed_step_is_that_of_rows_of_their_own(
    kind: str, dp_size: int, mp_size: int, policy: str, folders: list[Path], ranks: Callable[[int], RankPool]
) -> None:
    quant = QuantArgs(type="int8") if kind == "quantized" else None
    paths = folders[:1] if kind == "full" else folders
    for alone, shared in ranks(dp_size * mp_size).run(steps_on_rank, paths, mp_size, policy, quant):
        assert shared.loss == pytest.approx(alone.loss, rel=1e-6)
        assert shared.balance == pytest.approx(alone.balance, rel=1e-6)
        assert shared.tokens == alone.tokens == sum(LENGTHS)
        assert torch.equal(shared.pairs_LE, alone.pairs_LE)
        assert alone.gradients.keys() == shared.gradients.keys() != set()
        largest = max(float(own.abs().max()) for own in alone.gradients.values())
        for name, expected in alone.gradients.items():
            off = float((shared.gradients[name] - expected).abs().max())
            assert off <= 1e-4 * max(float(expected.abs().max()), 1e-2 * largest), f"{name}: {off}"
