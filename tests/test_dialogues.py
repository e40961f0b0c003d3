"""Dialogues made of docstrings, and asking a model in the form in which it learned them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_tensors, small_config, write_folder
from finetuning import alone
from programs import Program
from test_tokenizer import train_json

from accessory.cli import main
from accessory.data.cache import CACHE_VARIABLE, load_finetune_data
from accessory.data.conversation import default_conversation
from accessory.model.meta import MetaModel
from accessory.text.form_files import find_form
from accessory.text.forms import DefaultForm
from accessory.text.tokenizer import Tokenizer
from accessory.tools import docstring_dialogues

QUESTIONS = ["What does abc.abstractmethod do?", "What is queue.Queue?"]


def test_dialogues_are_data_for_finetuning(
    small_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dialogues"
    assert docstring_dialogues.main([str(folder), "--limit", "60"]) == 0
    assert "57 dialogues to train on, 3 held out" in capsys.readouterr().out
    train, held_out = (json.loads((folder / name).read_text()) for name in ("train.json", "held_out.json"))
    assert (len(train), len(held_out)) == (57, 3)
    turns = [[turn["value"] for turn in dialogue["conversations"]] for dialogue in train]
    assert ["What does abc.abstractmethod do?", "A decorator indicating abstract methods."] in turns
    asked = {question for question, _ in turns}
    unseen = {dialogue["conversations"][0]["value"] for dialogue in held_out}
    assert not asked & unseen
    lines = (folder / "questions.txt").read_text().splitlines()
    assert [line in asked for line in lines] == [True] * 4 + [False] * 2
    tokenizer = Tokenizer(small_tokenizer)
    data = load_finetune_data(
        folder / "data.yaml", tokenizer, dialog=True, max_words=512, cache_dir=tmp_path / "cache", progress=False
    )
    assert len(data) == 57
    assert docstring_dialogues.main([str(folder)]) == 1, "nothing is overwritten"
    assert docstring_dialogues.main([str(tmp_path / "other"), "--limit", "1"]) == 1


def test_a_model_finetuned_on_dialogues_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    """Its base was an Instruct model, whose chat template lies in tokenizer_config.json."""
    tokenizer = Tokenizer(train_json("byte_fallback", tmp_path / "base"))
    config = small_config(dim=32, hidden_dim=16, vocab_size=tokenizer.n_words)
    write_folder(tmp_path / "sizes", random_tensors(config, 5), config, files=1)
    shutil.copytree(tmp_path / "sizes", tmp_path / "base", dirs_exist_ok=True)
    settings = tmp_path / "base" / "tokenizer_config.json"
    named = json.loads(settings.read_text())
    template = "{{ bos_token }}{% for one in messages %}[INST] {{ one.content }} [/INST]{% endfor %}"
    settings.write_text(json.dumps({**named, "chat_template": template}))
    assert find_form(tokenizer, [tmp_path / "base"]).name == "tokenizer_config.json"
    data = [{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}]
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "data.yaml").write_text(f"META: [{{path: {tmp_path}/data.json}}]")
    arguments = ["--pretrained_path", str(tmp_path / "base"), "--data_config", str(tmp_path / "data.yaml"), "--dialog"]
    arguments += ["--output_dir", str(tmp_path / "run"), "--precision", "fp32", "--device", "cpu"]
    with Program(alone(arguments), {CACHE_VARIABLE: str(tmp_path / "cache")}) as program:
        assert program.wait() == 0
    trained = Tokenizer(tmp_path / "run" / "epoch0")
    form = find_form(trained, [tmp_path / "run" / "epoch0"])
    assert form.recorded() == DefaultForm(trained).recorded() == {"name": "default", "answers_end_at": "\n### Human:"}
    assert json.loads(trained.path.with_name("tokenizer_config.json").read_text()) == named


@pytest.fixture
def folder(small_tokenizer: Path, tmp_path: Path) -> Path:
    config = small_config()
    return write_folder(tmp_path / "model", random_tensors(config, 5), config, files=1, tokenizer=small_tokenizer)


def test_questions_are_asked_as_they_were_learned(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = []
    for question in QUESTIONS:
        conversation = default_conversation()
        conversation.load_qas([[question, None]])
        prompts.append(conversation.get_prompt())
    model = MetaModel.from_pretrained(folder, dtype="fp32")
    stop = [default_conversation().response_end_signal]
    answers = model.generate(prompts, max_gen_len=12, additional_stop_symbols=stop)
    file = tmp_path / "questions.txt"
    file.write_text("\n\n".join(QUESTIONS) + "\n")
    command = ["generate", str(folder), "--dtype", "fp32", "--dialog", "--max-gen-len", "12"]
    assert main([*command, "--prompt-file", str(file)]) == 0
    expected = "".join(
        f"--- {number} of {len(QUESTIONS)}: {question}\n{answer.strip()}\n"
        for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True), start=1)
    )
    assert capsys.readouterr().out == expected
    assert main([*command, "--prompt", QUESTIONS[1]]) == 0
    assert capsys.readouterr().out == f"{answers[1].lstrip()}\n"


@pytest.mark.parametrize(
    ("content", "settings", "says"),
    [
        (b"\n \n", [], "prompts.txt has no line with a prompt: write some into it"),
        (None, [], "prompts.txt cannot be read (No such file or directory): check the path"),
        (b"a caf\xe9\n", [], "prompts.txt is not UTF-8 (at byte 5): save it as UTF-8"),
        (b"a\n", ["--temperature", "-1"], "temperature must be 0 or a positive number, not -1.0"),
        (b"a\n", ["--top-p", "2"], "top_p must lie between 0 and 1, not 2.0"),
        (b"a\n", ["--max-gen-len", "4095"], "max_gen_len 4095 leaves no room for a prompt in max_seq_len 4096"),
        (b"a\n", ["--stop", ""], "stop symbols must be non-empty strings"),
    ],
)
def test_what_is_asked_wrongly_is_said_before_the_model_is_loaded(
    content: bytes | None,
    settings: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(MetaModel, "from_pretrained", loaded.append)
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    assert main(["generate", str(tmp_path), "--prompt-file", str(file), *settings]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert says in told.err
    assert not loaded
