"""Whatever writes a checkpoint's folder writes it whole or not at all, and says in one line why it could not."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from adapters import PEFT, random_adapter, write_adapter
from checkpoints import random_tensors, small_config, write_folder

from accessory.cli import main
from accessory.config.layouts import LAYOUT_NAMES

# With "base" and "adapter" for their folders; the destination stands behind these, or before what begins with "--".
COMMANDS: dict[str, list[str]] = {
    **{f"to {form}": ["convert", "base", "--to", form] for form in LAYOUT_NAMES},
    "to shards": ["convert", "base", "--mp", "4", "--safetensors"],
    "split": ["split", "base", "--mp", "2"],
    "merge": ["merge", "base", "adapter"],
    "merge to hf": ["merge", "base", "adapter", "--to", "hf"],
    "quantize": ["quantize", "base", "--quant", "int8"],
    "export-adapter": ["export-adapter", "adapter"],
}
Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def folders(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where, config = tmp_path_factory.mktemp("m"), small_config(n_layers=1)
    base = write_folder(where / "base", random_tensors(config, 4), config, files=2, tokenizer=small_tokenizer)
    peft = {**PEFT, "bias_tuning": False, "norm_tuning": False}
    alone = random_adapter(config, 8, biases=False)
    adapter = write_adapter(where / "a", alone, config, files=1, tokenizer=small_tokenizer, peft=peft)
    return {"base": base, "adapter": adapter}


def run(name: str, folders: dict[str, Path], destination: Path) -> int:
    words = [str(folders.get(word, word)) for word in COMMANDS[name]]
    behind = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    return main([*words[:behind], str(destination), *words[behind:]])


def contents(folder: Path) -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Contents, float]]:
    """What a command writes where nothing is in its way, and in how many seconds."""
    found: dict[str, tuple[Contents, float]] = {}

    def of(name: str) -> tuple[Contents, float]:
        if name not in found:
            begin, out = time.monotonic(), tmp_path_factory.mktemp("whole") / "out"
            assert run(name, folders, out) == 0
            found[name] = contents(out), time.monotonic() - begin
        return found[name]

    return of


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A limit on file sizes fails as a full disk does, from the system itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def failing(function: str, number: int, name: str) -> Iterator[None]:
    """Meanwhile a system call fails for files or folders of that name; root would be stopped by no permission."""
    plain = getattr(os, function)

    def fail(path: int | Path, *given: object, **more: object) -> object:
        place = Path(os.readlink(f"/proc/self/fd/{path}")) if isinstance(path, int) else Path(path)
        if name in place.name:
            raise OSError(number, os.strerror(number), str(place))
        return plain(path, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, fail)
        yield


Cause = Callable[[Path, Contents], AbstractContextManager[object]]
CAUSES: dict[str, tuple[Cause, str]] = {
    "full at once": (lambda out, held: files_of_at_most(500), "free (some|space),? or choose another destination"),
    "full within": (
        lambda out, held: files_of_at_most(max(map(len, held.values())) // 2),
        "free (some|space),? or choose another destination",
    ),
    "full at the end": (lambda out, held: failing("fsync", errno.ENOSPC, "config.json"), "No space left on device"),
    "read-only": (lambda out, held: failing("mkdir", errno.EROFS, ".out."), "Read-only file system"),
    "there already": (lambda out, held: contextlib.nullcontext(), "out exists already: remove it first or choose"),
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(
    name: str,
    cause: str,
    folders: dict[str, Path],
    whole: Callable[[str], tuple[Contents, float]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held, out = whole(name)[0], tmp_path / "out"
    before: list[Path] = []
    if cause == "there already":
        out.mkdir()
        (out / "mine").touch()
        before = [out, out / "mine"]
    way, says = CAUSES[cause]
    capsys.readouterr()
    with way(out, held):
        code = run(name, folders, out)
    said = capsys.readouterr().err.splitlines()
    if code == 0:
        assert (cause, "config.json" in "".join(held)) == ("full at the end", False)
        return
    assert (code, said[-1].startswith("ERROR: "), sum("ERROR: " in line for line in said)) == (1, True, 1), said
    assert re.search(says, said[-1]), said
    assert str(out) in said[-1] or "/.out." in said[-1], said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_leaves_the_whole_or_nothing(
    name: str, folders: dict[str, Path], whole: Callable[[str], tuple[Contents, float]], tmp_path: Path
) -> None:
    held, seconds = whole(name)
    rng, out = random.Random(name), tmp_path / "out"
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                run(name, folders, out)
            os._exit(0)
        time.sleep(1.2 * seconds * rng.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if out.exists():
            break
    else:
        assert run(name, folders, out) == 0
    assert contents(out) == held
    if "export" not in name and len(list(tmp_path.iterdir())) > 1:
        assert main(["convert", str(folders["base"]), str(out), "--overwrite"]) == 0
        assert list(tmp_path.iterdir()) == [out], "what killed ones have left goes with the next one"
