"""Ranks that a command starts itself, as their user and their launcher see them; what torchrun is told of a failure."""

import contextlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from finetuning import PYTHON
from patience import PATIENCE
from programs import Program
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from accessory import cli, main_finetune
from accessory.commands import demos
from accessory.commands.output import ended
from accessory.launch import local
from accessory.launch.launcher import PARENT_VARIABLE, report_failure

COMMAND = (PYTHON, "-m", "accessory")


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config()
    folder = tmp_path_factory.mktemp("nproc") / "model"
    return write_folder(folder, random_tensors(config, 5), config, files=2, tokenizer=small_tokenizer)


# -- the same as alone, and as under torchrun


def test_two_ranks_write_what_one_does(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 reads this program's standard input and writes to its output, the others do neither."""
    words = ["generate", str(folder), "--raw", "--json", "--max-gen-len", "8", "--prompt", "-", "--nproc"]
    texts = b"The list\nmethod\n"
    two = subprocess.run([*COMMAND, *words, "2"], input=texts, capture_output=True, timeout=PATIENCE)
    assert two.returncode == 0, two.stderr
    assert not re.search("error|warning", two.stderr.decode(), re.IGNORECASE)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(texts)))
    assert cli.main([*words, "1"]) == 0
    assert capsys.readouterr().out == two.stdout.decode()
    assert two.stdout.count(b'"prompt"') == 2


# -- how they end


LOADS = "computing with the weights"


def test_no_rank_outlives_its_launcher(folder: Path) -> None:
    with Program(long_text(folder)) as program:
        program.wait_for(LOADS)
        assert len(program.processes()) == 3
        program.send(signal.SIGKILL)
        program.wait_for_all()
        assert errors_of(program) == ["ERROR: the launcher is gone: leaving"]


def test_a_rank_that_a_signal_ends_is_named_once(folder: Path) -> None:
    with Program(long_text(folder)) as program:
        program.wait_for(LOADS)
        os.kill(program.rank(1), signal.SIGKILL)
        assert program.wait() == 128 + signal.SIGKILL
        program.wait_for_all()
        assert errors_of(program) == ["ERROR: rank 1 of 2 was ended by SIGKILL: the others end too"]


def long_text(folder: Path) -> list[str | Path]:
    """A command that is busy for a while."""
    settings = ("--max-gen-len", "4000", "--max-seq-len", "8000", "--temperature", "1", "--nproc", "2")
    return [*COMMAND, "generate", folder, "--raw", "--prompt", "The list", *settings]


def errors_of(program: Program) -> list[str]:
    # The text that rank 0 writes has no end of line yet.
    return re.findall("(?:error:|Traceback).*", program.text, re.IGNORECASE)


READY = "import os, signal, sys, time; r = os.environ['RANK']; ready = lambda: open(sys.argv[1] + r, 'w').close(); "
COUNTS = (
    "n = []; signal.signal(signal.SIGUSR1, lambda *_: n.append(1)); "
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(len(n))); ready(); time.sleep(60)"
)
DIES = "ready(); os.kill(os.getpid(), 11 if r == '1' else 0); time.sleep(60)"
CTRL_C = "interrupted (Ctrl-C)"
FAILS_LATER = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)) if r == '1' else 0; ready(); time.sleep(60)"


@pytest.mark.parametrize(
    ("script", "sent", "code", "says"),
    [
        ("ready(); sys.exit(3 if r == '1' else 0)", [], 3, []),
        (DIES, [], 139, ["rank 1 of 2 was ended by SIGSEGV: the others end too"]),
        (COUNTS, [signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM], 2, []),  # each once
        # What ended as it was asked to rules over what followed from it.
        (FAILS_LATER, [signal.SIGTERM], 143, []),
        ("ready(); sys.exit(141 if r == '0' else 1)", [], 141, []),
        ("ready(); time.sleep(0.2 if r == '0' else 0); sys.exit(141 if r == '0' else 1)", [], 141, []),
        ("signal.signal(signal.SIGINT, signal.SIG_DFL); ready(); time.sleep(60)", [signal.SIGINT], 130, [CTRL_C]),
    ],
    ids=["exit code", "signal", "each signal once", "asked", "at once", "its peer sooner", "without a word"],
)
def test_the_code_is_that_of_the_rank_that_failed_first(
    script: str,
    sent: list[signal.Signals],
    code: int,
    says: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Only where one stays does it pass, and no machine is so slow that another is taken for one that stays.
    monkeypatch.setattr(local, "_PATIENCE", 0.2 if script == DIES else PATIENCE)
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    received: deque[int] = deque()

    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        for number in sent:
            received.append(number)
            while received:
                time.sleep(0.01)
            time.sleep(0.1)  # two that are pending at once are one

    thread = threading.Thread(target=send)
    thread.start()
    command = [sys.executable, "-S", "-c", READY + script, f"{tmp_path}/"]
    with local.Ranks(command, [{"RANK": "0"}, {"RANK": "1"}]) as ranks:
        assert ranks.wait(received) == code
    thread.join()
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == says


def test_signals_are_noted_that_are_not_ignored() -> None:
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    for ignored in (signal.SIGINT, signal.SIGHUP):  # as in the background, and by nohup
        received: deque[int] = deque()
        before = {number: signal.signal(number, signal.SIG_DFL) for number in ours}
        signal.signal(ignored, signal.SIG_IGN)
        with local._noting(received):
            for number in ours:
                os.kill(os.getpid(), number)
        kept = signal.getsignal(ignored)
        for number, handler in before.items():
            signal.signal(number, handler)
        assert kept is signal.SIG_IGN
        assert sorted(received) == sorted({*ours} - {ignored})


# -- who starts ranks


def test_ranks_start_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not local.starts_ranks(1)
    assert local.starts_ranks(2)
    two = {"RANK": "0", "WORLD_SIZE": "2"}
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    step = {**batch, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    # A batch script has the variables of a rank, and so has the shell that salloc opens.
    for variables in (batch, {**step, "SLURM_STEP_NUM_TASKS": "1"}):
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            assert local.starts_ranks(4)
    for variables, launcher in ((two, "torchrun"), (step, "srun")):
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            assert not local.starts_ranks(1)
            with pytest.raises(ValueError, match=f"--nproc 4 .*{launcher} has started 2 already: give only one"):
                local.starts_ranks(4)
    for name, value in {**two, PARENT_VARIABLE: "7"}.items():
        monkeypatch.setenv(name, value)
    assert not local.starts_ranks(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_are_said_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["generate", str(folder), "--prompt", "a", "--device", "cuda", "--nproc", "2"]
    assert cli.main(given) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("ERROR: ")
    assert said.endswith(": give the device cpu")


# -- what torchrun is told


def report_of(file: Path) -> list[str]:
    """Lines of torchrun's report of a rank that left the file."""
    return str(ChildFailedError("program", {0: ProcessFailure(0, 1, 1, str(file))})).splitlines()


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (main_finetune.main, ["--data_config", "absent.yaml", "--lr", "nan"]),
        (main_finetune.main, ["--data_confg", "absent.yaml"]),
        (cli.main, ["finetune", "--data_config", "absent.yaml", "--lr", "nan"]),
        (cli.main, ["generate", "absent", "--prompt", "a"]),
        (cli.main, ["generate", "absent", "--promt", "a"]),
        (demos.single_turn, ["--pretrained_path", "absent"]),
        (demos.single_turn, ["--pretrained_pat", "absent"]),
    ],
)
def test_torchruns_report_ends_with_what_a_program_has_said(
    program: Callable[[list[str]], int], arguments: list[str], error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # the parser's
        assert program(arguments) != 0
    said = capsys.readouterr().err.splitlines()[-1]
    report = report_of(error_file)
    assert report[-2] == f"  traceback : {said.removeprefix('ERROR: ')}"
    assert not list(error_file.parent.glob("error.json.*"))


def test_torchruns_report_shows_where_a_program_broke(error_file: Path) -> None:
    def broken() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        ended(broken)
    report_failure("what follows from it")
    assert report_of(error_file)[-2] == "  KeyError: 'ours'"
