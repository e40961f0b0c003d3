"""Texts and scores against transformers' Mixtral, at several rank counts."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import hf_greedy, hf_logits, random_mixtral, random_prompts, write_checkpoint
from models import load
from ranks import RankPool, alike, on_ranks
from test_tokenizer import load_all
from torch import Tensor

from accessory.model.requests import example_tokens
from accessory.parallel.state import ParallelState
from accessory.text.tokenizer import Tokenizer

Pools = Callable[[int], RankPool]

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 24
LOGITS = {"atol": 1e-4, "rtol": 0.0}


PROMPTS = ["The list method", "a", "Return a new string, of the given width; see also the module os.path", "x = 1", ""]


@dataclass(frozen=True)
class Texts:
    """A checkpoint with room for two rows at a time, and what transformers writes with it.

    Attributes:
        tokens: of each prompt's completion: LENGTH of them, or those before the end token.
    """

    folder: Path
    hf: Any
    tokens: list[list[int]]
    texts: list[str]


@pytest.fixture(scope="module")
def texts(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    hf, tokenizer = random_mixtral(4), Tokenizer(small_tokenizer)
    prompts = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    # The model is made to end its second text after some tokens: the end token's scores change places with those
    # of a token that it chooses there.
    chosen = hf_greedy(hf, prompts[1], LENGTH)
    turn = max(chosen.index(token) for token in chosen)
    with torch.no_grad():
        rows = [chosen[turn], tokenizer.eos_id]
        hf.lm_head.weight[rows] = hf.lm_head.weight[rows[::-1]]
    found = []
    for prompt in prompts:
        tokens = hf_greedy(hf, prompt, LENGTH)
        found.append(tokens[: tokens.index(tokenizer.eos_id)] if tokenizer.eos_id in tokens else tokens)
    assert len(found[1]) == turn
    assert turn > 3
    assert [len(tokens) for tokens in found].count(LENGTH) >= 2
    folder = write_checkpoint(tmp_path_factory.mktemp("texts") / "checkpoint", hf, small_tokenizer, files=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_batch_size": 2}))
    return Texts(folder, hf, found, [behind(tokenizer, *pair) for pair in zip(prompts, found, strict=True)])


def behind(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """What a completion adds to its prompt's text."""
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def texts_on_rank(folder: Path, placement: str, stop: list[str]) -> dict[str, Any]:
    model = load(folder, placement)
    streams = {
        "streams": [list(model.stream_generate(prompt, max_gen_len=LENGTH)) for prompt in PROMPTS],
        "stopped streams": [
            list(model.stream_generate(prompt, None, LENGTH, additional_stop_symbols=stop)) for prompt in PROMPTS
        ],
    }
    return {
        "texts": model.generate(PROMPTS, images=None, max_gen_len=LENGTH),
        "texts backwards": model.generate(PROMPTS[::-1], max_gen_len=LENGTH),
        "short": model.generate(PROMPTS, max_gen_len=3),
        "stopped": model.generate(PROMPTS, max_gen_len=LENGTH, additional_stop_symbols=stop),
        "best of nucleus 0": model.generate(PROMPTS, max_gen_len=LENGTH, temperature=0.7, top_p=0.0),
        **streams,
    }


@pytest.mark.parametrize("size", [1, 2])
def test_texts_are_those_of_transformers(size: int, ranks: Pools, texts: Texts, small_tokenizer: Path) -> None:
    tokenizer = Tokenizer(small_tokenizer)
    stop = [texts.texts[0][11:14], texts.texts[2][20:22], "never written"]
    cut = [text[: min((text.find(s) for s in stop if s in text), default=len(text))] for text in texts.texts]
    assert sum(len(short) < len(text) for short, text in zip(cut, texts.texts, strict=True)) >= 2
    for placement in ("expert", "tensor"):
        got = alike(on_ranks(ranks, size, texts_on_rank, texts.folder, placement, stop))
        assert got["texts"] == texts.texts
        assert got["texts backwards"] == texts.texts[::-1]
        prompts = [tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
        short = [behind(tokenizer, prompt, tokens[:3]) for prompt, tokens in zip(prompts, texts.tokens, strict=True)]
        assert got["short"] == short
        assert got["stopped"] == cut
        assert got["best of nucleus 0"] == texts.texts
        for streams, ends in (("streams", texts.texts), ("stopped streams", cut)):
            for steps, tokens, end in zip(got[streams], texts.tokens, ends, strict=True):
                assert [step["end_of_content"] for step in steps] == [False] * (len(steps) - 1) + [True]
                assert steps[-1] == {"text": end, "end_of_content": True}
                # What was shown is never taken back.
                for before, after in pairwise(steps):
                    assert after["text"].startswith(before["text"])
                if streams == "streams":
                    assert len(steps) == min(LENGTH, len(tokens) + 1)


# --- scores

# The last one's continuation is spelled in bytes.
BEHIND_CONTEXTS, CONTEXTS = ["The list method", "x = 1", "Q: 🫨"], ["The list", "x", "Q: "]


def scores_on_rank(folder: Path, placement: str, examples: list[list[int]], firsts: list[int]) -> dict[str, Any]:
    model = load(folder, placement)
    contexts = [example[:first] for example, first in zip(examples, firsts, strict=True)]
    return {
        "logits of texts": model.compute_logits(PROMPTS, bos=True, eos=True),
        "logits of tokens": model.compute_logits(examples),
        "texts": model.evaluate_examples(PROMPTS[:-1]),
        "texts without bos": model.evaluate_examples(PROMPTS[2:3], bos=False, eos=True),
        "texts behind contexts": model.evaluate_examples(BEHIND_CONTEXTS, contexts=CONTEXTS, eos=True),
        "tokens": model.evaluate_examples(examples),
        "tokens behind contexts": model.evaluate_examples(examples, contexts=contexts),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_scores_are_those_of_transformers(size: int, ranks: Pools, texts: Texts, small_tokenizer: Path) -> None:
    hf, tokenizer = texts.hf, Tokenizer(small_tokenizer)

    def encode(listed: Sequence[str], *, bos: bool = True, eos: bool = False) -> list[list[int]]:
        return [tokenizer.encode(text, bos=bos, eos=eos) for text in listed]

    # The model itself writes what follows the first prompt, and all but the last token of what follows the second.
    prompts = encode(PROMPTS[:2])
    examples = [prompts[0] + texts.tokens[0], prompts[1] + texts.tokens[1][:5] + [5], *random_prompts(8, (30, 60))]
    firsts = [len(prompts[0]), len(prompts[1]), 1, 10]
    short = encode(BEHIND_CONTEXTS, eos=True)
    asked: dict[str, tuple[list[list[int]], list[int]]] = {
        "texts": (encode(PROMPTS[:-1]), [1] * 4),
        "texts without bos": (encode(PROMPTS[2:3], bos=False, eos=True), [1]),
        "texts behind contexts": (short, [len(tokens) for tokens in encode(CONTEXTS)]),
        "tokens": (examples, [1] * 4),
        "tokens behind contexts": (examples, firsts),
    }
    for placement in ("expert", "tensor"):
        got = alike(on_ranks(ranks, size, scores_on_rank, texts.folder, placement, examples, firsts))
        for name, listed in (("logits of texts", encode(PROMPTS, eos=True)), ("logits of tokens", examples)):
            for ours, tokens in zip(got[name], listed, strict=True):
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours, hf_logits(hf, tokens), **LOGITS)
        assert got["tokens behind contexts"]["max_equal"] == [True, False, False, False]
        for name, (listed, firsts) in asked.items():
            assert_scores(got[name], [reference_score(hf, *pair) for pair in zip(listed, firsts, strict=True)])


def reference_score(hf: Any, tokens: list[int], first: int) -> tuple[float, float, bool, Tensor]:
    """Log-likelihood, perplexity, whether greedy says the same, and the logits, of the tokens from ``first`` on."""
    logits = hf_logits(hf, tokens)
    total, same = 0.0, True
    for position in range(first, len(tokens)):
        row = logits[position - 1].double()
        total += float(row[tokens[position]] - row.logsumexp(0))
        same = same and int(row.argmax()) == tokens[position]
    return total, math.exp(-total / (len(tokens) - first)), same, logits[first - 1 : -1]


def assert_scores(got: dict[str, list], expected: list[tuple[float, float, bool, Tensor]]) -> None:
    assert got.keys() == {"log_likelihood", "ppl", "max_equal", "non_context_logits"}
    likelihoods, perplexities, same, logits = (list(column) for column in zip(*expected, strict=True))
    assert got["log_likelihood"] == pytest.approx(likelihoods, rel=1e-4)
    assert got["ppl"] == pytest.approx(perplexities, rel=1e-4)
    assert got["max_equal"] == same
    for ours, theirs in zip(got["non_context_logits"], logits, strict=True):
        torch.testing.assert_close(ours, theirs, **LOGITS)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("json"))


@pytest.mark.parametrize("kind", ["v1", "v3", "byte_level", "byte_fallback"])
@pytest.mark.parametrize("context", ["", "dog", "🫨", "dog🫨"])
def test_all_bytes_behind_a_context_are_scored(kind: str, context: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    llma: Any = SimpleNamespace(state=ParallelState.single("cpu"), args=SimpleNamespace(max_seq_len=64))
    settings: dict[str, Any] = {"images": None, "bos": True, "eos": False, "scored": True}
    (tokens,), firsts = example_tokens(llma, tokenizer, [f"{context}🫨 a"], contexts=[context], **settings)
    assert firsts is not None
    assert tokenizer.decode(tokens[: firsts[0]]) == context
    assert tokenizer.decode(tokens[firsts[0] :]) == "🫨 a"
