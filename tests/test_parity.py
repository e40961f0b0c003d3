"""The model against transformers' Mixtral: logits and greedy tokens, at many rank counts, placements and files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import hf_greedy, hf_logits, random_mixtral, random_prompts, write_checkpoint
from models import completions, load
from ranks import RankPool, alike, assert_same, on_ranks
from torch import Tensor

import accessory.generation.engine as engine

Pools = Callable[[int], RankPool]

NEW_TOKENS = 64
pytestmark = pytest.mark.usefixtures("one_thread")

LOGITS = {"atol": 1e-4, "rtol": 0.0}


@dataclass(frozen=True)
class Case:
    """A small model, how it lies on disk, and the rank counts that share it.

    Attributes:
        sizes: what differs from `random_mixtral`'s defaults (8 heads of 8, 4 key/value heads, dim 32, 8 experts).
    """

    name: str
    ranks: tuple[int, ...]
    files: int = 1
    form: str = "base"
    sizes: dict[str, Any] = field(default_factory=dict)

    def placements(self, size: int) -> dict[str, str]:
        """Placements to ask for over ``size`` ranks, and what each becomes: "auto", then the other if it exists."""
        experts, hidden = self.sizes.get("num_local_experts", 8), self.sizes.get("intermediate_size", 48)
        chosen = "expert" if experts % size == 0 else "tensor"
        return {"auto": chosen} | ({"tensor": "tensor"} if chosen == "expert" and hidden % size == 0 else {})


def sizes(
    dim: int, heads: int, kv_heads: int, head_dim: int, hidden: int, experts: int, top_k: int, **more: Any
) -> Any:
    return {
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": hidden,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        **more,
    }


# Odd sizes on purpose: slices of 11, 6, 5 and 7 hidden units are no multiples of 16 bytes, nor are rows of 22 and 33.
STRETCHED = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, "rope_theta": None}
CASES = [
    Case("mixtral", (1, 2, 4, 8), files=4),
    Case("top-1, own kv heads", (1, 2, 4), files=2, sizes=sizes(32, 4, 4, 8, 44, 4, 1, rope_theta=1e6)),
    Case("top-3 of 16, 2 kv heads", (1, 2, 4, 8), files=2, form="sparse", sizes=sizes(24, 8, 2, 10, 48, 16, 3)),
    Case("6 experts, 2 files", (1, 2, 3, 4), files=2, sizes=sizes(36, 12, 12, 4, 36, 6, 2)),
    Case("1 kv head, stretched", (1, 2, 4), form="released", sizes=sizes(44, 4, 1, 6, 20, 4, 2, **STRETCHED)),
    Case("33 wide", (1, 3), files=3, form="sparse", sizes=sizes(33, 3, 3, 6, 15, 3, 2)),
    Case("22 wide", (1, 2), files=2, sizes=sizes(22, 2, 2, 6, 14, 4, 2)),
]
CASES_AND_SIZES = [pytest.param(case, size, id=f"{case.name} on {size}") for case in CASES for size in case.ranks]


@dataclass(frozen=True)
class Truth:
    """What transformers makes of a case.

    Attributes:
        prompts: three of unequal length, the first a single token.
        greedy: the tokens that follow each.
        logits: for each prompt and its completion together, at every token.
    """

    folder: Path
    prompts: list[list[int]]
    greedy: list[list[int]]
    logits: list[Tensor]

    @property
    def examples(self) -> list[list[int]]:
        return [prompt + tokens for prompt, tokens in zip(self.prompts, self.greedy, strict=True)]


@pytest.fixture(scope="module")
def truth(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    """``truth(name)`` writes the case's checkpoint and runs transformers on it, once."""

    @cache
    def of(name: str) -> Truth:
        case = next(case for case in CASES if case.name == name)
        hf = random_mixtral(1, **case.sizes)
        folder = tmp_path_factory.mktemp("parity") / "checkpoint"
        write_checkpoint(folder, hf, small_tokenizer, files=case.files, form=case.form)
        prompts = random_prompts(7, (1, 5, 17))
        greedy = [hf_greedy(hf, prompt, NEW_TOKENS) for prompt in prompts]
        found = Truth(folder, prompts, greedy, [])
        for prompt, tokens, example in zip(prompts, greedy, found.examples, strict=True):
            logits = hf_logits(hf, example)
            # Without a cache transformers must say the same, and no choice may be so near that rounding decides.
            best = logits[len(prompt) - 1 : -1].topk(2)
            assert best.indices[:, 0].tolist() == tokens
            assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-4, "a near tie: choose another seed"
            found.logits.append(logits)
        return found

    return of


# --- logits and greedy tokens


@dataclass(frozen=True)
class Outcome:
    """What a rank makes of a case."""

    placement: str
    logits: list[Tensor]
    first_logits: Tensor
    alone: list[int]
    together: list[list[int]]


def outcome_on_rank(
    folder: Path, placement: str, prompts: list[list[int]], examples: list[list[int]], count: int
) -> Outcome:
    model = load(folder, placement)
    return Outcome(
        placement=model.llma.placement,
        logits=model.compute_logits(examples),
        first_logits=model.compute_logits([prompts[0]])[0],
        alone=completions(model.llma, prompts[-1:], max_gen_len=count)[0],
        together=completions(model.llma, prompts, max_gen_len=count),
    )


@pytest.mark.parametrize(("case", "size"), CASES_AND_SIZES)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    case: Case, size: int, ranks: Pools, truth: Callable[[str], Truth]
) -> None:
    expected = truth(case.name)
    prompts, examples = expected.prompts, expected.examples
    count = NEW_TOKENS if size <= 2 else 16  # many processes on 2 cores are slow
    for asked, placement in case.placements(size).items():
        outcomes = on_ranks(ranks, size, outcome_on_rank, expected.folder, asked, prompts, examples, count)
        alike([vars(outcome) for outcome in outcomes])
        outcome: Outcome = outcomes[0]
        assert outcome.placement == placement
        for ours, theirs, prompt in zip(outcome.logits, expected.logits, prompts, strict=True):
            torch.testing.assert_close(ours, theirs, **LOGITS)
            # Greedy tokens without a cache, for these are the logits of the greedy tokens themselves.
            assert ours[len(prompt) - 1 : -1].argmax(-1).tolist() == theirs[len(prompt) - 1 : -1].argmax(-1).tolist()
        # One token by itself: most experts get nothing, and the product of few tokens is another way through them.
        torch.testing.assert_close(outcome.first_logits, expected.logits[0][:1], **LOGITS)
        assert outcome.alone == expected.greedy[-1][:count]
        assert outcome.together == [tokens[:count] for tokens in expected.greedy]


def test_the_cases_cover_what_they_should() -> None:
    asked = {(case.name, size): case.placements(size) for case in CASES for size in case.ranks}
    assert asked["6 experts, 2 files", 4] == {"auto": "tensor"}
    assert asked["6 experts, 2 files", 3] == {"auto": "expert", "tensor": "tensor"}
    assert asked["mixtral", 8] == {"auto": "expert", "tensor": "tensor"}
    assert all("expert" in asked[case.name, case.ranks[1]].values() for case in CASES)


def uncached_on_rank(folder: Path, placement: str, prompts: list[list[int]]) -> list[list[int]]:
    model = load(folder, placement)
    rows = [list(prompt) for prompt in prompts]
    for _ in range(NEW_TOKENS):
        for row, logits in zip(rows, model.compute_logits(rows), strict=True):
            row.append(int(logits[-1].argmax()))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.soak)])
def test_generating_by_repeated_scoring_gives_the_same_tokens(
    size: int, ranks: Pools, truth: Callable[[str], Truth]
) -> None:
    expected = truth("mixtral")
    for placement in ("expert", "tensor"):
        assert alike(on_ranks(ranks, size, uncached_on_rank, expected.folder, placement, expected.prompts)) == (
            expected.greedy
        )


def chunked_on_rank(folder: Path, placement: str, prompts: list[list[int]]) -> list[list[list[int]]]:
    llma = load(folder, placement).llma
    usual, result = engine.PREFILL_TOKENS, []
    try:
        for engine.PREFILL_TOKENS in (1, 5, 17, 22):
            result.append(completions(llma, prompts, max_gen_len=8))
    finally:
        engine.PREFILL_TOKENS = usual
    return result


@pytest.mark.parametrize("size", [1, 2])
def test_a_prompt_read_in_pieces_gives_the_same_tokens(size: int, ranks: Pools, truth: Callable[[str], Truth]) -> None:
    expected = truth("mixtral")
    for placement in ("expert", "tensor"):
        by_piece = alike(on_ranks(ranks, size, chunked_on_rank, expected.folder, placement, expected.prompts))
        assert by_piece == [[tokens[:8] for tokens in expected.greedy]] * len(by_piece)


# --- checkpoint forms


# 24 divides by 1, 2, 3, 4, 6 and 8: heads, experts, widths and vocabulary alike.
DIVISIBLE = sizes(24, 24, 24, 2, 24, 24, 2, num_hidden_layers=1)


def forms_on_rank(folders: list[Path], placements: tuple[str, ...], examples: list[list[int]]) -> list[list[Tensor]]:
    return [load(folder, placement).compute_logits(examples) for placement in placements for folder in folders]


@pytest.fixture(scope="module")
def forms(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Tensor]]:
    """One model in every form and number of files, and its logits."""
    hf, root = random_mixtral(2, **DIVISIBLE), tmp_path_factory.mktemp("forms")
    kinds = [("released", 1), *((form, files) for form in ("base", "sparse") for files in (1, 2, 3, 4, 8))]
    folders = [
        write_checkpoint(root / f"{form}-{files}", hf, small_tokenizer, files=files, form=form) for form, files in kinds
    ]
    return folders, [hf_logits(hf, example) for example in random_prompts(3, (9, 4))]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_any_number_of_files_loads_at_any_number_of_ranks(
    size: int, ranks: Pools, forms: tuple[list[Path], list[Tensor]]
) -> None:
    folders, expected = forms
    placements = ("expert", "tensor")
    results = alike(on_ranks(ranks, size, forms_on_rank, folders, placements, random_prompts(3, (9, 4))))
    for start in range(0, len(results), len(folders)):
        # The same weights in the same slices: from whatever files, not a bit may differ.
        for logits in results[start : start + len(folders)]:
            assert_same(logits, results[start])
        for ours, theirs in zip(results[start], expected, strict=True):
            torch.testing.assert_close(ours, theirs, **LOGITS)


# --- sampling on many ranks


def sampled_on_rank(folder: Path, placement: str, prompts: list[list[int]]) -> list[list[list[int]]]:
    llma = load(folder, placement).llma
    torch.manual_seed(dist.get_rank())
    return [completions(llma, prompts, max_gen_len=12, temperature=0.8, top_p=top_p) for top_p in (0.95, 1.0)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_different_seeds_sample_the_same(size: int, ranks: Pools, truth: Callable[[str], Truth]) -> None:
    expected = truth("mixtral")
    for placement in ("expert", "tensor"):
        by_top_p = alike(ranks(size).run(sampled_on_rank, expected.folder, placement, expected.prompts))
        for sampled in by_top_p:
            assert sampled != [tokens[:12] for tokens in expected.greedy]
            assert [len(tokens) for tokens in sampled] == [12] * 3
