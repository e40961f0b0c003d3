"""The tiny model's recipe, cut short: it learns, its experts share the work, and what it writes is a release."""

import json
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from programs import Program

from accessory.checkpoint.convert import split
from accessory.checkpoint.folder import Folder
from accessory.files import locked
from accessory.model.meta import MetaModel
from accessory.text.tokenizer import Tokenizer
from accessory.tools import tiny as recipe
from accessory.tools import unfinished
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
    assert Folder(folder).form == "consolidated"


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


# -- stopped, and gone on with

# The command with a short corpus, in steps that are said, each after so many seconds; states are kept at a stop alone.
COMMAND = """
import sys, time
from accessory.cli import main
from accessory.tools import tiny, unfinished
from accessory.tools.corpus import documentation_corpus
tiny.documentation_corpus = lambda: documentation_corpus(200_000)
tiny.ARGS = tiny.ARGS.replace(dim=64, n_layers=1, hidden_dim=64)
unfinished.SAVE_EVERY = 1e6
train_step = tiny.train_step
def slow(*arguments, **settings):
    print("a step begins", flush=True)
    time.sleep(float(sys.argv[1]))
    return train_step(*arguments, **settings)
tiny.train_step = slow
sys.exit(main(sys.argv[2:]))
"""


class Stopped(KeyboardInterrupt):
    """Ctrl-C."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A recipe of seconds: a few documents, a small model, small steps, each of them saved."""
    documents = documentation_corpus(200_000)
    monkeypatch.setattr(recipe, "documentation_corpus", lambda: documents)
    monkeypatch.setattr(recipe, "ARGS", recipe.ARGS.replace(dim=64, n_layers=1, hidden_dim=64))
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)
    return {"steps": 5, "batch": 2, "length": 16}


def stop_in(step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = Stopped) -> None:
    """From now on, the training stops in so manieth step that it makes."""
    steps = iter(range(1, step))

    def until(*arguments, **settings):
        if next(steps, None) is None:
            monkeypatch.setattr(recipe, "train_step", train_step)
            raise error
        return train_step(*arguments, **settings)

    train_step = recipe.train_step
    monkeypatch.setattr(recipe, "train_step", until)


def test_a_stopped_training_goes_on_and_ends_at_the_same_bits(short, tmp_path, monkeypatch, caplog):
    whole = make_tiny(tmp_path / "whole", **short)
    for step in (3, 2):
        stop_in(step, monkeypatch)
        with pytest.raises(Stopped):
            make_tiny(tmp_path / "stopped", **short)
    assert "goes on behind step 3" in caplog.text
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".stopped.partial", "whole"]
    (tmp_path / ".stopped.partial" / ".state.pt.77.tmp").write_bytes(b"of a process that was killed")
    rest = make_tiny(tmp_path / "stopped", **short)
    assert rest.loss == whole.loss
    for file in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["stopped", "whole"]


@pytest.mark.parametrize(
    ("change", "says"),
    [({"seed": 1}, "that had other seed"), ({"steps": 2, "batch": 1}, "that had other batch, steps")],
)
def test_another_recipe_begins_anew(short, change, says, tmp_path, monkeypatch, caplog):
    stop_in(4, monkeypatch)
    with pytest.raises(Stopped):
        make_tiny(tmp_path / "out", **short)
    made = make_tiny(tmp_path / "out", **(short | change))
    assert says in caplog.text
    assert made.loss == make_tiny(tmp_path / "again", **(short | change)).loss
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again", "out"]


def test_a_state_that_cannot_be_read_is_said_and_left(short, tmp_path, monkeypatch, caplog):
    stop_in(3, monkeypatch)
    with pytest.raises(Stopped):
        make_tiny(tmp_path / "out", **short)
    state = tmp_path / ".out.partial" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    make_tiny(tmp_path / "out", **short)
    assert "state.pt cannot be read" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [FloatingPointError, Stopped])
def test_what_kept_nothing_leaves_nothing(short, error, tmp_path, monkeypatch):
    stop_in(1, monkeypatch, error)
    with pytest.raises(error):
        make_tiny(tmp_path / "out", **short)
    assert not list(tmp_path.iterdir())


def test_a_stop_before_the_first_step_keeps_what_an_earlier_run_reached(short, tmp_path, monkeypatch):
    stop_in(4, monkeypatch)
    with pytest.raises(Stopped):
        make_tiny(tmp_path / "out", **short)

    def stopped():
        raise Stopped

    monkeypatch.setattr(recipe, "documentation_corpus", stopped)
    with pytest.raises(Stopped):
        make_tiny(tmp_path / "out", **short)
    assert (tmp_path / ".out.partial" / "state.pt").exists()


def test_two_do_not_make_the_same_folder(short, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    with (
        locked(tmp_path / ".out.partial" / "lock", on_wait=lambda: None),
        pytest.raises(BlockingIOError, match="out is being made by another process: wait for it, or choose another"),
    ):
        make_tiny(tmp_path / "out", **short)


def training(seconds: float, folder: Path) -> Program:
    command = [sys.executable, "-c", COMMAND, str(seconds), "tiny", "--out", "runs/tiny", "--steps", "9"]
    return Program(command, folder=folder)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.soak)]
)
def test_a_signal_and_the_same_command(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """No step is lost: the one at which it came is ended and kept."""
    with training(0.3, tmp_path) as first:
        first.wait_for("a step begins")
        first.send(number)
        assert first.wait() == code
        begun = first.lines.count("a step begins")
        assert begun < 9
        assert first.lines[-1] == f"WARNING: stopped: the same command goes on behind step {begun}"
    with training(0, tmp_path) as second:
        assert second.wait() == 0
        assert f"an earlier training was stopped: going on behind step {begun} of 9" in second.text
        assert second.lines.count("a step begins") == 9 - begun
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with training(60, tmp_path) as program:
        program.wait_for("a step begins")
        program.send(signal.SIGINT)
        program.wait_for("INFO: Ctrl-C: ending the step and saving it; another one ends at once")
        program.send(signal.SIGTERM)
        assert program.wait() == 143
    assert not list((tmp_path / "runs").iterdir())
