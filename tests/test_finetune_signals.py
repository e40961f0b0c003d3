"""Signals, Ctrl-C and launchers that die: a run that is asked to stop saves, ends, and can be gone on with."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from finetuning import (
    PER_EPOCH,
    Setting,
    alone,
    finetune_on_rank,
    latest_state,
    layout,
    log_lines,
    make_setting,
    model_tensors,
    state_tensors,
    under_torchrun,
    with_nproc,
)
from patience import PATIENCE
from programs import Program, by_hand, slowed
from ranks import RankPool, assert_same

from accessory.data.cache import CACHE_VARIABLE
from accessory.train import loop
from accessory.train.checkpointer import Checkpointer
from accessory.train.interruption import Stop
from accessory.train.shelf import Shelf

Pools = Callable[[int], RankPool]
END = 12
# So many that no run comes to its end by itself.
MANY = 100_000
FIRST_STEP = r"step 1/"
TOKENISES = "another process is tokenising the same data"
LAYOUT = layout(2, 2)


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("signals"), small_tokenizer)


@pytest.fixture(scope="module")
def unbroken(ranks: Pools, setting: Setting) -> Path:
    """The output folder of a run in one go at 2 x 2, with a model for each epoch."""
    output = setting.folder / "unbroken"
    arguments = setting.arguments(output, **LAYOUT, max_steps=END, save_interval=1)
    assert set(ranks(4).run(finetune_on_rank, setting, arguments)) == {Stop.NO}
    return output


def signalled_on_rank(
    setting: Setting, arguments: list[str], number: signal.Signals, receivers: Collection[int], step: int
) -> tuple[Stop, bool]:
    """Get a signal within ``step``, and another while saving; also whether the handlers are then as before."""
    taken, train_step, save = 0, loop.train_step, Checkpointer.save

    def signalled(*given: Any, **options: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step and dist.get_rank() in receivers:
            os.kill(os.getpid(), number)
        return train_step(*given, **options)

    def impatient(*given: Any, **options: Any) -> None:
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)
        save(*given, **options)

    asking = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    before = [signal.getsignal(number) for number in asking]
    with mock.patch.object(loop, "train_step", signalled), mock.patch.object(Checkpointer, "save", impatient):
        stop = finetune_on_rank(setting, arguments)
    return stop, before == [signal.getsignal(number) for number in asking]


@pytest.mark.parametrize(
    ("number", "receivers", "step"),
    [
        (signal.SIGHUP, {3}, 4),
        (signal.SIGTERM, {0, 1, 2, 3}, PER_EPOCH),  # whose model is then still to be written
        (signal.SIGUSR1, {0}, END),
    ],
)
def test_a_signal_saves_the_step_and_loses_nothing(
    number: signal.Signals,
    receivers: set[int],
    step: int,
    ranks: Pools,
    setting: Setting,
    unbroken: Path,
    tmp_path: Path,
) -> None:
    arguments = setting.arguments(tmp_path, **LAYOUT, max_steps=END, save_interval=1, auto_resume=True)
    results = ranks(4).run(signalled_on_rank, setting, arguments, number, receivers, step)
    assert results == [(Stop.SIGNAL, True)] * 4
    assert log_lines(tmp_path) == log_lines(unbroken)[:step]
    assert latest_state(tmp_path).name == f"step-{step:08d}"
    assert set(ranks(4).run(finetune_on_rank, setting, arguments)) == {Stop.NO}
    assert log_lines(tmp_path) == log_lines(unbroken)
    assert_same(state_tensors(latest_state(tmp_path)), state_tensors(latest_state(unbroken)))
    models = sorted(path.name for path in unbroken.glob("epoch*"))
    assert models == ["epoch0", "epoch1-iter10"]
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == models
    for name in models:
        assert_same(model_tensors(tmp_path / name), model_tensors(unbroken / name))


# -- whole processes


@contextlib.contextmanager
def lock_of_tokens(setting: Setting, cache: Path) -> Iterator[dict[str, str]]:
    """Holds the lock of the data in an empty cache, so that a run tokenises for ever; gives its environment."""
    (key,) = (path.name for path in (setting.folder / "cache").iterdir() if path.is_dir())
    cache.mkdir()
    with (cache / f"{key}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield {CACHE_VARIABLE: str(cache)}


@pytest.fixture(autouse=True)
def _sigint_is_heard() -> Iterator[None]:
    """Also where the tests run as a background job of a shell, whose programs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopped_after(program: Program, why: str, output: Path) -> int:
    """The step after which the run says that it stopped."""
    line = program.wait_for(r"stopped after step \d+")
    match = re.search(
        r"stopped after step (\d+) \((.*)\), \d+ steps are left: saved as (\S+), go on with --auto_resume$", line
    )
    assert match is not None, line
    assert match[2] == why
    assert match[3] == str(latest_state(output))
    return int(match[1])


def warnings_of(program: Program) -> list[str]:
    """What the run's ranks and its launcher have said, beside their progress and torchrun's own lines."""
    return [line for line in program.lines if re.match(r"(\[rank \d+\] )?(WARNING|ERROR):", line)]


def test_ctrl_c_saves_the_step_and_the_run_goes_on(ranks: Pools, setting: Setting, tmp_path: Path) -> None:
    output, options = tmp_path / "run", {**layout(1, 1), "epochs": MANY}
    with Program(with_nproc(1, setting.arguments(output, **options)), setting.environment) as program:
        program.wait_for(FIRST_STEP)
        program.send(signal.SIGINT)
        step = stopped_after(program, "Ctrl-C", output)
        assert program.wait() == 130
        program.wait_for_all()
        assert warnings_of(program) == program.lines[-1:]
    assert latest_state(output).name == f"step-{step:08d}"
    whole = tmp_path / "whole"
    for folder in (output, whole):
        arguments = setting.arguments(folder, **options, max_steps=step + 5, auto_resume=True)
        ranks(1).run(finetune_on_rank, setting, arguments)
    assert log_lines(output) == log_lines(whole)
    assert_same(state_tensors(latest_state(output)), state_tensors(latest_state(whole)))


def test_a_second_ctrl_c_ends_at_once_within_a_save(setting: Setting, tmp_path: Path) -> None:
    arguments = setting.arguments(tmp_path, **layout(1, 1), epochs=MANY, save_iteration_interval=8, auto_resume=True)
    with Program(alone(arguments), setting.environment) as program:
        program.wait_for(r"step-00000004: saved")
        # In the middle of writing, however busy the machine is.
        with slowed([program.process.pid], 0.05):
            line = program.wait_for(r"step-0000000[89]: writing|step-000000[1-9]\d: writing")
            program.send(signal.SIGINT)
            program.wait_for("another Ctrl-C ends at once")
            program.send(signal.SIGTERM)  # whichever it is
            assert program.wait() == 130
        finder = f"no training state in {tmp_path / 'checkpoints'}: beginning anew"
        (missing, said) = warnings_of(program)
        assert finder in missing
    last = latest_state(tmp_path)
    assert said.endswith(f"ended at once (Ctrl-C): the last one saved is {last}; go on with --auto_resume")
    assert not Shelf.incomplete(last)
    written = re.search(r"step-\d+", line)
    assert written is not None
    assert last.name <= written[0]


# Facts of torchrun: after a signal it fails also where its workers end well, and now and then its own end is an abort
# ("terminate called without an active exception").
TORCHRUN_FAILS = {1, -signal.SIGABRT}


def two_ranks(launcher: str, *settings: str) -> Callable[[list[str]], list[str | Path]]:
    """The command on two ranks."""
    return lambda arguments: (
        under_torchrun(2, arguments, *settings) if launcher == "torchrun" else with_nproc(2, arguments)
    )


@pytest.mark.parametrize(
    ("command", "number", "why", "codes"),
    [
        (
            two_ranks("torchrun", "--signals-to-handle", "SIGINT,SIGTERM,SIGUSR1", "--shutdown-timeout", "600"),
            signal.SIGUSR1,
            "a signal",
            TORCHRUN_FAILS,
        ),
        (two_ranks("torchrun"), signal.SIGKILL, "the launcher is gone", {-signal.SIGKILL}),
        pytest.param(
            *(two_ranks("--nproc"), signal.SIGKILL, "the launcher is gone", {-signal.SIGKILL}), marks=pytest.mark.soak
        ),
        (two_ranks("--nproc"), signal.SIGINT, "Ctrl-C", {130}),
    ],
    ids=["torchrun, SIGUSR1", "torchrun, SIGKILL", "nproc, SIGKILL", "nproc, Ctrl-C"],
)
def test_ranks_save_when_their_launcher_is_ended(
    command: Callable[[list[str]], list[str | Path]],
    number: signal.Signals,
    why: str,
    codes: set[int],
    setting: Setting,
    tmp_path: Path,
) -> None:
    arguments = setting.arguments(tmp_path, **layout(2, 1), epochs=MANY, keep_last=1)
    with Program(command(arguments), setting.environment) as program:
        program.wait_for(FIRST_STEP)
        if number is signal.SIGINT:  # a terminal tells every process of the foreground
            os.killpg(program.process.pid, number)
        else:
            program.send(number)
        step = stopped_after(program, why, tmp_path)
        assert program.wait() in codes
        program.wait_for_all()
        assert len(warnings_of(program)) == 1
    assert latest_state(tmp_path).name == f"step-{step:08d}"


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.soak), "--nproc"])
def test_a_second_ctrl_c_ends_all_ranks_at_once(launcher: str, setting: Setting, tmp_path: Path) -> None:
    """Though the main thread of rank 0 waits in a collective for a rank that does not come."""
    arguments = setting.arguments(tmp_path, **layout(2, 1), epochs=MANY, save_iteration_interval=4)
    with Program(two_ranks(launcher)(arguments), setting.environment) as program:
        program.wait_for(r"step-00000002: saved")
        second = program.rank(1)
        os.kill(second, signal.SIGSTOP)
        program.send(signal.SIGINT)
        program.wait_for("another Ctrl-C ends at once")
        program.send(signal.SIGINT)
        program.wait_for(r"ended at once \(Ctrl-C\): the last one saved is .*; go on with --auto_resume$")
        os.kill(second, signal.SIGCONT)
        assert program.wait() in (TORCHRUN_FAILS if launcher == "torchrun" else {130})
        program.wait_for_all()
        assert len(warnings_of(program)) == 1
    assert not Shelf.incomplete(latest_state(tmp_path))


def test_before_the_first_step_ctrl_c_ends_at_once(setting: Setting, unbroken: Path, tmp_path: Path) -> None:
    command = with_nproc(1, setting.arguments(tmp_path / "run", **layout(1, 1)))
    with lock_of_tokens(setting, tmp_path / "cache") as environment, Program(command, environment) as program:
        program.wait_for(TOKENISES)
        program.send(signal.SIGINT)
        assert program.wait() == 130
        assert program.lines[-1] == "WARNING: ended before the first step (Ctrl-C): there was nothing to save"
    assert not (tmp_path / "run").exists()


def test_before_the_first_step_a_signal_ends_a_rank_at_once(setting: Setting, unbroken: Path, tmp_path: Path) -> None:
    """Rank 0 tokenises and rank 1 waits for it, where no signal handler of Python's would ever run."""
    arguments = setting.arguments(tmp_path / "run", **layout(2, 1))
    with lock_of_tokens(setting, tmp_path / "cache") as environment, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(Program(alone(arguments), environment | place)) for place in by_hand(2))
        first.wait_for(TOKENISES)
        second.send(signal.SIGTERM)
        assert second.wait() == -signal.SIGTERM
        # Nothing but its peer's death tells rank 0 that the run is over.
        assert first.wait() == 1
        (said,) = (line for line in first.lines if "ERROR" in line)
        assert said.startswith(
            f"ERROR: rank 1 on {os.uname().nodename} is gone (ended by a signal, or its host cut off)"
        )
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_before_the_first_step_ranks_without_a_launcher_end_at_once(
    setting: Setting, unbroken: Path, tmp_path: Path
) -> None:
    command = under_torchrun(2, setting.arguments(tmp_path / "run", **layout(2, 1)))
    with lock_of_tokens(setting, tmp_path / "cache") as environment, Program(command, environment) as program:
        program.wait_for(TOKENISES)
        program.send(signal.SIGKILL)
        program.wait_for_all()


# -- the moment in which a run begins


LEAVES = """
import os, signal, sys, threading, time
from accessory.launch.launcher import Launch
from accessory.train.interruption import Interruption
signal.signal(signal.SIGINT, signal.default_int_handler)
tidies = threading.Event()
def tidy():
    tidies.set()
    time.sleep(0.3)
    print("tidied", flush=True)
with Interruption(Launch()) as interruption:
    interruption.at_the_end = tidy
    if sys.argv[1] == "begun":
        interruption.begin(lambda: None)
        os.kill(os.getpid(), signal.SIGINT)
        while not interruption._interrupted:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGINT)
    tidies.wait()
    interruption.begin(lambda: None)
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("when", "says"), [("begins", "tidied\n"), ("begun", "")])
def test_a_run_that_leaves_nothing_does_not_begin(when: str, says: str) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES, when], stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (130, says)
