"""The native attention of decoding against its PyTorch twin in float64, and itself beside other slots."""

import random
from itertools import product

import pytest
import torch
from torch import Tensor

from accessory.kernels import SlotAttention, SlotAttentionReference
from accessory.kernels.cpu import library

DTYPES = (torch.bfloat16, torch.float32)
variants = pytest.mark.parametrize(
    ("variant", "dtype"), list(product(library.runnable_variants(), DTYPES)), ids=lambda value: str(value)
)
Cache = tuple[Tensor, Tensor]
New = tuple[Tensor, Tensor, Tensor]


def draw_cache(*shape: int, dtype: torch.dtype, seed: int = 0) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def draw_new(rows: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> New:
    """A token's queries, keys and values for each row; the first two split off one tensor, as in the model."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(rows, heads + kv_heads, width, generator=generator).to(dtype).split((heads, kv_heads), dim=1)
    return q, k, torch.randn(rows, kv_heads, width, generator=generator).to(dtype)


def attend(cache: Cache, layer: int, new: New, positions: list[int], slots: list[int] | None, variant: str) -> Tensor:
    """The native result; the bound is none of its business."""
    step = SlotAttention(*cache, torch.tensor(positions), slots, bound=0)
    with torch.inference_mode():
        return step(layer, *new, variant=variant)


def attend_exactly(cache: Cache, layer: int, new: New, positions: list[int], slots: list[int] | None) -> Tensor:
    """The twin's result in float64; the cache is left alone."""
    slots_R = None if slots is None else torch.tensor(slots)
    count = len(positions) if slots is None else max(slots) + 1
    twin = SlotAttentionReference(torch.tensor(positions), slots_R, count=count, bound=max(positions) + 1)
    keys, values = (part[layer].double() for part in cache)
    return twin(keys, values, *(x.double() for x in new))


def assert_true(out: Tensor, truth: Tensor, new: New) -> None:
    """To within the rounding to out's dtype and float32 sums."""
    assert (out.shape, out.dtype) == (new[0].shape, new[0].dtype)
    rounding = 2**-8 if out.dtype == torch.bfloat16 else 2**-20
    torch.testing.assert_close(out.double(), truth, rtol=rounding, atol=1e-5)


def assert_written(cache: Cache, before: Cache, layer: int, new: New, positions: list[int], slots: list[int]) -> None:
    """The new keys and values stand in their places, and nothing else has changed."""
    for part, untouched, rows in zip(cache, before, new[1:], strict=True):
        expected = untouched.clone()
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            expected[layer, slot, position] = rows[row]
        assert torch.equal(part, expected)


@variants
@pytest.mark.parametrize("seed", range(25))
def test_result_is_the_twins(variant: str, dtype: torch.dtype, seed: int) -> None:
    chance = random.Random(seed)
    count, length = chance.randint(1, 20), chance.randint(1, 500)
    kv_heads, groups = chance.randint(1, 8), chance.randint(1, 8)
    width = chance.choice([1, 2, 5, 8, 16, 31, 32, 33, 48, 64, 80, 96, 128])
    cache = draw_cache(2, count, length, kv_heads, width, dtype=dtype, seed=seed)
    slots = chance.choice([None, chance.sample(range(count), chance.randint(1, count))])
    rows = count if slots is None else len(slots)
    positions = [chance.randrange(length) for _ in range(rows)]
    new = draw_new(rows, kv_heads * groups, kv_heads, width, dtype, seed)
    before = (cache[0].clone(), cache[1].clone())
    out = attend(cache, 1, new, positions, slots, variant)
    assert_true(out, attend_exactly(before, 1, new, positions, slots), new)
    assert_written(cache, before, 1, new, positions, list(range(rows)) if slots is None else slots)


@variants
def test_cache_and_tokens_may_be_views(variant: str, dtype: torch.dtype) -> None:
    keys, values = draw_cache(2, 6, 60, 8, 80, dtype=dtype)
    q, k, v = draw_new(6, 8, 4, 40, dtype)
    across = (q.transpose(0, 1).contiguous().transpose(0, 1), k.flip(2).flip(2)[::2], v.expand(6, 4, 40)[::2])
    for part, new in (
        ((keys[:, :3, :, :4, :40], values[:, 1:4, :, 4:, 40:]), (q[:3], k[:3], v[:3])),
        ((keys[:, ::2, 7::3, ::2, 1:41], values[:, :3, :18, 1::2, :40]), (across[0][::2], *across[1:])),
    ):
        before = (part[0].clone(), part[1].clone())
        out = attend(part, 1, new, [0, 17, 9], None, variant)
        assert_true(out, attend_exactly(before, 1, new, [0, 17, 9], None), new)
        assert_written(part, before, 1, new, [0, 17, 9], [0, 1, 2])


@variants
def test_a_slot_depends_on_nothing_else(variant: str, dtype: torch.dtype) -> None:
    """Neither on other rows and threads, nor on what stands behind its position, nor on its place."""
    keys, values = draw_cache(1, 5, 400, 2, 40, dtype=dtype)
    positions, slots = [131, 0, 128, 399], [3, 0, 4, 1]
    new = draw_new(4, 6, 2, 40, dtype)
    together = attend((keys.clone(), values.clone()), 0, new, positions, slots, variant)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        alone = tuple(torch.full_like(part, float("nan")) for part in (keys, values))
        for part, whole in zip(alone, (keys, values), strict=True):
            part[:, 2, :position] = whole[:, slot, :position]
        one = tuple(x[row : row + 1] for x in new)
        assert torch.equal(attend(alone, 0, one, [position], [2], variant)[0], together[row])
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            again = attend((keys.clone(), values.clone()), 0, new, positions, slots, variant)
            assert torch.equal(again, together)
    finally:
        torch.set_num_threads(before)


@variants
def test_large_scores_and_what_is_not_finite(variant: str, dtype: torch.dtype) -> None:
    cache = draw_cache(1, 3, 300, 1, 16, dtype=dtype)
    cache[0].mul_(300)  # all the weight lies on one position, and what comes before it vanishes
    cache[0][0, 1, 150] = float("nan")
    cache[1][0, 2, 20, 0, 3] = float("inf")
    new = draw_new(3, 2, 1, 16, dtype)
    before = (cache[0].clone(), cache[1].clone())
    out = attend(cache, 0, new, [299, 299, 299], None, variant)
    assert bool(out[1].isnan().all())
    assert not bool(out[2, :, 3].isfinite().any())
    truth = attend_exactly(before, 0, new, [299, 299, 299], None)
    # The products of scores of thousands are rounded to float32, which moves a weight that is near another.
    torch.testing.assert_close(out[0].double(), truth[0], rtol=2**-7, atol=2e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_with_gradients_and_in_other_dtypes_the_twin_serves(dtype: torch.dtype) -> None:
    cache, new = draw_cache(2, 3, 20, 2, 8, dtype=dtype), draw_new(3, 4, 2, 8, dtype)
    before = (cache[0].clone(), cache[1].clone())
    out = SlotAttention(*cache, torch.tensor([4, 19, 0]), bound=20)(0, *new)
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5  # in bfloat16 PyTorch rounds on the way
    truth = attend_exactly(before, 0, new, [4, 19, 0], None)
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    assert_written(cache, before, 0, new, [4, 19, 0], [0, 1, 2])


@variants
def test_a_place_that_does_not_exist_is_refused(variant: str, dtype: torch.dtype) -> None:
    for positions, slots in (
        ([5, 6], None),
        ([-1, 0], None),
        ([0, 0], [0, 2]),
        ([0, 0], [-1, 0]),
        ([0, 0, 0], None),
    ):
        new = draw_new(len(positions), 2, 1, 8, dtype)
        cache = draw_cache(1, 2, 6, 1, 8, dtype=dtype)
        before = (cache[0].clone(), cache[1].clone())
        with pytest.raises(IndexError, match="has no position"):
            attend(cache, 0, new, positions, slots, variant)
        assert torch.equal(cache[0], before[0])
        assert torch.equal(cache[1], before[1])


def test_tensors_that_do_not_fit_are_refused() -> None:
    keys, values = draw_cache(1, 3, 6, 2, 8, dtype=torch.float32)
    positions = torch.tensor([1, 2, 3])
    for wrong in ((keys[0], values[0]), (keys, values[:, :2]), (keys, values.bfloat16())):
        with pytest.raises(ValueError, match="not those of a cache"):
            SlotAttention(*wrong, positions, bound=4)
    for wrong_positions, slots in ((positions.int(), None), (positions[None], None), (positions, [0, 1])):
        with pytest.raises(ValueError, match="must hold one int64"):
            SlotAttention(keys, values, wrong_positions, slots, bound=4)
    step = SlotAttention(keys, values, positions, bound=4)
    q, k, v = draw_new(3, 4, 2, 8, torch.float32)
    for wrong_q in (q[:2], q[:, :3], q[..., :4], q.bfloat16(), q[0]):
        with pytest.raises(ValueError, match=r"q_RHh .* does not fit"):
            step(0, wrong_q, k, v)
    for wrong_k in (k[:2], k[:, :1], k.bfloat16()):
        with pytest.raises(ValueError, match=r"keys or values .* do not fit"):
            step(0, q, wrong_k, v)
        with pytest.raises(ValueError, match=r"keys or values .* do not fit"):
            step(0, q, k, wrong_k)
    with pytest.raises(IndexError), torch.inference_mode():
        step(1, q, k, v)
