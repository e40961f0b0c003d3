"""The commands and programs that README.md and docs/*.md show, and a walk through them as a reader makes it.

A block of bash or Python is run as it stands, in the order of README.md's links, in one folder and one after the other.
One that cannot run says why in a comment right above it: `<!-- not run: needs 8 GPUs -->`.
"""

import os
import re
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from programs import Program

ROOT = Path(__file__).parent.parent
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
_LINK = re.compile(r"^- \[[^]]+\]\((docs/\w+\.md)\)", re.MULTILINE)
# Programs that answer until they are stopped. Their port stands in the command, or is the usual one.
_SERVERS = (("accessory serve", 8000), ("demos/single_turn.py", 7860), ("demos/multi_turn.py", 7860))
# What lies in a working copy and not in a clone, or is not of what pages run.
_NOT_CLONED = shutil.ignore_patterns(".*", "build", "runs", "__pycache__", "*.egg-info", "tests")

# Of the Makefile; newer than what it installs, so that it installs nothing.
_STAMPS = {"READY": ".ready", "DEVELOPED": ".developed"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a page: its lines' language, what they are, and what stands around them.

    Attributes:
        line: of its fence, from 1.
        not_run: why it is not run; None where it is.
        typed: lines that the page shows as typed to it, in a text block behind it.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str | None
    typed: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and the pages that it links in its list, in their order."""
    return ["README.md", *_LINK.findall((ROOT / "README.md").read_text())]


def blocks(page: str, text: str) -> Iterator[Block]:
    """The blocks of bash and Python."""
    fences = list(_FENCE.finditer(text))
    for fence, behind in zip(fences, [*fences, None][1:], strict=True):
        language, code = fence.groups()
        if language not in ("bash", "python"):
            continue
        mark = _MARK.search(text[: fence.start()])
        shown = behind[2] if behind is not None and behind[1] == "text" else ""
        yield Block(
            page=page,
            line=text.count("\n", 0, fence.start()) + 1,
            language=language,
            code=code,
            not_run=None if mark is None else mark[1],
            typed=tuple(line[2:] for line in shown.splitlines() if line.startswith("> ")),
        )


def all_blocks() -> list[Block]:
    """Those of all pages, in the order in which a reader meets them."""
    return [block for page in pages() for block in blocks(page, (ROOT / page).read_text())]


def clone(folder: Path) -> None:
    """Copy the repository's files to a new folder, with a virtual environment that is the one that runs the tests."""
    shutil.copytree(ROOT, folder, symlinks=True, ignore=_NOT_CLONED)
    (folder / ".venv").symlink_to(sys.prefix)
    for stamp in _STAMPS.values():
        (folder / stamp).touch()


class Reader:
    """Types the blocks of pages, in a clone.

    Args:
        folder: of the clone; it stays there.
        scratch: a folder for what the reader does not see.
        substitutions: patterns and what takes their place in each block.
        variables: of make, in place of the Makefile's.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        *,
        substitutions: Sequence[tuple[str, str]] = (),
        variables: Sequence[str] = (),
        threads: int = 1,
    ) -> None:
        self._folder, self._scratch, self._substitutions = folder, scratch, substitutions
        self._server: Program | None = None
        stamps = [f"{variable}={stamp}" for variable, stamp in _STAMPS.items()]
        self._environment = {
            "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(folder),
            "MAKEFLAGS": " ".join([*stamps, *variables]),
            "OMP_NUM_THREADS": str(threads),
            "ACCESSORY_DATA_CACHE": str(scratch / "cache"),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.stop_server()
        elif self._server is not None:
            self._server.__exit__(None, None, None)  # what stopped the reader is the news

    def type(self, block: Block, seconds: float) -> None:
        """Run a block to its end; a server until the next one, or `stop_server`.

        Raises:
            AssertionError: naming page and line; with what the block wrote.
        """
        code = block.code
        for pattern, text in self._substitutions:
            code = re.sub(pattern, text, code)
        served = next((port for name, port in _SERVERS if name in code), None)
        if served is not None:
            self.stop_server()
        script = self._scratch / re.sub(r"\W", "-", block.place)
        program = self._start(block, code, script)
        try:
            if served is not None:
                given = re.findall(r"--(?:server_)?port (\d+)", code)
                self._server = program
                _wait_for_server(program, int(given[-1]) if given else served, seconds)
                return
            code_at_end = program.wait(seconds)
            program.wait_for_all()  # what is left behind would disturb the next block
            assert code_at_end == 0, f"exit code {code_at_end}\n{program.text}"
            refused = "curl " in code and '"error"' in program.text  # of which curl's exit code says nothing
            assert not refused, program.text
        except AssertionError as error:
            raise AssertionError(f"{block.place} fails:\n{code}\n{error}") from None
        finally:
            if served is None:
                program.__exit__(None, None, None)

    def run(self, command: str, seconds: float) -> str:
        """Run a command that succeeds; returns what it has written."""
        with Program(["bash", "-c", command], self._environment, folder=self._folder) as program:
            code = program.wait(seconds)
            assert code == 0, program.text
            return program.text

    def stop_server(self) -> None:
        """Stop the program that answers, if one does, as Ctrl-C does.

        Raises:
            AssertionError: it had ended by itself, or left processes behind.
        """
        server, self._server = self._server, None
        if server is not None:
            with server:
                assert server.process.poll() is None, f"the server ended\n{server.text}"
                os.killpg(server.process.pid, signal.SIGINT)
                server.wait_for_all()

    def _start(self, block: Block, code: str, script: Path) -> Program:
        if block.language == "python":
            path = script.with_suffix(".py")
            path.write_text(code)
            return Program([sys.executable, path], self._environment, folder=self._folder)
        typed = script.with_suffix(".typed")
        typed.write_text("".join(f"{line}\n" for line in block.typed))
        # A reader who is led to another folder would fail at the next block.
        stays = f'[ "$PWD" = "{self._folder}" ] || {{ echo "the block leaves its reader in $PWD"; exit 97; }}\n'
        path = script.with_suffix(".sh")
        path.write_text(f'exec < "{typed}"\n{code}{stays}')
        return Program(["bash", "-eo", "pipefail", path], self._environment, folder=self._folder)


def _wait_for_server(program: Program, port: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        for path in ("health", ""):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except urllib.error.HTTPError as error:
                if error.code != 404:
                    break  # the model is being loaded
            except OSError:
                break
        assert program.process.poll() is None, f"the server ended\n{program.text}"
        assert time.monotonic() < end, f"the server did not answer within {seconds} s\n{program.text}"
        time.sleep(0.1)
