"""The sampler: which examples a step holds, and how they are dealt to the ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.sampler import StepSampler

lengths_of = st.lists(st.integers(2, 5000), min_size=1, max_size=80)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # batch, dp, accumulation
few = settings(max_examples=150, deadline=None)


@few
@given(lengths=lengths_of, size=sizes, seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_an_epoch_is_each_example_once(lengths: list[int], size: tuple[int, int, int], seed: int, epoch: int) -> None:
    batch, dp, accum = size
    sampler = StepSampler(lengths, batch * dp * accum, seed=seed)
    steps = sampler.steps(epoch)
    assert len(steps) == sampler.steps_per_epoch == -(-len(lengths) // sampler.global_batch)
    assert sum(len(step) < sampler.global_batch for step in steps) <= 1
    seen = []
    for step in steps:
        ranks = [sampler.micro_batches(step, dp_rank=rank, dp_size=dp, accum=accum) for rank in range(dp)]
        assert len({len(micros) for micros in ranks}) == 1
        assert 1 <= len(ranks[0]) <= accum
        rows = [row for micros in ranks for micro in micros for row in micro]
        assert sorted(rows) == sorted(step.tolist())
        seen += rows
        for micros in zip(*ranks, strict=True):
            counts = [len(micro) for micro in micros]
            assert max(counts) <= batch
            assert max(counts) - min(counts) <= 1
            assert max(counts) > 0  # some rank has an example
    assert sorted(seen) == list(range(len(lengths)))


@few
@given(lengths=lengths_of, product=st.sampled_from([1, 2, 6, 12, 24]), seed=st.integers(0, 5), data=st.data())
def test_a_step_depends_on_the_product_alone(lengths: list[int], product: int, seed: int, data: st.DataObject) -> None:
    """And the micro-batches that all ranks run together depend on the accumulation, not on the ranks."""
    steps = StepSampler(lengths, product, seed=seed).steps(3)
    again = StepSampler(np.array(lengths, dtype=np.uint16), product, seed=seed).steps(3)
    assert [step.tolist() for step in steps] == [step.tolist() for step in again]
    accum = data.draw(st.sampled_from([n for n in (1, 2, 3, 6) if product % n == 0]))
    sampler = StepSampler(lengths, product, seed=seed)

    def together(dp: int) -> list[list[set[int]]]:
        return [
            [
                set().union(*micros)
                for micros in zip(
                    *(sampler.micro_batches(step, dp_rank=r, dp_size=dp, accum=accum) for r in range(dp)), strict=True
                )
            ]
            for step in steps
        ]

    for dp in (n for n in (2, 3, 4) if product % (accum * n) == 0):
        assert together(dp) == together(1)


@few
@given(lengths=st.lists(st.integers(2, 5000), min_size=40, max_size=200), product=st.integers(2, 8))
def test_a_step_holds_neighbours_in_length(lengths: list[int], product: int) -> None:
    """Of any two steps, one's longest example is no longer than the other's shortest, but for the jitter of 5 %."""
    steps = StepSampler(lengths, product).steps(0)
    spans = [(min(lengths[i] for i in step), max(lengths[i] for i in step)) for step in steps]
    for one, other in itertools.combinations(spans, 2):
        assert one[1] <= other[0] * 1.05 + 1e-9 or other[1] <= one[0] * 1.05 + 1e-9


def test_steps_come_in_random_order_and_change_with_epoch_and_seed() -> None:
    lengths = np.random.default_rng(0).integers(10, 4000, 512)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [step.tolist() for step in StepSampler(lengths, 8, seed=seed).steps(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert {tuple(sorted(step)) for step in order(0, 0)} != {tuple(sorted(step)) for step in order(0, 1)}
    means = [lengths[step].mean() for step in order(0, 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_little_padding_and_even_ranks() -> None:
    """4096 examples of lengths as a chat corpus has them: 2 % padding in the steps, ranks within 1 %."""
    lengths = np.random.default_rng(0).lognormal(6.5, 0.7, 4096).astype(int).clip(20, 4096)
    sampler = StepSampler(lengths, 64)
    padded, real, work = 0, 0, np.zeros(4)
    for step in sampler.steps(0):
        for rank in range(4):
            for micro in sampler.micro_batches(step, dp_rank=rank, dp_size=4, accum=4):
                padded += len(micro) * max(lengths[micro])
                real += sum(lengths[micro])
                work[rank] += sum(lengths[micro])
    assert padded / real < 1.02
    assert work.max() / work.min() < 1.01


def test_dealt_by_hand() -> None:
    sampler = StepSampler([10, 20, 30, 40, 50, 60, 70, 80], 8)
    step = np.arange(8)
    deal = [sampler.micro_batches(step, dp_rank=rank, dp_size=2, accum=2) for rank in (0, 1)]
    # Longest first: 7 6 5 4 run together, then 3 2 1 0; within each, forth and back.
    assert deal == [[[7, 4], [3, 0]], [[6, 5], [2, 1]]]
    # Three examples on 4 ranks: one is without, with a micro-batch all the same; the second one falls away.
    deal = [sampler.micro_batches(np.array([1, 2, 3]), dp_rank=rank, dp_size=4, accum=2) for rank in range(4)]
    assert deal == [[[3]], [[2]], [[1]], [[]]]


def test_resume() -> None:
    sampler = StepSampler(range(2, 102), 8, seed=3)  # 100 examples, 13 steps
    assert sampler.steps_per_epoch == 13
    state = sampler.state(2, 7)
    assert StepSampler(range(2, 102), 8, seed=3).resume(state) == (2, 7)
    assert sampler.resume(sampler.state(2, 13)) == (3, 0)
    with pytest.raises(ValueError, match=r"steps of 8 examples.* is 16 now.*product is 8"):
        StepSampler(range(2, 102), 16, seed=3).resume(state)
    with pytest.raises(ValueError, match="--seed"):
        StepSampler(range(2, 102), 8, seed=4).resume(state)
    with pytest.raises(ValueError, match="100 examples, and the data hold 99"):
        StepSampler(range(2, 101), 8, seed=3).resume(state)
    with pytest.raises(ValueError, match="of other lengths or in another order"):
        StepSampler(range(101, 1, -1), 8, seed=3).resume(state)
    older = {name: value for name, value in state.items() if name != "lengths"}
    assert StepSampler(range(101, 1, -1), 8, seed=3).resume(older) == (2, 7)


@few
@given(lengths=lengths_of, size=sizes, other=sizes, stop=st.integers(0, 80))
def test_going_on_with_other_ranks_repeats_and_drops_nothing(
    lengths: list[int], size: tuple[int, int, int], other: tuple[int, int, int], stop: int
) -> None:
    product = int(np.prod(size))
    first = StepSampler(lengths, product)
    stop = min(stop, first.steps_per_epoch - 1)
    state: dict[str, Any] = first.state(0, stop)
    second = StepSampler(lengths, int(np.prod(other)))
    if second.global_batch != product:
        with pytest.raises(ValueError, match=f"product is {product}"):
            second.resume(state)
        return
    epoch, step = second.resume(state)
    rest = second.steps(epoch)[step:]
    assert sorted(np.concatenate([*first.steps(0)[:stop], *rest])) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("dp_rank", "dp_size", "accum", "message"),
    [
        (0, 3, 1, "does not divide by 3 data-parallel ranks x accumulation 1"),
        (0, 2, 8, "does not divide"),
        (0, 0, 1, "does not divide"),
        (2, 2, 1, "rank 2 is not one of 0 to 1"),
        (-1, 2, 1, "rank -1"),
    ],
)
def test_sizes_that_do_not_fit(dp_rank: int, dp_size: int, accum: int, message: str) -> None:
    sampler = StepSampler([3] * 20, 8)
    with pytest.raises(ValueError, match=message):
        sampler.micro_batches(sampler.steps(0)[0], dp_rank=dp_rank, dp_size=dp_size, accum=accum)


def test_nothing_to_sample() -> None:
    with pytest.raises(ValueError, match="no example"):
        StepSampler([], 4)
    with pytest.raises(ValueError, match="make it positive"):
        StepSampler([3], 0)
