"""Files and folders as they are written: one writer at a time, nothing left by killed ones, one mode by umask."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_tensors, small_config
from finetuning import Setting, finetune_on_rank, make_setting
from patience import PATIENCE
from ranks import RankPool, error_of

from accessory.checkpoint.adapter_export import export_adapter
from accessory.checkpoint.containers import save_archive
from accessory.checkpoint.convert import split
from accessory.checkpoint.manifest import check_manifest
from accessory.checkpoint.merge import merge
from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.config import QuantArgs
from accessory.files import HOST, check_writable, growing, locked, new_folder, replacing, write_json
from accessory.log import setup_logging
from accessory.tools import prepare_data
from accessory.train.export import drop_older_models
from accessory.train.output_folder import held
from accessory.train.shelf import Shelf

# --- killed writers, and living ones

# Writes a folder or a file; is killed by itself at a point of it, or says where it is and waits for a word.
WRITER = """
import os, signal, sys
from pathlib import Path
from accessory import files

kind, target, point = sys.argv[1:]

def reached(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)
    if point == f"wait {name}":
        print(name, flush=True)
        sys.stdin.readline()

sync = files.sync
files.sync = lambda path: (reached("sync"), sync(path))
try:
    with getattr(files, kind)(Path(target)) as aside:
        reached("begin")
        (aside / "one" if kind == "new_folder" else aside).write_text("x" * 1000)
        reached("filled")
    print("wrote")
except OSError as error:
    print("refused", error)
"""


def writer(kind: str, target: Path, point: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, kind, str(target), point]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("kind", ["new_folder", "replacing"])
def test_what_killed_writers_left_is_removed_by_the_next(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out [1]"  # a name that means something to glob
    names = ("x", "draft", "7", "2.5", "mine.77", "draft-2", "another-7", f"mine.{HOST}-7", f"{HOST}-7.x", f"{HOST}-")
    others = {tmp_path / f".out [1].{name}.tmp" for name in names}
    for other in others:
        other.mkdir() if kind == "new_folder" else other.touch()
    for point in ("begin", "filled", "sync"):
        with writer(kind, target, point) as killed:
            assert killed.wait() == -signal.SIGKILL
        left = {path.suffix for path in tmp_path.iterdir() if path not in others}
        assert left == ({".tmp", ".lock"} if kind == "new_folder" else {".tmp"})
        with {"new_folder": new_folder, "replacing": replacing}[kind](target) as aside:
            (aside / "one" if kind == "new_folder" else aside).write_text("whole")
        assert {*tmp_path.iterdir()} == {target, *others}, "what has another name is nobody's leftover"
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def test_a_second_writer_of_a_folder_says_so(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with writer("new_folder", target, "wait filled") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "filled\n"
        there = sorted(tmp_path.rglob("*"))
        with pytest.raises(OSError, match=f"another process is writing {target}: wait for it, or choose another"):
            new_folder(target).__enter__()
        assert sorted(tmp_path.rglob("*")) == there
        assert first.communicate("\n")[0] == "wrote\n"
    assert sorted(path.name for path in target.parent.iterdir()) == ["out"]
    assert (target / "one").read_text() == "x" * 1000


def test_a_living_writer_of_a_file_is_left_alone(tmp_path: Path) -> None:
    with writer("replacing", tmp_path / "out", "wait filled") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "filled\n"
        write_json(tmp_path / "out", {"a": 1})
        assert len(list(tmp_path.iterdir())) == 2
        assert first.communicate("\n")[0] == "wrote\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "x" * 1000, "the last one rules"


def test_of_writers_that_begin_together_one_wins(tmp_path: Path) -> None:
    writers = [writer("new_folder", tmp_path / "out") for _ in range(5)]
    said = [one.communicate(timeout=PATIENCE)[0] for one in writers]
    assert said.count("wrote\n") == 1
    assert all("another process is writing" in text or "exists already" in text for text in said if text != "wrote\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_file_that_is_removed_locks_all_the_same(tmp_path: Path) -> None:
    """Whoever waits for a lock file that its holder removes takes the next one of that name."""
    path, held = tmp_path / "lock", []
    with locked(path, remove=True):
        child = subprocess.Popen(
            [sys.executable, "-c", LOCKER, str(path)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "waits\n"
    with child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), locked(path, patience=0):
            held.append(path)
        child.communicate("\n")
    assert held == list(tmp_path.iterdir()) == []


LOCKER = """
import sys
from pathlib import Path
from accessory.files import locked
with locked(Path(sys.argv[1]), on_wait=lambda: print("waits", flush=True), remove=True):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_without_locks_leftovers_are_only_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlockable(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = [tmp_path / f".out.{HOST}-{number}.tmp" for number in (77, os.getpid())]
    for folder in left:
        folder.mkdir()
    (file := tmp_path / f".file.{HOST}-77.tmp").touch()
    monkeypatch.setattr(fcntl, "flock", unlockable)
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    with new_folder(tmp_path / "out") as aside:
        write_json(aside / "a", {})
    write_json(tmp_path / "file", {})
    assert {*tmp_path.iterdir()} == {*left, file, tmp_path / "out", tmp_path / "file"}
    assert caplog.text.count("was left by an interrupted run: remove it if none is writing it now") == 2


def test_what_another_host_may_be_writing_is_only_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / ".out.gpu-07-cluster-77.tmp").mkdir()
    (file := tmp_path / ".file.gpu-07-cluster-77.tmp").touch()
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    with new_folder(tmp_path / "out"):
        pass
    write_json(tmp_path / "file", {})
    assert {*tmp_path.iterdir()} == {folder, file, tmp_path / "out", tmp_path / "file"}
    (said,) = caplog.messages
    assert said.startswith(f"{folder} was left by an interrupted run: remove it if none is writing it now")


def test_a_run_removes_of_its_folder_what_is_its_own_alone(tmp_path: Path) -> None:
    """Other commands write into it at the same time, and users have hidden files and folders there."""
    states = tmp_path / "checkpoints"
    left = [tmp_path / f".{name}" for name in ("epoch1.exporting", "epoch0-iter4.replaced", "epoch12.dropped")]
    left += [states / ".step-00000004.tmp-0a1b2c3d"]
    kept = [tmp_path / f".{name}" for name in ("mine.dropped", "epoch-best.dropped", "epoch1.mine.exporting")]
    kept += [tmp_path / ".mine.tmp-0a1b2c3d", states / ".mine.tmp-old", states / ".mine.dropped"]
    for folder in (*left, *kept):
        folder.mkdir(parents=True)
        (folder / "one").touch()
    for place, name in ((tmp_path, "options.json"), (tmp_path, "log.jsonl"), (tmp_path, "experts.png")):
        left.append(place / f".{name}.{HOST}-77.tmp")
        left[-1].touch()
    left.append(states / f".latest.{HOST}-77.1.tmp")
    left[-1].touch()
    kept += [tmp_path / f".{name}.tmp" for name in ("notes.7", "options.json.draft", f"answers.jsonl.{HOST}-77")]
    for file in kept[6:]:
        file.touch()
    with writer("replacing", tmp_path / "answers", "wait filled") as file_writer:
        with writer("new_folder", tmp_path / "merged", "wait filled") as folder_writer:
            for process in (file_writer, folder_writer):
                assert process.stdout is not None
                assert process.stdout.readline() == "filled\n"
            with held(tmp_path):
                assert [path for path in left if path.exists()] == []
                drop_older_models(tmp_path / "epoch3", keep_last=1)
                shelf = Shelf(states)
                aside, final = shelf.aside("step-00000005")
                write_json(aside / Shelf.INDEX, {"files": {}})
                shelf.publish(aside, final, keep_last=1)
            setup_logging(0)
            assert folder_writer.communicate("\n")[0] == "wrote\n"
        assert file_writer.communicate("\n")[0] == "wrote\n"
    assert [path for path in kept if not path.exists()] == []


# --- links, and what is no plain file


@pytest.mark.parametrize("way", [replacing, growing], ids=["replacing", "growing"])
def test_links_stay_and_what_is_no_plain_file_is_written_through(way: Any, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        check_writable(path)
        with way(path) as to:
            to.write_text("new") if way is replacing else to.write("new")

    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "old").write_text("old")
    for target in ("old", "absent"):
        link = tmp_path / f"to {target}"
        link.symlink_to(elsewhere / target)
        (second := tmp_path / f"to to {target}").symlink_to(link.name)
        write(second)
        assert (second.is_symlink(), link.is_symlink()) == (True, True)
        assert not (elsewhere / target).is_symlink()
        assert (elsewhere / target).read_text() == "new"
    os.mkfifo(pipe := tmp_path / "pipe")
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(pipe)
    assert pipe.is_fifo()
    assert os.read(end, 9) == b"new"
    os.close(end)
    with contextlib.suppress(PermissionError):  # root alone makes devices, and must not lose the machine's own here
        os.mknod(full := tmp_path / "full", stat.S_IFCHR | 0o666, Path("/dev/full").stat().st_rdev)
        with pytest.raises(OSError, match=r"No space left on device \(free some, or choose another"):
            write(full)
        assert full.is_char_device()
        full.unlink()
    reads, writes = os.pipe()
    write(Path(f"/dev/fd/{writes}"))
    os.close(writes)
    with open(reads) as text:
        assert text.read() == "new"
    names = {"elsewhere", "pipe", *(f"{to}to {target}" for to in ("", "to ") for target in ("old", "absent"))}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {path.name for path in elsewhere.iterdir()} == {"old", "absent"}


# --- what grows stays, however its writing ends


def test_what_was_written_before_a_kill_stays_and_no_other_takes_its_place(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from accessory.files import growing
with growing(Path(sys.argv[1])) as text:
    text.write(sys.argv[2])
    text.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "out.txt").write_text("of before")
    for answer in ("two hours of answers", "one more"):
        killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out.txt"), answer])
        assert killed.returncode == -signal.SIGKILL

    def interrupted(written: str) -> None:
        with growing(tmp_path / "out.txt") as text:
            text.write(written)
            raise KeyboardInterrupt

    for written in ("a third", ""):
        with pytest.raises(KeyboardInterrupt):
            interrupted(written)
    kept = {"out.txt.partial": "two hours of answers", "out.txt.1.partial": "one more", "out.txt.2.partial": "a third"}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.txt": "of before", **kept}
    with growing(tmp_path / "out.txt") as text:
        text.write("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.txt": "whole", **kept}


def test_where_nothing_can_be_written_it_is_seen_before(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "out", Path("/proc/out")):
        kind, text = error_of(check_writable, path)
        assert (kind, f"'{path}'" in text) == ("FileNotFoundError", True)
    check_writable(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_takes_away_the_folders_that_were_made_for_it(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "a" / "b" / "c") as aside:
            (aside / "one").touch()
            raise RuntimeError("in the middle")

    assert error_of(fail) == ("RuntimeError", "in the middle")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    kind, text = error_of(new_folder(tmp_path / "file" / "out").__enter__)
    assert (kind, f"{tmp_path}/file" in text) == ("NotADirectoryError", True)


# --- modes


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A model whose tokenizer and templates are read-only, as a store of models has them."""
    setting = make_setting(tmp_path_factory.mktemp("modes"), small_tokenizer)
    more = setting.model / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("{{ messages[0].content }}")
    (setting.model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for path in (more / "rag.jinja", more, setting.model / "chat_template.jinja", setting.model / "tokenizer.model"):
        path.chmod(0o555 if path.is_dir() else 0o400)
    return setting


def odd_modes(folder: Path, umask: int) -> list[str]:
    """What has another mode than the umask gives to what is written without thought."""
    found = []
    for path in folder.rglob("*"):
        plain = 0o777 if path.is_dir() else 0o666
        if (mode := stat.S_IMODE(path.stat().st_mode)) != plain & ~umask:
            found.append(f"{path.relative_to(folder)}: {mode:o}")
    return found


def finetune_with(umask: int, setting: Setting, arguments: list[str]) -> None:
    before = os.umask(umask)
    try:
        finetune_on_rank(setting, arguments)
    finally:
        os.umask(before)


def test_all_that_is_written_has_one_mode(
    umask: int, setting: Setting, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    cache = Setting(tmp_path / "data")  # whose cache is made anew
    shutil.copytree(setting.folder / "base", cache.folder / "base")
    shutil.copy(setting.folder / "data.json", cache.folder)
    shutil.copy(setting.folder / "data.yaml", cache.folder)
    arguments = cache.arguments(out / "run", max_steps=2, lora_rank=2, save_iteration_interval=1, keep_last=1)
    ranks(1).run(finetune_with, umask, cache, arguments)
    (run,) = (out / "run").glob("epoch*")
    export_adapter(run, out / "peft")
    split(cache.model, out / "split", mp=2)
    merge(cache.model, run, out / "merged")
    quantize_checkpoint(cache.model, out / "int8", QuantArgs(type="int8"))
    save_archive(out / "shard.pth", random_tensors(small_config(dim=32, hidden_dim=16), 1))
    (tmp_path / "raw.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}))
    prepare_data.main(["evol-codealpaca", str(tmp_path / "raw.jsonl"), str(out / "prepared.json")])
    shutil.move(cache.folder / "cache", out / "cache")
    assert odd_modes(out, umask) == []
    for folder in (run, *(out / name for name in ("peft", "split", "merged", "int8"))):
        check_manifest(folder)
    assert (out / "peft" / "adapter_model.safetensors").exists()
    assert (out / "split" / "additional_chat_templates" / "rag.jinja").exists()
