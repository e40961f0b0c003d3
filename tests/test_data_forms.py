"""What form the records of a run ask in: one of all of them, which the cache remembers; and fields nobody knows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import mistral_common
import pytest

from accessory.data.cache import load_finetune_data
from accessory.data.examples import Recipe
from accessory.data.finetune_data import FinetuneData
from accessory.text.forms import AlpacaForm, DefaultForm, Form, MistralForm
from accessory.text.template import TemplateForm
from accessory.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
ALPACA = [{"instruction": f"Count to {n}.", "output": "1, 2"} for n in range(4)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": f"So {n}."}]} for n in (1, 2)
]
OPENAI = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}]
INTERACTIONS = [{"interactions": [{"is_user": True, "text": "Why?"}, {"is_user": False, "text": "So."}]}]
TEXT = [{"text": "The dog."}, {"prompt": "The", "completion": " dog."}]
TEMPLATE = "{% for one in messages %}({{ one.role }}: {{ one.content }}){% endfor %}"
DEFAULT = {"name": "default", "answers_end_at": "\n### Human:"}
RECORDS = {"a": ALPACA, "chats": SHAREGPT, "openai": OPENAI, "interactions": INTERACTIONS, "text": TEXT}
FORMS: dict[str, Form] = {
    "default": DefaultForm(TOKENIZER),
    "alpaca": AlpacaForm(TOKENIZER),
    "mixtral-instruct": MistralForm(TOKENIZER),
    "template": TemplateForm(TOKENIZER, TEMPLATE, "own.jinja"),
}


def load(folder: Path, *sources: str | tuple[str, str] | list[Any], **settings: Any) -> FinetuneData:
    """The data of files of these records; a pair names the prompt type too."""
    entries = []
    for number, source in enumerate(sources):
        name, kind = source if isinstance(source, tuple) else (source, "alpaca")
        file = folder / f"{number}.jsonl"
        records = name if isinstance(name, list) else RECORDS[name]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        entries.append({"path": str(file), "prompt_type": kind})
    (folder / "data.yaml").write_text(json.dumps({"META": entries}))
    settings = {"max_words": 512, "progress": False, "cache_dir": folder / "cache", **settings}
    return load_finetune_data(folder / "data.yaml", TOKENIZER, **settings)


ONE_FORM: list[tuple[tuple[str | tuple[str, str], ...], dict[str, Any] | None]] = [
    (("a",), {"name": "alpaca", "prompt_types": ["alpaca"]}),
    ((("a", "qg"),), {"name": "alpaca", "prompt_types": ["qg"]}),
    ((("a", "qg"), ("a", "None"), "text", "a"), {"name": "alpaca", "prompt_types": ["alpaca", "qg", "None"]}),
    (("chats", "openai", "interactions"), DEFAULT),
    (("text", ("chats", "qg")), DEFAULT),
    (("text",), None),
]


@pytest.mark.parametrize(("sources", "form"), ONE_FORM)
def test_the_form_is_told_by_the_records(
    sources: tuple[Any, ...], form: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path, *sources).prompt_form == form
    monkeypatch.setattr(Recipe, "read", None)  # from the cache
    assert load(tmp_path, *sources).prompt_form == form


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("sources", [("a", "chats"), ("openai", "text", ("a", "shortqa")), ([*SHAREGPT, *ALPACA],)])
def test_several_forms_are_refused(sources: tuple[Any, ...], skip: bool, tmp_path: Path) -> None:
    listed = r"((alpaca|default) \(\S+\.jsonl\), \w+ \(\S+\.jsonl\)|\w+ and \w+, in \S+\.jsonl)"
    with pytest.raises(ValueError, match=f"several prompt forms, {listed}: name one for all with --chat_template"):
        load(tmp_path, *sources, skip_bad_records=skip)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_among_dialogues_alpaca_records_are_bad_ones(tmp_path: Path) -> None:
    mixed = [*SHAREGPT, *ALPACA]
    with pytest.raises(ValueError, match="line 3: it has no dialogue: an Alpaca record is read without --dialog"):
        load(tmp_path, mixed, dialog=True)
    data = load(tmp_path, mixed, "text", dialog=True, skip_bad_records=True)
    assert (data.prompt_form, data.reports[0].bad) == (DEFAULT, len(ALPACA))


@pytest.mark.parametrize("name", FORMS)
def test_one_form_may_be_named_for_all(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[name]
    sources = ("chats", ("a", "qg"), "text", "interactions")
    data = load(tmp_path, *sources, form=form)
    types = {"prompt_types": ["alpaca", "qg"]} if name == "alpaca" else {}
    assert data.prompt_form == {**form.recorded(), **types}
    assert len(data) == len(SHAREGPT) + len(ALPACA) + len(TEXT) + len(INTERACTIONS)
    if name != "alpaca":
        said = TOKENIZER.decode(data[len(SHAREGPT)][0].tolist())
        asked = {"default": " Human: Count to 0.\n###", "template": "(user: Count to 0.)"}
        assert asked.get(name, "[INST] Count to 0. [/INST]") in said
    monkeypatch.setattr(Recipe, "read", None)
    assert load(tmp_path, *sources, form=form).prompt_form == data.prompt_form


def test_a_source_of_chats_and_instructions_keeps_its_prompt_type(tmp_path: Path) -> None:
    """Each form that was trained is told, whichever record comes first."""
    data = load(tmp_path, ([*SHAREGPT, *ALPACA], "qg"), form=AlpacaForm(TOKENIZER))
    assert data.prompt_form == {"name": "alpaca", "prompt_types": ["alpaca", "qg"]}


def ids(data: FinetuneData) -> list[list[int]]:
    return [data[index][1].tolist() for index in range(len(data))]


@pytest.mark.parametrize("skip", [False, True])
def test_unknown_fields_are_refused_by_name_unless_they_are_ignored(skip: bool, tmp_path: Path) -> None:
    turns = [{**turn, "mood": "glad"} for turn in OPENAI[0]["messages"]]
    for records, place, names in (
        ([*SHAREGPT, {**SHAREGPT[0], "notes": "a", "rating": 5}], "line 3: it", "notes,rating"),
        ([{"messages": turns}], "line 1: turn 1 of its messages", "mood"),
        ([ALPACA[0], {**ALPACA[1], "question_2": "a"}], "line 2: it", "question_2"),
        ([{"text": "a", "labels": [1]}], "line 1: it", "labels"),
    ):
        listed = re.escape(str(names.split(",")))
        fix = f"pass --ignore_fields {names}$"
        with pytest.raises(ValueError, match=rf"^\S+/0\.jsonl, {place} has the unknown {listed}: {fix}"):
            load(tmp_path, records, skip_bad_records=skip)
        known = json.loads(json.dumps(records))
        for record in known:
            for holder in (record, *record.get("messages", [])):
                for name in names.split(","):
                    holder.pop(name, None)
        ignored = load(tmp_path, records, skip_bad_records=skip, ignore_fields=names.split(","))
        assert ids(ignored) == ids(load(tmp_path, known))
        assert ignored.reports[0].bad == 0


@pytest.mark.parametrize("name", ["0.jsonl", "0.json"])
def test_all_unknown_fields_of_a_source_are_named_at_once(name: str, tmp_path: Path) -> None:
    """Those of other records and of turns, behind records with other faults, and of a cut-off file too."""
    turn = {**OPENAI[0]["messages"][0], "mood": "glad"}
    records = [
        SHAREGPT[0],
        {**SHAREGPT[0], "foo": "a", "bar": 5},
        3,
        {"instruction": "a", "foo": "b"},
        {"messages": [{**turn, "from": "x"}, {**OPENAI[0]["messages"][1], "style": "plain"}], "foo": "c", "baz": "d"},
        {"messages": [turn, {**OPENAI[0]["messages"][1], "style": "plain"}]},
        *SHAREGPT,
    ]
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)[:-1]
    (tmp_path / name).write_text(text)
    (tmp_path / "data.yaml").write_text(json.dumps({"META": [{"path": str(tmp_path / name)}]}))
    listed = re.escape("(or what follows it) has the unknown ['foo', 'bar', 'baz', 'mood', 'style']")
    with pytest.raises(ValueError, match=rf"{name}, (line|record) 2: it {listed}: pass --.* foo,bar,baz,mood,style$"):
        load_finetune_data(tmp_path / "data.yaml", TOKENIZER, max_words=9, progress=False, cache_dir=tmp_path)


def test_unknown_fields_without_end_are_not_all_looked_for(tmp_path: Path) -> None:
    turns = [{"from": ("human", "gpt")[n % 2], "value": "a", f"field {n}": "b"} for n in range(4000)]
    with pytest.raises(
        ValueError, match=r"line 1: turn 1 of its conversations .* pass --ignore_fields field 0,field 1,"
    ):
        load(tmp_path, [{"conversations": turns}])


def test_an_ignored_field_may_be_one_of_a_form(tmp_path: Path) -> None:
    records = [{**ALPACA[0], "text": 3, "messages": "none"}]
    assert len(load(tmp_path, records, ignore_fields=["messages", "text"])) == 1


def save(records: list[dict[str, Any]], folder: Path) -> None:
    """As datasets' save_to_disk writes it, in two files."""
    shutil.rmtree(folder, ignore_errors=True)
    datasets.Dataset.from_list(records).save_to_disk(str(folder), num_shards=2)


def test_a_folder_that_datasets_saved_is_a_source(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": f"So {n}."}]}
        for n in range(8)
    ]
    save(chats, tmp_path / "saved")
    (tmp_path / "data.yaml").write_text(f"META: [{{path: {tmp_path}/saved, ratio: 0.5}}]")
    settings: dict[str, Any] = {"max_words": 512, "progress": False, "cache_dir": tmp_path / "cache"}
    first = load_finetune_data(tmp_path / "data.yaml", TOKENIZER, **settings)
    assert (len(first), first.prompt_form, first.reports[0].usable) == (4, DEFAULT, 8)
    assert first.reports[0].path == str(tmp_path / "saved")
    assert set(map(tuple, ids(first))) < set(map(tuple, ids(load(tmp_path, chats))))
    (tmp_path / "data.yaml").write_text(f"META: [{{path: {tmp_path}/saved, ratio: 0.5}}]")
    save(chats, tmp_path / "saved")
    again = load_finetune_data(tmp_path / "data.yaml", TOKENIZER, **settings)
    assert again.folder == first.folder
    chats[-1]["messages"][1]["content"] = "So 9."  # in the second file
    save(chats, tmp_path / "saved")
    changed = load_finetune_data(tmp_path / "data.yaml", TOKENIZER, **settings)
    assert changed.folder != first.folder
    assert len(changed) == 4
    chats[-1]["messages"][1]["content"] = "So.\n### Human: And?"
    save(chats, tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"bad record in {tmp_path}/saved, record 8: its answer holds"):
        load_finetune_data(tmp_path / "data.yaml", TOKENIZER, **settings)
