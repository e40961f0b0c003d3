"""Dialogues made of docstrings, and asking a model in the form in which it learned them."""

import json
from pathlib import Path

import pytest
from checkpoints import random_tensors, small_config, write_folder

from accessory.cli import main
from accessory.data.cache import load_finetune_data
from accessory.data.conversation import default_conversation
from accessory.model.meta import MetaModel
from accessory.model.tokenizer import Tokenizer
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
    expected = "".join(f"{q}\n  {a.strip()}\n" for q, a in zip(QUESTIONS, answers, strict=True))
    assert capsys.readouterr().out == expected
    assert main([*command, "--prompt", QUESTIONS[1]]) == 0
    assert capsys.readouterr().out == f"{answers[1]}\n"


def test_a_file_without_prompts_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("\n \n")
    assert main(["generate", str(folder), "--dtype", "fp32", "--prompt-file", str(file)]) == 1
    assert f"--prompt-file {file} has no line" in capsys.readouterr().err
    assert main(["generate", str(folder), "--dtype", "fp32", "--prompt-file", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
