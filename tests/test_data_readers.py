"""Data files of every kind, whole and broken, and the yaml that names them."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accessory.data.readers
from accessory.data.json_list import json_list
from accessory.data.readers import data_files, read_records
from accessory.data.sources import Source, read_data_config

RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": 'Blue,\n\t"sea" blue.'},
    {"instruction": "日本 é 😀", "input": "x", "output": "\u2028 a line separator of Unicode"},
    {"instruction": "a", "input": "b" * 200_000, "output": "c"},
]
ROOT = Path(__file__).resolve().parents[1]


def values(path: Path) -> list[Any]:
    records = list(read_records(path))
    assert all(record.fault is None for record in records)
    return [record.value for record in records]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(RECORDS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue()


def test_all_kinds_give_the_same_records(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    assert values(write(tmp_path / "a.json", json.dumps(RECORDS))) == RECORDS
    assert values(write(tmp_path / "b.JSON", "\ufeff" + json.dumps(RECORDS, indent=2, ensure_ascii=False))) == RECORDS
    assert values(write(tmp_path / "a.jsonl", "\ufeff" + lines)) == RECORDS
    assert values(write(tmp_path / "b.jsonl", lines.replace("\n", "\r\n\n") + "\n")) == RECORDS
    assert values(write(tmp_path / "a.csv", as_csv(","))) == RECORDS
    assert values(write(tmp_path / "b.csv", "\ufeff" + as_csv("\t"))) == RECORDS
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == RECORDS


def test_parquet_holds_dialogues(tmp_path: Path) -> None:
    records = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 700
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=300)
    assert values(tmp_path / "a.parquet") == records


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(content=st.lists(json_values, max_size=5), indent=st.none() | st.just(1), chunk=st.integers(1, 40))
def test_a_json_list_is_read_in_pieces(content: list[Any], indent: int | None, chunk: int) -> None:
    for escaped in (True, False):
        text = io.StringIO(json.dumps(content, indent=indent, ensure_ascii=escaped))
        assert list(json_list(text, Path("a.json"), chunk=chunk)) == content


@settings(max_examples=300, deadline=None)
@given(content=st.lists(json_values, max_size=3), data=st.data(), chunk=st.integers(1, 40))
def test_any_damage_that_json_notices_is_noticed(content: list[Any], data: st.DataObject, chunk: int) -> None:
    text = json.dumps(content)
    at = data.draw(st.integers(0, len(text) - 1))
    broken = text[:at] + data.draw(st.sampled_from(["", "}", "]", ",", '"', "x", "\n"])) + text[at + 1 :]
    try:
        expected = json.loads(broken)
    except ValueError:
        expected = None
    if isinstance(expected, list):
        assert list(json_list(io.StringIO(broken), Path("a.json"), chunk=chunk)) == expected
    else:
        with pytest.raises(ValueError, match=r"^a.json, line \d+: not a valid .json data file: "):
            list(json_list(io.StringIO(broken), Path("a.json"), chunk=chunk))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"instruction": "a"}\n{"instruction": "b"}', r"line 1: .* not a list .* name it \.jsonl"),
        ("3", "line 1: .* not a list"),
        ("\n\n[{}\n {}]", "line 4: .*',' or ']' must stand before '{'"),
        ("[{},\n{},\n", "line 3: .* ends inside the list"),
        ('[{},\n{"a": "b', "line 2: .* ends inside a string"),
        ('[\n{"a": b}]', "line 2: .* Expecting value"),
        ("[{}]\n]", "line 2: .*']' stands after the list"),
        (b'["\xff"]', "line 1: .* not UTF-8"),
        ("[" + "[" * 100_000, "line 1: "),
        ("[" + "1" * 5000 + "]", "line 1: "),
    ],
)
def test_a_malformed_json_file(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=f"{path}, {message}") as raised:
        list(read_records(path))
    assert "\n" not in str(raised.value)


def test_an_early_fault_is_told_without_reading_on(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("w") as file:
        file.write('[{"a" 1},' + '{"a": 1},' * 1_000_000 + "{}]")
    with (tmp_path / "a.json").open() as file:
        with pytest.raises(ValueError, match="line 1"):
            list(json_list(file, Path("a.json"), chunk=1000))
        assert file.tell() < 100_000


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", '{}\n{"a": 1\n\n[]\n', {"line 2": "not valid JSON"}),
        ("a.jsonl", b'{}\n{"a": "\xff"}\n{}', {"line 2": "not UTF-8"}),
        ("a.jsonl", "[" * 100_000 + "\n" + "1" * 5000, {"line 1": "recursion", "line 2": "limit"}),
        ("a.csv", 'a,b\n"1\n1",2\n3\n4,5,6\n7,8\n', {"line 4": "1 fields, the header has 2", "line 5": "3 fields"}),
        ("a.csv", "a\tb\n1\n", {"line 2": "1 fields, the header has 2"}),
    ],
)
def test_a_bad_record_is_handed_on_with_its_fault(
    name: str, content: str | bytes, places: dict[str, str], tmp_path: Path
) -> None:
    records = list(read_records(write(tmp_path / name, content)))
    faults = {record.place: record.fault for record in records if record.fault}
    assert list(faults) == list(places)
    assert all(reason in str(faults[place]) for place, reason in places.items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'a,b\n1,"2\n3,4\n', r"a\.csv, line 2: not valid CSV"),
        ("a.csv", b"a,b\n\xff,2\n", r"a\.csv is not UTF-8"),
        ("a.csv", b"\xff,b\n1,2\n", r"a\.csv is not UTF-8"),
        ("a.csv", "instruction,output,output\na,b,c\n", r"a\.csv has two columns 'output': rename or remove one"),
        ("a.parquet", "PAR1 and nothing", r"a\.parquet is not a whole parquet file"),
        ("a.json", "", r"a\.json is empty"),
        ("a.txt", "a", r"a\.txt is of an unknown kind: take one of \.json, \.jsonl, \.csv, \.parquet"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid", r"a\.json is a Git LFS pointer"),
    ],
)
def test_a_file_that_cannot_be_read(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_records(write(tmp_path / name, content)))


def test_a_parquet_file_cut_off(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for length in (4, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match="not a whole parquet file"):
            list(read_records(write(tmp_path / "cut.parquet", whole[:length])))


def test_a_row_of_parquet_that_python_cannot_hold(tmp_path: Path) -> None:
    """The rows around it are read, and its fault is not taken for a damaged file."""
    names = pyarrow.array([b"a", b"\xff", b"c", b"d"]).view(pyarrow.string())
    dates = pyarrow.array([0, 0, 10**15, 0], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"a": names, "at": dates}), tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet"))
    assert [record.place for record in records] == [f"record {number}" for number in range(1, 5)]
    assert [record.value and record.value["a"] for record in records] == ["a", None, None, "d"]
    assert [record.fault and record.fault[:18] for record in records] == [None, *["it cannot be read "] * 2, None]
    assert "invalid start byte" in str(records[1].fault)


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    columns = [pyarrow.array([value]) for value in "abc"]
    table = pyarrow.Table.from_arrays(columns, names=["instruction", "output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has two columns 'output': rename or remove one"):
        list(read_records(tmp_path / "a.parquet"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accessory.data.readers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'accessory\[parquet\]'"):
        list(read_records(write(tmp_path / "a.parquet", "PAR1")))


def saved(folder: Path, records: list[Any], shards: int = 3, **settings: Any) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records, **settings).save_to_disk(folder, num_shards=shards)
    return folder


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "日本"}, {"from": "gpt", "value": None}]
    records = [{"conversations": turns, "id": number, "score": number / 7} for number in range(2000)]
    folder = saved(tmp_path / "a", records)
    assert values(folder) == list(datasets.load_from_disk(folder)) == records
    assert [record.place for record in read_records(folder)][-1] == "record 2000"
    assert data_files(folder) == [folder / f"data-0000{number}-of-00003.arrow" for number in range(3)]
    assert data_files(folder / "state.json") == [folder / "state.json"]
    chosen = datasets.load_from_disk(folder).select([1500, 3, 3])
    chosen.save_to_disk(tmp_path / "chosen")
    assert values(tmp_path / "chosen") == [records[1500], records[3], records[3]]


def test_the_order_of_a_saved_folder_is_that_of_its_state(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", [{"a": number} for number in range(3)])
    state = json.loads((folder / "state.json").read_text())
    files = [{"filename": f"/elsewhere/{entry['filename']}"} for entry in reversed(state["_data_files"])]
    write(folder / "state.json", json.dumps({**state, "_data_files": files}))
    assert values(folder) == [{"a": 2}, {"a": 1}, {"a": 0}]
    assert [file.name[:10] for file in data_files(folder)] == ["data-00002", "data-00001", "data-00000"]


def test_of_a_folder_with_splits_train_is_read(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("test", "train", "gen")}
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "all")
    assert values(tmp_path / "all") == [{"a": "train"}]
    assert values(tmp_path / "all" / "gen") == [{"a": "gen"}]
    datasets.DatasetDict(only=parts["test"]).save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == [{"a": "test"}]
    assert data_files(tmp_path / "one") == [tmp_path / "one" / "only" / "data-00000-of-00001.arrow"]
    del parts["train"]
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="none has no split train, but test, gen: name the folder of a split"):
        read_records(tmp_path / "none")


MIXED = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]},
    {"messages": [{"role": "user", "content": None}]},
]


def test_what_datasets_writes_as_json(tmp_path: Path) -> None:
    """A column whose values are of several types: `'"a"'` is read as "a"."""
    folder = saved(tmp_path / "a", MIXED, shards=2, on_mixed_types="use_json")
    assert values(folder) == MIXED
    datasets.load_from_disk(folder).to_parquet(tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == MIXED
    rows = pyarrow.array(["[1]", "[", None], pyarrow.json_())
    pyarrow.parquet.write_table(pyarrow.table({"a": rows}), tmp_path / "b.parquet")
    faults = [record.fault or record.value for record in read_records(tmp_path / "b.parquet")]
    assert [faults[0], faults[2]] == [{"a": [1]}, {"a": None}]
    assert str(faults[1]).startswith("it cannot be read (Expecting value")


def test_a_row_of_a_saved_folder_that_python_cannot_hold(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", [{"a": "b"}], shards=1)
    names = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    with pyarrow.OSFile(str(data_files(folder)[0]), "wb") as file:
        table = pyarrow.table({"a": names})
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    assert [record.fault is None for record in read_records(folder)] == [True, False, True]


def test_a_damaged_saved_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", [{"a": "b" * 999} for _ in range(30)])
    state, (_, shard, _) = (folder / "state.json").read_text(), data_files(folder)
    whole = shard.read_bytes()
    for length in (3, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        write(shard, whole[:length])
        with pytest.raises(ValueError, match=r"data-00001-of-00003\.arrow is cut off: copy its folder again"):
            read_records(folder)
    write(shard, b"nothing" + whole[-8:])
    with pytest.raises(ValueError, match=r"data-00001-of-00003\.arrow is not a whole Arrow file: download it again"):
        list(read_records(folder))
    write(shard, "version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(ValueError, match=r"data-00001-of-00003\.arrow is a Git LFS pointer"):
        read_records(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"state\.json lists data-00001-of-00003\.arrow, which is absent"):
        read_records(folder)
    for content in ("{", "[]", "[" * 10**5, '{"_data_files": 3}', '{"_data_files": [{}]}', b"\xff"):
        write(folder / "state.json", content)
        with pytest.raises(ValueError, match=r"state\.json is not what datasets writes: copy the folder again"):
            read_records(folder)
    for name in ("_indices_files", "_indices_data_files"):
        write(folder / "state.json", json.dumps({**json.loads(state), name: [{"filename": "indices.arrow"}]}))
        with pytest.raises(ValueError, match=r"state\.json lists _indices_files, of an old datasets: load it"):
            read_records(folder)


def test_a_saved_folder_without_records_or_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "a", [{"a": 1}], shards=1)
    datasets.load_from_disk(folder).select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty is empty: state\.json lists no data files"):
        read_records(tmp_path / "empty")
    monkeypatch.setattr(accessory.data.readers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a needs pyarrow: pip install 'accessory\[parquet\]'"):
        read_records(folder)


def test_a_saved_folder_in_a_config(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", [{"a": 1}], shards=1)
    assert read_data_config(config(tmp_path, f"META: [{{path: {folder}}}]")) == [Source(folder)]


def test_absent_files_and_folders(tmp_path: Path) -> None:
    for read in (read_records, data_files):
        with pytest.raises(FileNotFoundError, match=r"no data file .*a\.json"):
            read(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_records(tmp_path / "b.json")
    os.mkfifo(tmp_path / "c.json")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        read_records(tmp_path / "c.json")


def config(folder: Path, text: str) -> Path:
    return write(folder / "data.yaml", text)


def test_a_config_in_all_its_forms(tmp_path: Path) -> None:
    for name in ("a.json", "b.csv", "c.jsonl"):
        write(tmp_path / name, "[]")
    path = config(
        tmp_path,
        f"""
META:
  -
    path: '{tmp_path}/a.json'
    type: 'text'
  - path: {tmp_path}/b.csv
    ratio: 0.25
    preprocess: single_turn_llava
    prompt_type: None
  - ['{tmp_path}/c.jsonl', 'text']
  - path: {tmp_path}/c.jsonl
    preprocess:
    ratio: 1
""",
    )
    assert read_data_config(path) == [
        Source(tmp_path / "a.json"),
        Source(tmp_path / "b.csv", 0.25, "single_turn_llava", "None"),
        Source(tmp_path / "c.jsonl"),
        Source(tmp_path / "c.jsonl"),
    ]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the working folder, else from accessory/: so the shipped yaml works from there and from the root."""
    package = tmp_path / "accessory"
    for folder in (package, tmp_path / "data", tmp_path / "work" / "here"):
        folder.mkdir(parents=True)
    monkeypatch.setattr("accessory.data.sources._PACKAGE", package)
    path = config(tmp_path, "META: [{path: ../data/a.json}]")
    monkeypatch.chdir(tmp_path / "work" / "here")
    with pytest.raises(FileNotFoundError, match=rf"\.\./data/a\.json of {path} is absent: .*here.* nor .*accessory"):
        read_data_config(path)
    fallback = write(tmp_path / "data" / "a.json", "[]")
    assert read_data_config(path) == [Source(fallback)]
    (tmp_path / "work" / "data").mkdir()
    first = write(tmp_path / "work" / "data" / "a.json", "[]")
    assert read_data_config(path) == [Source(first)]


def test_a_link_says_what_kind_of_file_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub's cache has it: snapshots/main/a.json -> ../../blobs/5f3c."""
    for folder in ("blobs", "snapshots/main"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path / "blobs" / "5f3c", '[{"a": 1}]')
    link = tmp_path / "snapshots" / "main" / "a.json"
    link.symlink_to("../../blobs/5f3c")
    monkeypatch.chdir(tmp_path)
    (source,) = read_data_config(config(tmp_path, "META: [{path: snapshots/../snapshots/main/a.json}]"))
    assert source == Source(link)
    assert values(source.path) == [{"a": 1}]


def test_the_reference_pages_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "data/ultrachat_200k_train_sft.json", tmp_path / "data/evol-codealpaca-v1/wizardCode.json"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, "[]")
    (tmp_path / "accessory").mkdir()
    monkeypatch.chdir(tmp_path / "accessory")
    shipped = ROOT / "configs/data/finetune/sg/dialog_ultrachat200kWizardcode.yaml"
    assert read_data_config(shipped) == [Source(file) for file in files]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("META: [", "not valid YAML.* line 1"),
        ("META: !!python/object:os.system {}", "not valid YAML"),
        ("META:\n- path: a.json\n\tratio: 1", r"token, found character '\\t' .* at line 3, column 1: 'ratio: 1'$"),
        ("META:\n- path: é\n  ratio: 1: 2", "not allowed here at line 3, column 11: 'ratio: 1: 2'$"),
        ("META: \0", "#x0000: special characters are not allowed at position 6$"),
        (b"\xff\xfe\xff", "not valid YAML"),
        ("META: [{path: a.json}]\nMETA: [{path: b.json}]", "not valid YAML: 'META' stands there twice .*line 2"),
        ("META:\n- path: a.json\n  path: b.json", "not valid YAML: 'path' stands there twice .*line 3, column 3"),
        ("META: " + "[" * 5000, "not valid YAML: .*recursion"),
        ("META: [{path: a.json, ratio: 2020-99-99}]", "not valid YAML: month must be in 1..12"),
        ("META: [{path: a.json, ratio: !!int half}]", "not valid YAML: .*'half'"),
        ("META: [{path: a.json, ratio: !!bool half}]", "not valid YAML: 'half'"),
        ("META: [{path: a.json, ratio: !!timestamp half}]", "not valid YAML: "),
        ("", "has no META"),
        ("[a]", "has no META"),
        ("META: []", r"META of .* is \[\]: give a list"),
        ("META: {path: a.json}", "give a list"),
        ("{META: [{path: a.json}], seed: 3}", "key 'seed' is unknown"),
        ("META: [a.json]", "entry 1 of META is 'a.json': give a mapping"),
        (
            "META: [{path: a.json}, {path: a.json, ration: 0.5}]",
            r"entry 2 of META: key 'ration' is unknown \(did you mean ratio\?\)",
        ),
        ("META: [{type: text}]", "entry 1 of META has no path"),
        ("META: [{path: 3}]", "has no path"),
        ("META: [{path: a.json, type: image_text}]", "type 'image_text': only 'text'.* images are not supported"),
        ("META: [[a.json, image_text]]", "images are not supported"),
        ("META: [{path: a.json, ratio: 0}]", "ratio 0: give a share over 0 and up to 1"),
        ("META: [{path: a.json, ratio: 1.5}]", "ratio 1.5"),
        ("META: [{path: a.json, ratio: true}]", "ratio True"),
        ("META: [{path: a.json, ratio: half}]", "ratio 'half'"),
        ("META: [{path: a.json, ratio: .nan}]", "ratio nan"),
        ("META: [{path: a.json, preprocess: caption}]", "preprocess 'caption' is unknown: choose from alpaca, single"),
        ("META: [{path: a.json, preprocess: [a]}]", "preprocess"),
        ("META: [{path: a.json, prompt_type: vicuna}]", "prompt_type 'vicuna' is unknown: choose from alpaca, None, "),
        ("META: [{path: empty.json}]", "empty.json is empty"),
    ],
)
def test_a_bad_config_is_named(
    text: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", "[]")
    write(tmp_path / "empty.json", "")
    path = write(tmp_path / "data.yaml", text)
    with pytest.raises(ValueError, match=message) as raised:
        read_data_config(path)
    assert ("data.yaml" in str(raised.value)) != ("empty" in message)
    assert "\n" not in str(raised.value)
    assert "byte string" not in str(raised.value)


def test_a_data_file_in_the_place_of_the_config(tmp_path: Path) -> None:
    """It may have gigabytes, of which YAML would take hours to say that they have no META."""
    path = write(tmp_path / "a.json", json.dumps([{"instruction": "a" * 1000}] * 1100))
    with pytest.raises(ValueError, match=r"a\.json has 1,123,100 bytes and is no data yaml: list it in one"):
        read_data_config(path)


def test_a_key_in_two_entries_and_a_merged_one_stand_once(tmp_path: Path) -> None:
    write(tmp_path / "a.json", "[]")
    text = f"META: [&first {{path: {tmp_path}/a.json, ratio: 1}}, {{<<: *first, ratio: 0.5}}]"
    assert read_data_config(config(tmp_path, text)) == [
        Source(tmp_path / "a.json"),
        Source(tmp_path / "a.json", 0.5),
    ]


def test_the_home_of_an_unknown_user(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the data file ~nobody_at_all/a\.json of .* is absent"):
        read_data_config(config(tmp_path, "META: [{path: ~nobody_at_all/a.json}]"))


def test_an_absent_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data yaml .*absent\.yaml: check the path"):
        read_data_config(tmp_path / "absent.yaml")
