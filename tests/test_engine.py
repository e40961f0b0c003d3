"""Sampling, and the loop that turns prompts into completions."""

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import random_mixtral, random_prompts, write_checkpoint
from models import FIRST_LETTER, Letters, completions, load
from torch import Tensor
from walks import write_walk

import accessory.generation.engine as engine
from accessory.config import ModelArgs
from accessory.generation.sampling import Sampling, sample, sample_each
from accessory.model.cache import KVCache
from accessory.model.meta import MetaModel
from accessory.parallel.state import ParallelState

pytestmark = pytest.mark.usefixtures("one_thread")

# --- sampling

DRAWS = 20_000


def frequencies(probs: Sequence[float], temperature: float, top_p: float) -> list[float]:
    """How often each token is drawn, from a fixed seed."""
    torch.manual_seed(0)
    drawn = sample(torch.tensor([probs]).log().repeat(DRAWS, 1), temperature, top_p)
    counts = Counter(drawn.tolist())
    return [counts[token] / DRAWS for token in range(len(probs))]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        # 0.5 + 0.3 reach 0.7; the other two tokens never come.
        (1.0, 0.7, [0.0, 0.625, 0.375, 0.0]),
        (1.0, 0.45, [0.0, 1.0, 0.0, 0.0]),
        (1.0, 0.9, [0.0, 0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        (1.0, 1.0, [0.05, 0.5, 0.3, 0.15]),
        # Temperature 1/2 squares the probabilities: 0.0025 + 0.25 + 0.09 + 0.0225 = 0.365.
        (0.5, 1.0, [0.0025 / 0.365, 0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365]),
        # The temperature comes first: 0.25 / 0.365 = 0.68 alone does not reach 0.7, with 0.09 it does.
        (0.5, 0.7, [0.0, 0.25 / 0.34, 0.09 / 0.34, 0.0]),
    ],
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_p: float, expected: list[float]) -> None:
    found = frequencies([0.05, 0.5, 0.3, 0.15], temperature, top_p)
    assert found == pytest.approx(expected, abs=0.015)
    assert [share == 0 for share in found] == [share == 0 for share in expected]


def test_top_p_0_and_temperature_0_take_the_best() -> None:
    logits = torch.randn(50, 384, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1)
    for temperature, top_p in ((0.0, 0.95), (0.0, 1.0), (0.0, 0.0), (0.8, 0.0), (5.0, 0.0), (1e-3, 0.5)):
        assert torch.equal(sample(logits, temperature, top_p), best)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45, 1e-320])
def test_a_temperature_next_to_0_takes_the_best(temperature: float) -> None:
    logits = torch.tensor([[1.0, 30.0, -5.0], [7.0, 0.0, 6.5]])
    assert sample(logits, temperature, 1.0).tolist() == [1, 0]
    assert sample(logits, temperature, 0.9).tolist() == [1, 0]


def test_top_p_1_keeps_even_the_improbable() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, -6.0]]).repeat(DRAWS, 1)  # e**-6 = 0.0025
    assert 20 <= int(sample(logits, 1.0, 1.0).sum()) <= 80


def test_rows_are_sampled_apart_and_in_bfloat16_too() -> None:
    torch.manual_seed(0)
    logits = torch.full((3, 5), -30.0, dtype=torch.bfloat16)
    for row, token in enumerate((4, 0, 2)):
        logits[row, token] = 30
    for top_p in (0.0, 0.5, 1.0):
        drawn = sample(logits, 1.0, top_p)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == [4, 0, 2]


# --- the loop, over a model of arithmetic


@dataclass
class ListCache:
    """Sequences as Python lists; what was written counts only once `extend` says so."""

    slots: int
    max_seq_len: int
    sequences: list[list[int]] = field(default_factory=list)
    written: dict[int, list[int]] = field(default_factory=dict)
    freed: int = 0

    def __post_init__(self) -> None:
        self.sequences = [[] for _ in range(self.slots)]

    def extend(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        assert sorted(slots) == sorted(self.written)
        for slot, count in zip(slots, counts, strict=True):
            assert len(self.written[slot]) == count
            self.sequences[slot] += self.written.pop(slot)
            assert len(self.sequences[slot]) <= self.max_seq_len

    def free(self, slot: int) -> None:
        self.sequences[slot] = []
        self.freed += 1


VOCABULARY = 97


def next_token(sequence: Sequence[int]) -> int:
    """Depends on every token and its place."""
    return sum((place + 1) * token for place, token in enumerate(sequence)) % VOCABULARY


class Arithmetic:
    """What the engine asks of a Transformer; its next token is `next_token` of all before it."""

    def __init__(self, max_batch_size: int, max_seq_len: int = 64) -> None:
        self.args = ModelArgs(
            dim=2, n_layers=1, n_heads=1, hidden_dim=1, max_batch_size=max_batch_size, max_seq_len=max_seq_len
        )
        self.state = ParallelState.single("cpu")
        self.caches: list[ListCache] = []
        self.prefills: list[int] = []
        self.decodes: list[list[bool]] = []

    def new_cache(self, slots: int, max_seq_len: int) -> ListCache:
        self.caches.append(ListCache(slots, max_seq_len))
        return self.caches[-1]

    def prefill(self, tokens_T: Tensor, lengths: Sequence[int], slots: Sequence[int], cache: ListCache) -> Tensor:
        assert len(set(slots)) == len(slots)
        assert all(length > 0 for length in lengths)
        self.prefills.append(len(tokens_T))
        for slot, tokens in zip(slots, tokens_T.split(list(lengths)), strict=True):
            cache.written[slot] = tokens.tolist()
        cache.extend(slots, lengths)
        return self._logits([cache.sequences[slot] for slot in slots])

    def decode(self, tokens_S: Tensor, cache: ListCache, active_S: Tensor) -> Tensor:
        assert tokens_S.shape == active_S.shape == (cache.slots,)
        self.decodes.append(active_S.tolist())
        for slot in active_S.nonzero().flatten().tolist():
            cache.written[slot] = [int(tokens_S[slot])]
        logits = self._logits([row + cache.written.get(slot, []) for slot, row in enumerate(cache.sequences)])
        logits[~active_S] = float("nan")
        return logits

    @staticmethod
    def _logits(sequences: Sequence[Sequence[int]]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next_token(s) for s in sequences]), VOCABULARY).float()


def expected_completion(prompt: Sequence[int], count: int, eos_id: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        token = next_token(sequence)
        if token == eos_id:
            break
        sequence.append(token)
    return sequence[len(prompt) :]


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_complete_as_each_prompt_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    count, slots, piece = rng.randint(1, 12), rng.randint(1, 5), rng.choice([1, 2, 5, 9, 2048])
    # Token 3 comes every 97 tokens or so: some end by it, most by their length.
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 14))] for _ in range(rng.randint(1, 17))]
    eos_ids = [next_token(prompts[0]), 3]
    monkeypatch.setattr(engine, "PREFILL_TOKENS", piece)
    for eos_id in eos_ids:
        model = Arithmetic(slots)
        found = completions(model, prompts, max_gen_len=count, eos_id=eos_id)  # type: ignore[arg-type]
        assert found == [expected_completion(prompt, count, eos_id) for prompt in prompts]
        (cache,) = model.caches
        assert cache.slots == min(slots, len(prompts))
        assert cache.max_seq_len == max(map(len, prompts)) + count
        assert cache.freed == len(prompts)
        assert all(sequence == [] for sequence in cache.sequences)
        assert max(model.prefills) <= piece
        assert all(any(active) for active in model.decodes)


@pytest.mark.parametrize(("longest", "slots"), [(10, 4), (11, 3), (20, 2), (41, 1)])
def test_where_one_prompt_is_long_fewer_run_at_once(longest: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "TOKENS_FOR_A_SLOT", 10)
    model, prompts = Arithmetic(max_batch_size=4), [[5], [7, 1], [2, 2], [3] * (longest - 4), [6]]
    found = completions(model, prompts, max_gen_len=4)  # type: ignore[arg-type]
    assert found == [expected_completion(prompt, 4, eos_id=-1) for prompt in prompts]
    (cache,) = model.caches
    assert (cache.slots, cache.max_seq_len) == (slots, longest)


def test_a_free_slot_is_taken_at_once() -> None:
    # Two slots, three prompts of 5 tokens more each, and the first ends after one: the third must not wait.
    model = Arithmetic(max_batch_size=2)
    prompts = [[5], [7, 1], [2, 2]]
    steps = list(
        engine.complete(model, Letters(eos_id=next_token([5])), prompts, Sampling(max_gen_len=5))  # type: ignore[arg-type]
    )
    moved = [[progress.index for progress in step] for step in steps]
    assert moved[:3] == [[0, 1], [2], [1, 2]]
    assert steps[0][0].finish
    assert steps[0][0].text == ""
    assert model.prefills == [3, 2]


def test_every_step_reports_the_text_so_far() -> None:
    model = Arithmetic(max_batch_size=4)
    prompts, count = [[5], [7, 1]], 6
    texts = [
        "".join(chr(FIRST_LETTER + t) for t in expected_completion(prompt, count, eos_id=-1)) for prompt in prompts
    ]
    for number, step in enumerate(engine.complete(model, Letters(), prompts, Sampling(max_gen_len=count)), 1):  # type: ignore[arg-type]
        assert [progress.text for progress in step] == [text[:number] for text in texts]
        assert [progress.finish is not None for progress in step] == [number == count] * 2


def test_a_stop_string_ends_a_sequence_and_frees_its_slot() -> None:
    model = Arithmetic(max_batch_size=1)
    tokens = expected_completion([5], 9, eos_id=-1)
    stop = "".join(chr(FIRST_LETTER + token) for token in tokens[3:5])
    sampling = Sampling(max_gen_len=9, stop=(stop,))
    last = [
        progress
        for step in engine.complete(model, Letters(), [[5], [7, 1]], sampling)  # type: ignore[arg-type]
        for progress in step
        if progress.finish
    ]
    assert [progress.index for progress in last] == [0, 1]
    assert last[0].text == "".join(chr(FIRST_LETTER + token) for token in tokens[:3])
    assert len(last[1].text) == 9


# --- the loop, over a Transformer


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "checkpoint"
    return write_checkpoint(folder, random_mixtral(6), small_tokenizer, files=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> MetaModel:
    return load(folder, max_seq_len=128)


def limited(folder: Path, max_batch_size: int) -> Any:
    llma = load(folder, max_seq_len=128).llma
    llma.args = llma.args.replace(max_batch_size=max_batch_size)
    return llma


def test_slots_are_reused_without_a_trace_of_the_earlier_sequence(folder: Path, model: MetaModel) -> None:
    prompts = random_prompts(1, (40, 3, 1, 25, 8, 2, 30))
    alone = [completions(model.llma, [prompt], max_gen_len=10)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) > 4
    for slots in (1, 2, 3, 16):
        assert completions(limited(folder, slots), prompts, max_gen_len=10) == alone
    # With an end token they leave at different times, and others join running ones.
    eos_id = alone[0][4]
    cut = [tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens for tokens in alone]
    assert completions(limited(folder, 3), prompts, max_gen_len=10, eos_id=eos_id) == cut


def test_reading_the_cache_block_by_block_changes_nothing(model: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(2, (3, 15, 16, 17, 40))
    whole = completions(model.llma, prompts, max_gen_len=40)
    for block in (1, 16):
        monkeypatch.setattr(KVCache, "BLOCK", block)
        assert completions(model.llma, prompts, max_gen_len=40) == whole


@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_gen_len_is_exact(model: MetaModel, count: int) -> None:
    prompts = random_prompts(3, (5, 1))
    longer = completions(model.llma, prompts, max_gen_len=9)
    assert completions(model.llma, prompts, max_gen_len=count) == [tokens[:count] for tokens in longer]


def test_the_context_can_be_filled_to_its_last_token(folder: Path, model: MetaModel) -> None:
    prompts = random_prompts(4, (20, 4))
    small = load(folder, max_seq_len=32)
    assert completions(small.llma, prompts, max_gen_len=12) == completions(model.llma, prompts, max_gen_len=12)


def test_interleaved_and_abandoned_streams_do_not_meet(model: MetaModel) -> None:
    first, second = "The list", "Return a new string"
    expected = model.generate([first, second], max_gen_len=8)
    next(iter(model.stream_generate(second, max_gen_len=8)))
    pairs = zip(model.stream_generate(first, max_gen_len=8), model.stream_generate(second, max_gen_len=8), strict=True)
    last = list(pairs)[-1]
    assert [step["text"] for step in last] == expected


def test_a_prompt_too_long_keeps_its_first_and_last_tokens(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder, max_seq_len=24)
    fits = "The list"
    long = "Return a new string of the given width, padded with spaces " * 3
    tokens = model.tokenizer.encode(long, bos=True, eos=False)
    kept = [tokens[0], *tokens[-13:]]
    assert len(tokens) > 14
    assert tokens[0] == model.tokenizer.bos_id
    with caplog.at_level(logging.WARNING, logger="accessory"):
        texts = model.generate([fits, long], max_gen_len=10)
    (record,) = caplog.records
    said = record.getMessage()
    assert f"prompts[1] has {len(tokens)} tokens" in said
    assert "max_seq_len - max_gen_len = 14" in said
    # The completion is that of the kept tokens.
    sampling = Sampling(max_gen_len=10)
    (last,) = list(engine.complete(model.llma, model.tokenizer, [kept], sampling))[-1]
    assert texts[1] == last.text
    assert texts[0] == model.generate([fits], max_gen_len=10)[0]


def test_a_prompt_that_just_fits_is_not_cut(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder, max_seq_len=24)
    length = len(model.tokenizer.encode("The list method", bos=True, eos=False))
    model.generate(["The list method"], max_gen_len=24 - length)
    assert not caplog.records
    model.generate(["The list method"], max_gen_len=25 - length)
    assert len(caplog.records) == 1


def test_a_stream_is_refused_before_its_first_step(model: MetaModel) -> None:
    for settings in ({"max_gen_len": 0}, {"max_gen_len": 127}, {"temperature": -1}, {"top_p": 2}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            model.stream_generate("x", **{"max_gen_len": 8, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(("prompt", "answer"), [("def add_one(x):\n", "    return"), ("Hello", " big")])
def test_a_completion_begins_with_the_space_behind_its_prompt(
    prompt: str, answer: str, small_tokenizer: Path, tmp_path: Path
) -> None:
    """Prompt and completion make up the text that was learned, whatever stands between the two."""
    model = load(write_walk(tmp_path / "walk", small_tokenizer, prompt, answer))
    whole, read = (len(model.tokenizer.encode(text, bos=False, eos=False)) for text in (prompt + answer, prompt))
    assert model.generate([prompt], max_gen_len=whole - read) == [answer]
    assert list(model.stream_generate(prompt, max_gen_len=whole - read))[-1]["text"] == answer


# --- the cache


def small_cache() -> KVCache:
    return KVCache(
        layers=2, slots=3, max_seq_len=10, kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )


def test_cache_keeps_count_and_refuses_to_overflow() -> None:
    cache = small_cache()
    cache.extend([2, 0], [10, 3])
    assert [cache.length(slot) for slot in range(3)] == cache.lengths.tolist() == [3, 0, 10]
    with pytest.raises(ValueError, match=r"slot 2 holds 10 tokens: 1 more exceed the cache's max_seq_len of 10"):
        cache.extend([2], [1])
    with pytest.raises(ValueError, match="slot 1 holds 0 tokens: 11 more"):
        cache.extend([1], [11])
    cache.free(2)
    assert cache.lengths.tolist() == [3, 0, 0]
    cache.extend([2], [10])
    assert cache.length(2) == 10


def test_a_refused_extension_leaves_the_cache_as_it_was() -> None:
    cache = small_cache()
    cache.extend([0, 1], [4, 8])
    with pytest.raises(ValueError, match="slot 1 holds 8 tokens: 3 more"):
        cache.extend([0, 1], [3, 3])
    assert [cache.length(slot) for slot in range(3)] == cache.lengths.tolist() == [4, 8, 0]


def test_prefill_refuses_what_does_not_fit_before_it_writes(model: MetaModel) -> None:
    cache = model.llma.new_cache(2, 6)
    with torch.inference_mode():
        model.llma.prefill(torch.arange(1, 8), [3, 4], [0, 1], cache)
        before = cache.k.clone()
        with pytest.raises(ValueError, match="slot 1 holds 4 tokens: 3 more exceed the cache's max_seq_len of 6"):
            model.llma.prefill(torch.arange(1, 7), [3, 3], [0, 1], cache)
    assert torch.equal(cache.k, before)
    assert cache.lengths.tolist() == [3, 4]


def test_logits_that_are_not_finite_choose_nothing():
    logits = torch.zeros(4, 5)
    logits[0, :4] = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 1.0])
    logits[1, 2] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = -torch.inf
    for temperature, top_p in ((0.0, 1.0), (1.0, 0.0), (0.7, 1.0), (0.7, 0.9)):
        how = Sampling(temperature=temperature, top_p=top_p)
        for tokens in (sample(logits, temperature, top_p), sample_each(logits, [how] * 4, [0.3] * 4)):
            assert tokens[0] in (3, 4)
            assert tokens[1:].tolist() == [-1, -1, -1]


def test_any_kind_of_number_is_a_temperature(model: MetaModel) -> None:
    texts = []
    for temperature, top_p in ((0.5, 0.75), (Fraction(1, 2), Fraction(3, 4)), (np.float32(0.5), np.float64(0.75))):
        torch.manual_seed(0)
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
        texts.append(model.generate(["The list", "a"], max_gen_len=8, **settings))
    assert texts[0] == texts[1] == texts[2]
