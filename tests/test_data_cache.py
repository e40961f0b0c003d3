"""Data tokenised once: what is in the cache, who writes it, and when it is made again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mistral_common
import numpy as np
import pytest

from accessory import files, progress
from accessory.data import cache
from accessory.data.cache import load_finetune_data
from accessory.data.examples import Ids, Recipe
from accessory.data.finetune_data import FinetuneData, is_complete
from accessory.data.sources import Source
from accessory.gguf_header import header_bytes
from accessory.text.chat import Segment
from accessory.text.forms import DefaultForm, MistralForm
from accessory.text.gguf import text_metadata
from accessory.text.instruction import format_prompt
from accessory.text.template import TemplateForm
from accessory.text.tokenizer import Tokenizer

MODELS = Path(mistral_common.__file__).parent / "data"
ALPACA = [{"instruction": f"Count to {n}.", "input": "", "output": "1, 2 " * n} for n in range(1, 9)]
CHATS = [
    {"conversations": [{"from": "human", "value": f"Is {n} even?"}, {"from": "gpt", "value": "No. " * n}]}
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODELS / "tokenizer.model.v1")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ACCESSORY_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, though a program of another test may have taken its records to itself."""
    package = logging.getLogger("accessory")
    before, package.propagate = package.propagate, True
    with caplog.at_level(logging.INFO, logger="accessory"):
        yield caplog
    package.propagate = before


def config(folder: Path, *entries: dict[str, Any], name: str = "data.yaml") -> Path:
    path = folder / name
    path.write_text(json.dumps({"META": list(entries)}))  # JSON is YAML
    return path


def data_file(folder: Path, records: Any, name: str = "a.json") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records))
    return path


def load(folder: Path, records: Any, tokenizer: Tokenizer, **settings: Any) -> FinetuneData:
    """The data of one file."""
    path = data_file(folder, records, settings.pop("name", "a.json"))
    settings = {"dialog": False, "max_words": 512, "progress": False, **settings}
    return load_finetune_data(config(folder, {"path": str(path)}), tokenizer, **settings)


def folders(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.is_dir())


def test_without_a_terminal_progress_is_said_in_lines(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with caplog.at_level(logging.INFO, logger="accessory.progress"):
        load(tmp_path, ALPACA, tokenizer, progress=True)
    said = [record.getMessage() for record in caplog.records if record.name == "accessory.progress"]
    counts = [re.split(r"[,;] | in ", line)[0] for line in said]
    assert counts[:8] == [f"checking a.json: {n} records" for n in range(1, 9)]
    assert counts[9:-1] == [f"tokenising a.json: {n} of 8 records" for n in range(1, 8)]
    monkeypatch.setattr(progress, "INTERVAL", 3600.0)
    caplog.clear()
    load(tmp_path, ALPACA[:7], tokenizer, progress=True)
    assert not [record for record in caplog.records if record.name == "accessory.progress"]


@pytest.mark.parametrize("dialog", [False, True])
def test_the_examples_are_those_of_the_records(dialog: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    records: list[Any] = CHATS if dialog else ALPACA
    data = load(tmp_path, records, tokenizer, dialog=dialog, max_words=80)
    assert len(data) == len(records) == len(data.lengths)
    recipe = Recipe(tokenizer, 80, dialog)
    for index, record in enumerate(records):
        (part,), _ = recipe.read(record, Source(tmp_path))
        tokens, labels, _ = recipe.encode(part)
        assert data[index][0].tolist() == tokens.tolist()
        assert data[index][1].tolist() == labels.tolist()
        assert data.lengths[index] == len(tokens)
    assert data[0][0].dtype == np.uint16
    assert data[-1][0].tolist() == data[len(data) - 1][0].tolist()
    assert data[np.int64(3)][0].tolist() == data[3][0].tolist()
    with pytest.raises(IndexError):
        data[len(records)]
    with pytest.raises(ValueError, match="read-only"):
        data[0][0][0] = 3
    other = pickle.loads(pickle.dumps(data))
    assert other[2][1].tolist() == data[2][1].tolist()
    assert len(pickle.dumps(data)) < 1000


def test_several_sources_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = data_file(tmp_path, ALPACA), data_file(tmp_path, ALPACA[:3], "b.jsonl")
    path = config(tmp_path, {"path": str(first)}, {"path": str(second), "prompt_type": "None"})
    data = load_finetune_data(path, tokenizer, dialog=False, max_words=512, progress=False)
    assert len(data) == 11
    assert tokenizer.decode(data[8][0].tolist()) == "Count to 1.1, 2 "
    assert [report.examples for report in data.reports] == [8, 3]
    assert sum(report.tokens for report in data.reports) == sum(data.lengths)


def test_a_large_vocabulary_takes_int32(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "n_words", 70_000)
    data = load(tmp_path, ALPACA, tokenizer)
    assert data[0][0].dtype == np.int32
    prompt = tokenizer.encode(format_prompt(ALPACA[0]), bos=True, eos=False)
    assert data[0][0].tolist() == [*prompt, *tokenizer.cont(ALPACA[0]["output"]), tokenizer.eos_id]


def test_a_ratio_is_a_share_drawn_by_seed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"instruction": "a", "output": str(n)} for n in range(200)]
    path = config(tmp_path, {"path": str(data_file(tmp_path, records)), "ratio": 0.25, "prompt_type": "None"})

    def drawn(seed: int) -> list[int]:
        data = load_finetune_data(path, tokenizer, dialog=False, max_words=99, seed=seed, progress=False)
        return [int(tokenizer.decode(data[i][0].tolist())[1:]) for i in range(len(data))]

    assert len(drawn(0)) == len(set(drawn(0))) == 50
    assert drawn(0) == sorted(drawn(0)) == drawn(0)
    assert drawn(0) != drawn(1)


def test_the_second_call_maps_what_the_first_wrote(
    tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, log: Any
) -> None:
    first = load(tmp_path, ALPACA, tokenizer)
    assert f"{tmp_path}/a.json: 8 examples, {sum(first.lengths):,} tokens" in log.text
    monkeypatch.setattr(Recipe, "read", None)  # calling it would fail
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    again = load(moved, ALPACA, tokenizer)
    assert again.folder == first.folder
    assert again.reports[0].path == f"{moved}/a.json"
    assert len(folders(cache_dir)) == 1
    assert not list(cache_dir.glob("*.tmp"))


def test_what_the_examples_depend_on_makes_another_cache(tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path) -> None:
    path, chats = str(data_file(tmp_path, ALPACA)), str(data_file(tmp_path, CHATS, "chats.json"))
    template = "{{ bos_token }}{% for one in messages %}[{{ one.role }}]{{ one.content }}{{ eos_token }}{% endfor %}"
    others = TemplateForm(tokenizer, template, "a"), TemplateForm(tokenizer, template.replace("[", "("), "a")
    plain = {"max_words": 512, "progress": False}
    calls: list[tuple[dict[str, Any], Tokenizer, dict[str, Any]]] = [
        ({"path": path}, tokenizer, {}),
        ({"path": chats}, tokenizer, {}),
        ({"path": chats}, tokenizer, {"dialog": True}),
        ({"path": path}, tokenizer, {"max_words": 100}),
        ({"path": path}, Tokenizer(MODELS / "mistral_instruct_tokenizer_240216.model.v2"), {}),
        ({"path": path, "prompt_type": "shortqa"}, tokenizer, {}),
        ({"path": chats, "preprocess": "single_turn_llava"}, tokenizer, {}),
        ({"path": path, "ratio": 0.5}, tokenizer, {}),
        ({"path": path, "ratio": 0.5}, tokenizer, {"seed": 1}),
        ({"path": path}, tokenizer, {"ignore_fields": ["input"]}),
        *[({"path": path}, tokenizer, {"form": form}) for form in (DefaultForm(tokenizer), MistralForm(tokenizer))],
        *[({"path": path}, tokenizer, {"form": form}) for form in others],
    ]
    for number, (entry, chosen, settings) in enumerate(calls, start=1):
        load_finetune_data(config(tmp_path, entry), chosen, **{**plain, **settings})
        assert len(folders(cache_dir)) == number
    # Without a ratio the seed draws nothing, in a dialogue the prompt has no place, and a template's name says nothing.
    load_finetune_data(config(tmp_path, {"path": path}), tokenizer, seed=5, **plain)
    load_finetune_data(config(tmp_path, {"path": chats, "prompt_type": "qg"}), tokenizer, dialog=True, **plain)
    renamed = TemplateForm(tokenizer, template, "b")
    load_finetune_data(config(tmp_path, {"path": path}), tokenizer, form=renamed, **plain)
    assert len(folders(cache_dir)) == len(calls)
    # One byte of the data, at the same size and time.
    stat = Path(path).stat()
    Path(path).write_text(Path(path).read_text().replace("Count to 1", "Count to 7"))
    cache.os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Path(path).stat().st_size == stat.st_size
    data = load_finetune_data(config(tmp_path, {"path": path}), tokenizer, **plain)
    assert "Count to 7" in tokenizer.decode(data[0][0].tolist())
    assert len(folders(cache_dir)) == len(calls) + 1


def test_of_a_gguf_file_the_tokenizer_counts_alone(
    tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gigabytes of weights beside it are not read."""
    read: list[str] = []
    digest = cache._digest
    monkeypatch.setattr(cache, "_digest", lambda path: [read.append(path.suffix), digest(path)][1])
    values = text_metadata(tokenizer, {}, tokenizer.n_words)
    for weights, changes, expected in (
        (b"a" * 64, {}, 1),
        (b"b" * 64, {"general.name": "trained further"}, 1),
        (b"b" * 64, {"tokenizer.ggml.eos_token_id": 1000}, 2),
    ):
        header, _ = header_bytes(values | changes, {"output.weight": ((16,), 0, 64)})
        (tmp_path / "model.gguf").write_bytes(header + weights)
        load(tmp_path, ALPACA, Tokenizer(tmp_path / "model.gguf"))
        assert len(folders(cache_dir)) == expected
    assert set(read) == {".json"}


def test_a_template_that_writes_the_day_makes_a_cache_of_each_day(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "{{ bos_token }}{% for one in messages %}[{{ one.role }}]{{ one.content }}{{ eos_token }}{% endfor %}"
    dated = TemplateForm(tokenizer, "{{ strftime_now('%Y') }}" + plain, "a")
    found: dict[str, list[Path]] = {}
    for day in ("2024-12-31", "2025-01-01", "2025-01-01"):
        monkeypatch.setattr(cache, "date", SimpleNamespace(today=lambda day=day: date.fromisoformat(day)))
        for name, form in (("dated", dated), ("plain", TemplateForm(tokenizer, plain, "b"))):
            found.setdefault(name, []).append(load(tmp_path, ALPACA, tokenizer, form=form).folder)
    first, second, again = found["dated"]
    assert first != second == again
    assert len(set(found["plain"])) == 1


@pytest.mark.parametrize("damage", ["tokens.bin", "labels.bin", "offsets.bin", "meta.json", "folder"])
def test_half_a_cache_is_made_again(damage: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = load(tmp_path, ALPACA, tokenizer)
    expected = [whole[i][1].tolist() for i in range(len(whole))]
    folder = whole.folder
    del whole
    if damage == "folder":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        content = (folder / damage).read_bytes()
        (folder / damage).write_bytes(content[:-1])
    left, theirs = (folder.with_name(f"{folder.name}.{host}-1.tmp") for host in (socket.gethostname(), "another"))
    for half in (left, theirs):
        half.mkdir()
        (half / "tokens.bin").write_bytes(b"a")
    assert not is_complete(folder)
    with pytest.raises(ValueError, match="not a whole data cache"):
        FinetuneData(folder)
    again = load(tmp_path, ALPACA, tokenizer)
    assert [again[i][1].tolist() for i in range(len(again))] == expected
    assert not left.exists()
    assert theirs.exists(), "a host that locks for itself alone may be writing it"


def test_a_failure_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_flush", full)
    with pytest.raises(
        OSError, match=rf"cannot write the data cache in {cache_dir} .*No space left.*ACCESSORY_DATA_CACHE"
    ):
        load(tmp_path, ALPACA, tokenizer)
    assert folders(cache_dir) == []


def test_data_that_change_while_they_are_tokenised(
    tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their cache would carry the digest of what they were before."""
    path = data_file(tmp_path, ALPACA)
    check = cache.check_source

    def changed_first(*given: Any, **settings: Any) -> Any:
        path.write_text(path.read_text().replace("Count", "Weigh"))  # of the same size
        return check(*given, **settings)

    monkeypatch.setattr(cache, "check_source", changed_first)
    with pytest.raises(
        ValueError, match=rf"the data, or the day, changed while they were tokenised \({path}\): start again"
    ):
        load(tmp_path, ALPACA, tokenizer)
    assert not folders(cache_dir)


def test_a_cache_folder_that_cannot_be(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the data cache in .*file"):
        load(tmp_path, ALPACA, tokenizer, cache_dir=tmp_path / "file")


def _load_in_process(arguments: tuple[Path, Path]) -> tuple[int, bool]:
    """How many examples another process found, and whether it wrote them."""
    path, cache_dir = arguments
    wrote = []
    encode = Recipe.encode

    def counted(recipe: Recipe, segments: Sequence[Segment]) -> tuple[Ids, Ids, bool]:
        wrote.append(1)
        return encode(recipe, segments)

    Recipe.encode = counted  # type: ignore[method-assign]
    tokenizer = Tokenizer(MODELS / "tokenizer.model.v1")
    settings: dict[str, Any] = {"max_words": 512, "progress": False, "cache_dir": cache_dir}
    data = load_finetune_data(path, tokenizer, dialog=False, **settings)
    return len(data), bool(wrote)


def test_of_several_processes_one_writes(tmp_path: Path, cache_dir: Path) -> None:
    records = [{"instruction": "Count.", "output": "1 2 3 " * 50}] * 2000
    path = config(tmp_path, {"path": str(data_file(tmp_path, records))})
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_load_in_process, [(path, cache_dir)] * 3, chunksize=1)
    assert [count for count, _ in found] == [2000] * 3
    assert sum(wrote for _, wrote in found) == 1
    assert len(folders(cache_dir)) == 1


def test_without_locks_the_last_one_wins(
    tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    flush = cache._flush

    def slow(file: Any) -> None:
        """Another process finishes first."""
        if not folders_of_key() and file.name.endswith("meta.json"):
            flush(file)
            shutil.copytree(Path(file.name).parent, Path(file.name).parent.parent / key())
        flush(file)

    def key() -> str:
        return next(cache_dir.glob("*.tmp")).name.split(".")[0]

    def folders_of_key() -> list[Path]:
        return [path for path in cache_dir.iterdir() if path.is_dir() and path.suffix != ".tmp"]

    monkeypatch.setattr(cache, "_flush", slow)
    assert len(load(tmp_path, ALPACA, tokenizer)) == 8
    assert len(folders(cache_dir)) == 1


BAD = [ALPACA[0], {"instruction": "a"}, ALPACA[1], 3, {"instruction": "a", "output": "\ud800"}, ALPACA[2]]


def test_a_bad_record_stops_before_any_tokenising(
    tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recipe, "encode", None)
    good = data_file(tmp_path, ALPACA, "good.json")
    for name, place in (("a.json", "record 2"), ("a.jsonl", "line 2")):
        bad = data_file(tmp_path, BAD, name)
        path = config(tmp_path, {"path": str(good)}, {"path": str(bad)})
        with pytest.raises(ValueError, match=rf"bad record in {bad}, {place}: .*\['instruction'\].*--skip_bad_records"):
            load_finetune_data(path, tokenizer, dialog=False, max_words=512, progress=False)
    assert folders(cache_dir) == []


def test_skipped_records_are_counted_and_listed(tokenizer: Tokenizer, tmp_path: Path, log: Any) -> None:
    data = load(tmp_path, BAD, tokenizer, skip_bad_records=True)
    assert len(data) == 3
    assert tokenizer.decode(data[1][0].tolist()) == format_prompt(ALPACA[1]) + ALPACA[1]["output"]
    assert (data.reports[0].usable, data.reports[0].bad) == (3, 3)
    for line in ("a.json: 3 bad records are left out", "record 2: ", "record 4: it is 3", "record 5: it holds a lone"):
        assert line in log.text
    log.clear()
    load(tmp_path, BAD, tokenizer, skip_bad_records=True)
    assert "3 bad records are left out" in log.text  # from the cache too
    with pytest.raises(ValueError, match=r"bad record in .*a\.json, record 2: "):
        load(tmp_path, BAD, tokenizer)
    load(tmp_path, [*ALPACA, *[3] * 20], tokenizer, skip_bad_records=True)
    assert "record 13: it is 3" in log.text
    assert "record 14: it is 3" not in log.text
    assert "and 15 more" in log.text


def test_records_without_an_answer_are_left_out(tokenizer: Tokenizer, tmp_path: Path, log: Any) -> None:
    asked = {"conversations": [{"from": "human", "value": "Anybody?"}]}
    silent = {"conversations": [{"from": "human", "value": "Anybody?"}, {"from": "gpt", "value": " \n"}]}
    data = load(tmp_path, [asked, *CHATS[:2], silent], tokenizer, dialog=True)
    assert (len(data), data.reports[0].unanswered) == (2, 2)
    assert "2 records without an answer to learn are left out" in log.text
    for records in ([asked, silent], [silent]):
        with pytest.raises(ValueError, match=r"a\.json holds no record to learn from \(0 bad records, . without an"):
            load(tmp_path, records, tokenizer, dialog=True)
    with pytest.raises(ValueError, match="holds no record to learn from"):
        load(tmp_path, [{"instruction": "a", "output": ""}], tokenizer)
    with pytest.raises(ValueError, match=r"1 bad records, 0 without an answer; the first bad one: record 1: it is 3"):
        load(tmp_path, [3], tokenizer, skip_bad_records=True)


def test_an_input_that_the_prompt_leaves_out_is_told_once(tokenizer: Tokenizer, tmp_path: Path, log: Any) -> None:
    records = [*ALPACA, *({**one, "input": "In French."} for one in ALPACA[:3]), {**ALPACA[0], "input": " \n"}]
    path = data_file(tmp_path, records)
    for kind, count in (("qg", 3), ("shortqa", 3), ("None", 3), ("alpaca", 0)):
        log.clear()
        config(tmp_path, {"path": str(path), "prompt_type": kind})
        data = load_finetune_data(tmp_path / "data.yaml", tokenizer, max_words=512, progress=False)
        told = f"{path}: the input of {count} records is left out by their prompt_type"
        assert [r.levelname for r in log.records if r.getMessage() == told] == ["WARNING"] * bool(count)
        assert ("the input of" in log.text) == bool(count)
        assert data.reports[0].uninput == count
    config(tmp_path, {"path": str(path), "prompt_type": "qg"})
    for settings in ({"form": DefaultForm(tokenizer)}, {"ignore_fields": ["input"]}):  # it is said; it is not wanted
        data = load_finetune_data(tmp_path / "data.yaml", tokenizer, max_words=512, progress=False, **settings)
        assert data.reports[0].uninput == 0


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n\n"), ("a.csv", "instruction,output\n")]
)
def test_a_file_without_records(name: str, content: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    path = config(tmp_path, {"path": str(tmp_path / name)})
    with pytest.raises(ValueError, match=f"{name} holds no record to learn from"):
        load_finetune_data(path, tokenizer, dialog=False, max_words=512, progress=False)


def test_answers_that_max_words_cuts_off(tokenizer: Tokenizer, tmp_path: Path, log: Any) -> None:
    long = {"instruction": "Why? " * 100, "output": "So."}
    data = load(tmp_path, [long, *ALPACA], tokenizer, max_words=60)
    assert (len(data), data.reports[0].emptied, data.reports[0].cut) == (8, 1, sum(data.lengths == 60))
    assert all(np.any(data[i][1]) for i in range(len(data)))
    assert "1 examples with no answer within --max_words 60 are left out" in log.text
    assert f"{data.reports[0].cut} examples are cut at --max_words 60" in log.text
    with pytest.raises(ValueError, match=r"no example of .*a\.json has an answer within its first 60 tokens: raise"):
        load(tmp_path, [long], tokenizer, max_words=60)


@pytest.mark.parametrize("max_words", [1, 0, -3, 2.5, True])
def test_max_words_must_be_a_count(max_words: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max_words"):
        load(tmp_path, ALPACA, tokenizer, max_words=max_words)


def test_images_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record 2: it has 'a\.jpg' under 'image': only text can be trained on"):
        load(tmp_path, [{**ALPACA[0], "image": None}, {**ALPACA[0], "image": "a.jpg"}], tokenizer)


def test_settings_without_effect_are_told(tokenizer: Tokenizer, tmp_path: Path, log: Any) -> None:
    for entry in ({"prompt_type": "None"}, {"preprocess": "single_turn_llava"}):
        log.clear()
        path = config(tmp_path, {"path": str(data_file(tmp_path, CHATS)), **entry})
        data = load_finetune_data(path, tokenizer, dialog=True, max_words=512, progress=False)
        assert "preprocess and prompt_type have no effect on dialogues" in log.text
        assert data.prompt_form == DefaultForm(tokenizer).recorded()


def test_the_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache._cache_dir(None) == tmp_path / "cache"
    monkeypatch.delenv("ACCESSORY_DATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache._cache_dir(None) == Path("/x/accessory/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache._cache_dir(None) == Path("/h/.cache/accessory/data")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container may have it: no HOME, and none in the system's list of users."""
    for name in ("ACCESSORY_DATA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"no home folder .*: name a folder in \$ACCESSORY_DATA_CACHE"):
        cache._cache_dir(None)


CURED = ", or pass --skip_bad_records to leave such records out"
ALONE = " (no record near it is usable)"
UNSHAPED = {"question": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("records", "settings", "place", "says"),
    [
        # Of one record among others leaving it out is a way; where all are so the cure is another.
        ([*ALPACA, UNSHAPED], {}, "record 9", "give its fields the names of one of these shapes" + CURED),
        ([UNSHAPED, *[3] * 50, ALPACA[0]], {}, "record 1", "give its fields the names of one of these shapes" + CURED),
        ([UNSHAPED] * 3, {}, "record 1", "give its fields the names of one of these shapes"),
        ([3], {}, "record 1", "give its fields the names of one of these shapes"),
        (ALPACA, {"dialog": True}, "record 1", "is read without --dialog; leave --dialog out"),
        ([*CHATS, ALPACA[0]], {"dialog": True}, "record 9", "leave --dialog out" + CURED),
        ([{**ALPACA[0], "output": 3}, *ALPACA], {}, "record 1", "3 under 'output', not a string; correct it" + CURED),
        ([{**ALPACA[0], "output": 3}], {}, "record 1", "3 under 'output', not a string; correct it" + ALONE),
    ],
)
def test_a_bad_record_is_told_with_its_cure(
    records: list[Any], settings: dict[str, Any], place: str, says: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^bad record in {tmp_path}/\S+, {place}: .*{re.escape(says)}$"):
        load(tmp_path, records, tokenizer, **settings)


@pytest.mark.parametrize(
    ("records", "settings", "cure"),
    [
        (ALPACA, {"dialog": True}, "leave --dialog out"),
        ([UNSHAPED], {}, "give its fields the names of one of these shapes"),
        ([{**ALPACA[0], "output": 3}], {}, "correct it"),
        ([{**ALPACA[0], "output": ""}], {}, "correct it"),
    ],
)
def test_a_file_of_bad_records_alone_is_told_with_the_cure_of_the_first(
    records: list[Any], settings: dict[str, Any], cure: str, tokenizer: Tokenizer, tmp_path: Path, cache_dir: Path
) -> None:
    with pytest.raises(ValueError, match=rf"holds no record to learn from \(.*\): {re.escape(cure)}$"):
        load(tmp_path, records, tokenizer, skip_bad_records=True, **settings)
    assert list(cache_dir.iterdir()) == [], "no lock either"
