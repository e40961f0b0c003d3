"""Raw files of the Hub to the data files that the yaml names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from patience import PATIENCE

from accessory.data.records import Talk, read_said
from accessory.text.chat import Message
from accessory.tools import docstring_dialogues, prepare_data
from accessory.tools.prepare_data import convert_data, main


def chat(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"prompt": "p", "messages": [{"content": c, "role": r} for r, c in messages], "prompt_id": "7", **more}


CHATS = [
    chat(("user", "Hé?"), ("assistant", "Yes.\n"), ("user", "And?"), ("assistant", "So.")),
    chat(("system", "Be brief. "), ("user", "Why?"), ("assistant", "日本")),
]
WANTED = [
    {
        "conversations": [
            {"from": "human", "value": "Hé?"},
            {"from": "gpt", "value": "Yes.\n"},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "So."},
        ]
    },
    {
        "conversations": [
            {"from": "system", "value": "Be brief. "},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "日本"},
        ]
    },
]
CODE = [{"instruction": "Sort.", "output": "```py\nsorted(x)\n```"}, {"instruction": "Add.", "output": "a + b"}]


def lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def parquet(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def test_ultrachat_from_each_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(CHATS))
    sources = [parquet(tmp_path / "a.parquet", CHATS), lines(tmp_path / "a.jsonl", CHATS), tmp_path / "a.json"]
    for number, source in enumerate(sources):
        target = tmp_path / "out" / f"{number}.json"
        outcome = convert_data("ultrachat", source, target)
        assert json.loads(target.read_text()) == WANTED
        assert (outcome.written, outcome.left_out) == (2, 0)
    assert "日本" in target.read_text()


def test_ultrachat_from_the_hubs_folder_takes_the_train_sft_split(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    parquet(hub / "data" / "train_sft-00001-of-00002-ab.parquet", CHATS[1:])
    parquet(hub / "data" / "train_sft-00000-of-00002-cd.parquet", CHATS[:1])
    parquet(hub / "data" / "test_sft-00000-of-00001-ef.parquet", CHATS[:1])
    parquet(hub / "data" / "train_gen-00000-of-00001-01.parquet", CHATS[:1])
    (hub / "README.md").write_text("dataset card")
    for source in (hub, hub / "data"):
        assert convert_data("ultrachat", source, tmp_path / "a.json").written == 2
        assert json.loads((tmp_path / "a.json").read_text()) == WANTED


def test_evol_codealpaca(tmp_path: Path) -> None:
    lines(tmp_path / "hub" / "train.jsonl", CODE)
    outcome = convert_data("evol-codealpaca", tmp_path / "hub", tmp_path / "wizardCode.json")
    assert outcome.written == 2
    made = json.loads((tmp_path / "wizardCode.json").read_text())
    said = [Talk((Message("user", record["instruction"]), Message("assistant", record["output"]))) for record in CODE]
    assert [read_said(record) for record in made] == said


def test_what_ultrachat_says_is_kept(tmp_path: Path) -> None:
    convert_data("ultrachat", lines(tmp_path / "a.jsonl", CHATS), tmp_path / "a.json")
    assert [read_said(record) for record in json.loads((tmp_path / "a.json").read_text())] == [
        read_said(record) for record in CHATS
    ]


def test_bad_records_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad: list[tuple[Any, str]] = [
        (3, "it is not an object"),
        ({"prompt": "a"}, "it has no 'messages'"),
        ({"messages": "a"}, "'messages' is 'a', not a list of turns"),
        (chat(("user", "a"), ("assistant", None)), "turn 2 of its messages has none of value, content, text"),
        (chat(("user", "a"), ("tool", "b")), "turn 2 of its messages has 'tool' under 'role': the use of tools"),
        (chat(("assistant", "a"), ("user", "b")), "turn 1 of its messages is from the assistant, not from the user"),
        (chat(("user", "a"), ("user", "b")), "turn 2 of its messages is from the user, not from the assistant"),
        (chat(), r"'messages' is \[\], not a list of turns"),
        (chat(("system", "a")), "no answer"),
        (chat(("user", "a"), ("assistant", " ")), "no answer"),
        (chat(("user", "a")), "no answer"),
        (chat(("user", "a"), ("assistant", "\ud800")), "lone surrogate"),
    ]
    for record, reason in bad:
        source = lines(tmp_path / "a.jsonl", [CHATS[0], record, CHATS[1]])
        outcome = convert_data("ultrachat", source, tmp_path / "a.json")
        assert json.loads((tmp_path / "a.json").read_text()) == WANTED
        (told,) = outcome.listed
        assert outcome.left_out == 1
        assert told.startswith(f"{source}, line 2: ")
        assert re.search(reason, told)
    source.write_text(source.read_text() + "\n{\n")
    assert main(["ultrachat", str(source), str(tmp_path / "a.json")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote 2 dialogues to {tmp_path}/a.json\n"
    assert "2 records are left out" in captured.err
    assert "line 4: it is not valid JSON" in captured.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "no data file"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "a", "unknown kind"),
        ("a.json", '[{"instruction": "a"', "line 1: not a valid .json data file"),
        ("a.json", '[{"instruction": "a", "output": "b"}, 3', "line 1: not a valid .json data file"),
        ("a.json", "[]", "no record of .* is a usable dialogue"),
        ("a.jsonl", '{"instruction": "a", "output": ""}', "is a usable dialogue of evol-codealpaca: .*no answer"),
        ("a.jsonl", '{"messages": []}', "is a usable dialogue of evol-codealpaca: .*'instruction'"),
        ("a.parquet", "PAR1", "not a whole parquet file"),
    ],
)
def test_what_cannot_be_converted(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.json"
    target.write_text("as before")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_data("evol-codealpaca", tmp_path / name, target)
    assert main(["evol-codealpaca", str(tmp_path / name), str(target)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ERROR: ")
    assert error.count("\n") == 1
    assert target.read_text() == "as before"
    assert not list(tmp_path.glob("*.tmp"))
    assert main(["evol-codealpaca", str(tmp_path / name), str(tmp_path / "new" / "folder" / "out.json")]) == 1
    assert not (tmp_path / "new").exists()


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps(CODE))
    for target in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match=r"name the \.json file"):
            convert_data("evol-codealpaca", source, target)
    with pytest.raises(ValueError, match="read and written"):
        convert_data("evol-codealpaca", source, source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no data file"):
        convert_data("evol-codealpaca", tmp_path / "empty", tmp_path / "b.json")
    with pytest.raises(ValueError, match="unknown dataset 'alpaca': take one of ultrachat, evol-codealpaca"):
        convert_data("alpaca", source, tmp_path / "b.json")
    assert json.loads(source.read_text()) == CODE


def test_as_a_program(tmp_path: Path) -> None:
    source = lines(tmp_path / "train.jsonl", CODE)
    command = [sys.executable, "-m", prepare_data.__name__, "evol-codealpaca", str(source), "made/b.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "wrote 2 dialogues to made/b.json\n")
    assert len(json.loads((tmp_path / "made" / "b.json").read_text())) == 2
    command[4] = "absent.jsonl"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == "ERROR: no data file absent.jsonl: check the path\n"


@pytest.mark.parametrize("program", [main, docstring_dialogues.main], ids=["prepare_data", "docstring_dialogues"])
def test_an_empty_name_is_not_the_current_folder(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    with pytest.raises(SystemExit):
        program(["evol-codealpaca", "", "new.json"] if program is main else [""])
    assert "an empty name was given" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
