"""The command generate in this process: in which form it asks, and what it writes where."""

import io
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES
from checkpoints import random_tensors, small_config, write_folder
from programs import Program

from accessory.cli import main
from accessory.generation import engine
from accessory.model.meta import MetaModel
from accessory.text.chat import Message
from accessory.text.form_files import find_form
from accessory.text.forms import FORMS, Form

CONFIG = small_config()
TEXTS = ["The list method", "  two\u2028lines\x85of\x0bthe\x0cfile\x1c\x1d\x1e ", "Return the number\r of words"]
SETTINGS = ("--max-gen-len", "6", "--max_seq_len", "256")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "model"
    return write_folder(folder, random_tensors(CONFIG, 5), CONFIG, files=2, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def model(folder: Path) -> MetaModel:
    return MetaModel.from_pretrained(folder, dtype="auto", max_seq_len=256)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(folder: Path, *arguments: str | Path) -> tuple[int, str, str]:
        code = main(["generate", str(folder), *SETTINGS, *map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def named(folder: Path) -> Iterator[Callable[..., None]]:
    """Makes the folder say a form."""
    meta, template = folder / "meta.json", folder / "chat_template.jinja"
    before = meta.read_text()

    def say(record: dict[str, Any] | None, text: str | None = None) -> None:
        if record is not None:
            meta.write_text(json.dumps({**json.loads(before), "prompt_form": record}))
        if text is not None:
            template.write_text(text)

    yield say
    meta.write_text(before)
    template.unlink(missing_ok=True)


def prompts(texts: list[str]) -> list[str]:
    return [part for text in texts for part in ("--prompt", text)]


def answers(model: MetaModel, form: Form | None) -> list[str]:
    """What the Python door says to TEXTS in this form; None: raw."""
    if form is None:
        return model.generate(TEXTS, max_gen_len=6)
    asked = [form.prompt([Message("user", text)]) for text in TEXTS]
    return model.generate(asked, max_gen_len=6, ends=form.ends)


RECORDS: dict[str, dict[str, Any]] = {
    "default": {"name": "default", "answers_end_at": "\n### Human:"},
    "alpaca": {"name": "alpaca", "prompt_types": ["alpaca"]},
    "mixtral-instruct": {"name": "mixtral-instruct"},
}


@pytest.mark.parametrize("name", [*RECORDS, "template", "none"])
@pytest.mark.parametrize(
    "flags", [(), ("--raw",), ("--dialog",), *(("--chat_template", form) for form in FORMS)], ids=" ".join
)
def test_prompts_are_asked_in_the_form_that_the_folder_names(
    name: str, flags: tuple[str, ...], folder: Path, model: MetaModel, named: Callable[..., None], run: Run
) -> None:
    """And continued as they are where it names none; flags rule."""
    named(RECORDS.get(name), TEMPLATES["chatml"] if name == "template" else None)
    raw = "--raw" in flags or (name == "none" and not flags)
    form = None if raw else find_form(model.tokenizer, [folder], flags[1] if len(flags) > 1 else None)
    code, out, err = run(folder, *prompts(TEXTS), "--json", *flags)
    assert code == 0, err
    assert [json.loads(line)["completion"] for line in out.split("\n")[:-1]] == answers(model, form)
    said = [line for line in err.splitlines() if "asking in the form" in line]
    assert said == ([] if form is None else [line for line in said if f'"{form.name}"' in line][:1])
    assert len(said) == (form is not None)
    assert raw or ("--raw" in said[0]) is (not flags)


def test_answers_of_several_prompts_stand_under_their_prompts(folder: Path, model: MetaModel, run: Run) -> None:
    _, out, _ = run(folder, *prompts(TEXTS))
    one, two, three = answers(model, None)
    labels = ["The list method", "two ...", "Return the number ..."]
    assert out == "".join(
        f"--- {number} of 3: {label}\n{text}\n"
        for number, (label, text) in enumerate(zip(labels, (one, two, three), strict=True), start=1)
    )
    assert run(folder, *prompts(TEXTS[:1]))[1] == f"{one}\n", "a single one needs no label"


def test_json_says_how_each_answer_ended(folder: Path, model: MetaModel, run: Run) -> None:
    one, *_ = answers(model, None)
    stop = one[-1:]
    _, out, _ = run(folder, *prompts(TEXTS[:1]), "--json")
    assert json.loads(out) == {"prompt": TEXTS[0], "completion": one, "finish_reason": "length", "tokens": 6}
    _, out, _ = run(folder, *prompts(TEXTS[:1]), "--json", "--stop", stop)
    cut = json.loads(out)
    assert cut["completion"] == one[: one.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["tokens"] <= 6


@pytest.mark.parametrize("flags", [("--prompt", "-"), ("--prompt-file", "-"), ("--prompt-file", "FILE")], ids=" ".join)
def test_prompts_come_from_lines(
    flags: tuple[str, str], folder: Path, model: MetaModel, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other ends of lines than the line feed are part of a prompt, as is a space before it; empty lines are none."""
    content = "\ufeff" + "\n\n \n".join(TEXTS) + "\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    (tmp_path / "lines").write_text(content, newline="")
    file = str(tmp_path / "lines")
    _, out, err = run(folder, *(file if flag == "FILE" else flag for flag in flags), "--json")
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert [one["prompt"] for one in found] == TEXTS, err
    assert [one["completion"] for one in found] == answers(model, None)


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.txt"])
def test_answers_go_into_a_file(name: str, folder: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text("of before")
    code, out, err = run(folder, *prompts(TEXTS), "--output", file)
    assert (code, out) == (0, ""), err
    expected = run(folder, *prompts(TEXTS), *(("--json",) if name.endswith("l") else ()))[1]
    assert file.read_text() == expected
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_was_answered_before_an_interruption_is_kept(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("of before")
    decode = engine._decode
    left = 7  # the second prompt is being answered then

    def interrupted(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(engine, "_decode", interrupted)
    monkeypatch.setattr(engine, "_slots_for", lambda *_: 1)
    code, out, err = run(folder, *prompts(TEXTS), "--output", file)
    assert (code, out) == (130, "")
    (line,) = (tmp_path / "answers.jsonl.partial").read_text().splitlines()
    assert json.loads(line)["prompt"] == TEXTS[0]
    assert f"what was written up to here is in {file}.partial" in err
    assert file.read_text() == "of before"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("number", "nproc", "code"),
    [(signal.SIGTERM, 1, 143), (signal.SIGTERM, 2, 143), (signal.SIGKILL, 1, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGTERM to the launcher", "SIGKILL"],
)
def test_what_was_answered_before_a_signal_is_kept(
    number: signal.Signals, nproc: int, code: int, folder: Path, tmp_path: Path
) -> None:
    """And what an earlier run has kept."""
    file, part = tmp_path / "answers", tmp_path / "answers.1.partial"
    (tmp_path / "answers.partial").write_text("two hours of earlier answers")
    settings = ("--max-gen-len", "4000", "--max_seq_len", "8000", "--temperature", "1", "--nproc", str(nproc))
    words = ("generate", folder, "--prompt", TEXTS[0], "--output", file, *settings)
    with Program([sys.executable, "-m", "accessory", *words]) as program:
        end = time.monotonic() + 90
        while not (part.exists() and part.stat().st_size):
            assert time.monotonic() < end
            time.sleep(0.01)
        program.send(number)
        assert program.wait() == code
        program.wait_for_all()
        said = [f"WARNING: what was written up to here is in {part}"] if code > 0 else []
        assert [line for line in program.lines if not line.startswith("INFO")] == said
    assert part.stat().st_size
    assert (tmp_path / "answers.partial").read_text() == "two hours of earlier answers"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", "a", "--raw", "--dialog"), "--raw continues the prompts in no form: leave out --dialog"),
        (("--prompt", "a", "--raw", "--chat_template", "alpaca"), "--raw continues the prompts in no form"),
        (("--prompt", "a", "--prompt", "-"), "--prompt - stands for all lines of standard input"),
        (("--prompt-file", "-"), "standard input has no line with a prompt"),
        (("--prompt", "a", "--output", "/absent/answers"), "--output /absent/answers lies in no folder that is there"),
        (("--prompt", "a", "--output", "/proc/answers"), "No such file or directory: '/proc/answers'"),
        (("--prompt", "a", "--output", "/"), "--output / is a folder: name a file"),
        (("--prompt", "a", "--chat_template", "alpacca"), "(did you mean alpaca?)"),
        (("--prompt", "a", "--device", "cuda"), "PyTorch sees no CUDA device: give the device cpu"),
    ],
)
def test_what_makes_no_sense_is_said_before_the_model_is_loaded(
    arguments: tuple[str, ...], says: str, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n \n")))
    if "cuda" not in arguments:
        monkeypatch.setattr(MetaModel, "from_pretrained", None)
    code, out, err = run(folder, *arguments)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("ERROR: ")
    assert says in line
