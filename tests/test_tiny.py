"""The tiny model's recipe, cut short: it learns, its experts share the work, and what it writes is a release."""

import json
from collections import Counter

import pytest
import torch

from accessory.checkpoint.convert import split
from accessory.checkpoint.manifest import Manifest
from accessory.model.meta import MetaModel
from accessory.text.tokenizer import Tokenizer
from accessory.tools.corpus import documentation_corpus
from accessory.tools.tiny import HELD_BACK, LEAST_SHARE, make_tiny, random_windows, token_stream


def unigram_loss(tokenizer: Tokenizer) -> float:
    """Cross-entropy on the held-back documents of the best guess that knows only how frequent each token is."""
    texts = documentation_corpus()
    counts = Counter(token_stream([text for i, text in enumerate(texts) if i % HELD_BACK], tokenizer).tolist())
    frequencies = torch.tensor([counts[token] + 1.0 for token in range(tokenizer.n_words)])
    log_probs = (frequencies / frequencies.sum()).log()
    return -log_probs[token_stream(texts[::HELD_BACK], tokenizer)].mean().item()


def test_a_short_training_learns_more_than_frequencies_and_uses_every_expert(tiny):
    folder, report = tiny
    assert 4.5e6 < report.parameters < 15e6
    assert report.loss < unigram_loss(Tokenizer(folder)) - 0.8
    assert report.expert_share.shape == (4, 8)
    torch.testing.assert_close(report.expert_share.sum(-1), torch.ones(4))
    assert report.expert_share.min() >= LEAST_SHARE


def test_it_is_written_as_the_official_release(tiny):
    folder, _ = tiny
    assert sorted(path.name for path in folder.iterdir()) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert "layers.3.feed_forward.experts.7.w2.weight" in tensors
    assert not any(name.startswith("llma.") for name in tensors)
    params = json.loads((folder / "params.json").read_text())
    assert params["moe"] == {"num_experts": 8, "num_experts_per_tok": 2}
    assert (params["n_heads"], params["n_kv_heads"]) == (16, 8)
    assert Manifest.read(folder).form == "consolidated"


def test_it_converts_and_writes_words(tiny, tmp_path):
    split(tiny[0], tmp_path / "converted", mp=8)
    released, converted = (
        MetaModel.from_pretrained(folder, dtype="fp32", max_seq_len=128) for folder in (tiny[0], tmp_path / "converted")
    )
    text = released.generate(["The list method"], max_gen_len=40)
    assert converted.generate(["The list method"], max_gen_len=40) == text
    vocabulary = {word.strip(".,") for document in documentation_corpus(300_000) for word in document.split()}
    words = [word.strip(".,") for word in text[0].split()]
    assert sum(word in vocabulary for word in words) >= 0.6 * len(words)


def test_windows_give_every_token_once_in_a_pass():
    stream = torch.arange(1000)
    batches = random_windows(stream, batch=3, length=7, seed=0)
    first_pass = torch.cat([next(batches) for _ in range(45)])
    assert len(set(first_pass.flatten().tolist())) == first_pass.numel()
    assert all(torch.equal(row, torch.arange(row[0], row[0] + 7)) for row in first_pass)
    assert len({tuple(next(batches)[0].tolist()) for _ in range(50)}) == 50


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch", 0), ("length", 1)])
def test_settings_that_make_no_sense_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        make_tiny(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_a_seed_beyond_pytorchs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"seed must be from .*, not {2**64}"):
        make_tiny(tmp_path / "out", seed=2**64)
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_users_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        make_tiny(tmp_path, steps=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"
