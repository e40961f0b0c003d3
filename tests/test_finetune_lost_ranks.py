"""A rank dies, or computes what is not finite: all others end, and one of them says why."""

import os
import re
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from finetuning import (
    Setting,
    alone,
    finetune_on_rank,
    latest_state,
    layout,
    log_lines,
    make_setting,
    state_tensors,
    under_torchrun,
)
from patience import PATIENCE
from programs import Program, by_hand
from ranks import RankPool, assert_same, error_of
from two_hosts import ADDRESSES, run_on_two_hosts, why_not

from accessory.model.meta import MetaModel
from accessory.train.shelf import Shelf

Pools = Callable[[int], RankPool]
# So many that no run comes to its end by itself.
MANY = 100_000
MOMENTS = {"step": r"step 1/", "save": r"checkpoint \S+: writing"}


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("lost"), small_tokenizer)


def wait_for_moment(moment: str, program: Program, output: Path) -> None:
    if moment in MOMENTS:
        program.wait_for(MOMENTS[moment])
        return
    assert moment == "export"  # nothing is logged at its begin
    end = time.monotonic() + 90
    while not list(output.glob(".*.exporting")):
        assert time.monotonic() < end, program.text


def errors_of(program: Program) -> list[str]:
    """Lines other than what a run says about its progress."""
    return [line for line in program.lines if not line.startswith("INFO: ")]


@pytest.mark.parametrize(
    ("victim", "moment", "ranks_of_model", "ranks_of_experts"),
    [
        *((0, "step", 1, 2), (2, "export", 1, 1), (0, "save", 2, 1)),
        pytest.param(3, "save", 2, 2, marks=pytest.mark.soak),
    ],
)
def test_ranks_started_by_hand_end_when_one_dies(
    victim: int, moment: str, ranks_of_model: int, ranks_of_experts: int, setting: Setting, tmp_path: Path
) -> None:
    size = 2 * ranks_of_model if ranks_of_model * ranks_of_experts > 1 else 3
    options = {"batch_size": 2, "model_parallel_size": ranks_of_model, "epochs": MANY, "save_iteration_interval": 2}
    options["expert_parallel_size"] = ranks_of_experts
    command = alone(setting.arguments(tmp_path, **options))
    with ExitStack() as stack:
        programs = [stack.enter_context(Program(command, setting.environment | place)) for place in by_hand(size)]
        wait_for_moment(moment, programs[0], tmp_path)
        programs[victim].kill()
        others = [program for rank, program in enumerate(programs) if rank != victim]
        for program in others:
            assert program.wait() == 1
            program.wait_for_all()
        (said,) = (line for program in others for line in errors_of(program))
        assert re.search(rf"ERROR: rank {victim} on \S+ is gone", said)
    assert_only_complete_states(tmp_path)


# A run whose memory is short in the third step, in one of the exchanges of a layer or in its backward pass.
RUNS_SHORT = """
import sys
from accessory import main_finetune
from accessory.model import exchange

call, backward = sys.argv.pop(1), sys.argv.pop(1) == "backward"
calls, whole = 0, exchange.exchange

def runs_short(*given):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

def counted(*given):
    global calls
    calls += 1
    if calls != int(call):
        return whole(*given)
    if not backward:
        runs_short()
    arrived = whole(*given)
    arrived.register_hook(runs_short)
    return arrived

exchange.exchange = counted
main_finetune.run(main_finetune.main)
"""


@pytest.mark.parametrize(("victim", "call", "where"), [(0, 9, "dispatch"), (1, 10, "backward")])
def test_all_end_when_one_raises_inside_an_exchange(
    victim: int, call: int, where: str, setting: Setting, tmp_path: Path
) -> None:
    """Which its peer waits for meanwhile; two layers exchange four times in a micro-batch's forward pass."""
    command = alone(setting.arguments(tmp_path, batch_size=2, epochs=MANY, expert_parallel_size=2))
    short = [command[0], "-c", RUNS_SHORT, str(call), where, *command[2:]]
    with ExitStack() as stack:
        programs = [
            stack.enter_context(Program(short if rank == victim else command, setting.environment | place))
            for rank, place in enumerate(by_hand(2))
        ]
        for program in programs:
            assert program.wait() == 1
            program.wait_for_all()
        (said,) = (line for program in programs for line in errors_of(program))
        assert re.match(r"(\[rank 1\] )?ERROR: out of memory \(99 bytes", said)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]


def assert_only_complete_states(output: Path) -> None:
    """What ``latest`` names is complete, as is every other folder that looks so."""
    states = [path.parent for path in (output / "checkpoints").glob(f"[!.]*/{Shelf.INDEX}")]
    assert all(not Shelf.incomplete(path) for path in states)
    assert not states or latest_state(output) in states


def test_torchrun_says_once_that_a_rank_died(setting: Setting, tmp_path: Path) -> None:
    arguments = setting.arguments(tmp_path, batch_size=2, epochs=MANY)
    with Program(under_torchrun(3, arguments), setting.environment) as program:
        program.wait_for(MOMENTS["step"])
        os.kill(program.rank(1), 9)
        assert program.wait() == 1
        program.wait_for_all()
        (said,) = (line for line in program.lines if "ERROR: " in line)
        assert said.startswith("[rank 2] ERROR: rank 1 on ")


def test_torchrun_may_start_the_ranks_again(setting: Setting, tmp_path: Path) -> None:
    options = {"batch_size": 2, "max_steps": 8, "epochs": MANY, "save_iteration_interval": 2, "auto_resume": True}
    command = under_torchrun(2, setting.arguments(tmp_path, **options), "--max-restarts=1")
    with Program(command, setting.environment) as program:
        program.wait_for(r"step-00000002: saved")
        os.kill(program.rank(1), 9)
        assert program.wait(120) == 0
    assert "INFO: resuming" in program.text
    steps = [line["step"] for line in log_lines(tmp_path)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 8


# -- what is not finite


def on_four(ranks: Pools, function: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """The error of 2 x 2 ranks, which all raise it alike."""
    results = set(ranks(4).run(function, *arguments))
    assert len(results) == 1
    return results.pop()


def error_on_rank(setting: Setting, arguments: list[str]) -> tuple[str, str]:
    return error_of(finetune_on_rank, setting, arguments)


def test_diverging_ends_the_run_and_leaves_its_state(ranks: Pools, setting: Setting, tmp_path: Path) -> None:
    options = {**layout(2, 2), "auto_resume": True}
    assert on_four(ranks, error_on_rank, setting, setting.arguments(tmp_path, **options, max_steps=4)) == ("", "")
    state = latest_state(tmp_path)
    before = state_tensors(state)
    wild = setting.arguments(tmp_path, **options | {"lr": 1e30, "clip_grad": 0})
    kind, text = on_four(ranks, error_on_rank, setting, wild)
    assert kind == "FloatingPointError"
    assert "is not finite; lower the learning rate or clip the gradients harder" in text
    assert latest_state(tmp_path) == state
    assert_same(state_tensors(state), before)
    assert all(tensor.isfinite().all() for tensor in before.values())
    assert not list((tmp_path / "checkpoints").glob(".*.tmp-*"))
    # And it can be gone on with.
    assert on_four(ranks, error_on_rank, setting, setting.arguments(tmp_path, **options, max_steps=6)) == ("", "")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def one_rank_errs_on_rank(setting: Setting, arguments: list[str], rank: int, with_gradient: bool) -> tuple[str, str]:
    """From its third micro-batch on, one rank's loss is not a number, and its gradient only if ``with_gradient``."""
    taken, losses = 0, MetaModel.training_losses

    def spoilt(model: MetaModel, *given: Any) -> Any:
        nonlocal taken
        taken += 1
        loss, *rest = losses(model, *given)
        if taken > 2 and dist.get_rank() == rank:
            loss = loss * float("nan") if with_gradient else loss + float("nan")
        return loss, *rest

    with mock.patch.object(MetaModel, "training_losses", spoilt):
        return error_of(finetune_on_rank, setting, arguments)


@pytest.mark.parametrize(("rank", "with_gradient"), [(3, True), (0, False), (3, False)])
def test_all_ranks_stop_for_what_one_of_them_found(
    rank: int, with_gradient: bool, ranks: Pools, setting: Setting, tmp_path: Path
) -> None:
    arguments = setting.arguments(tmp_path, **layout(2, 2, accum_iter=1), save_iteration_interval=1)
    kind, text = on_four(ranks, one_rank_errs_on_rank, setting, arguments, rank, with_gradient)
    assert kind == "FloatingPointError"
    assert "is not finite" in text
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]
    assert latest_state(tmp_path).name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in state_tensors(latest_state(tmp_path)).values())


def test_a_spoilt_model_is_said_once(setting: Setting, small_tokenizer: Path, tmp_path: Path) -> None:
    spoilt = make_setting(tmp_path / "spoilt", small_tokenizer)
    (file,) = spoilt.model.glob("*.pth")
    content = torch.load(file, weights_only=True)
    content["model"]["llma.layers.1.attention.wo.weight"][3, 5] = float("nan")
    torch.save(content, file)
    output = tmp_path / "run"
    with Program(under_torchrun(2, spoilt.arguments(output, **layout(1, 2))), spoilt.environment) as program:
        assert program.wait() == 1
        program.wait_for_all()
        (said,) = (line for line in program.lines if "ERROR: " in line)
        assert "is not finite" in said
        assert program.text.count("Traceback") == 1, "torchrun's own"
    assert not (output / "log.jsonl").exists()
    assert not list(output.glob("epoch*"))


# -- two hosts


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be made")
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_death_on_the_other_host(victim: int, setting: Setting, tmp_path: Path) -> None:
    given = shlex.join(map(str, alone(setting.arguments(tmp_path, batch_size=4, epochs=MANY))))
    started, died = f'grep -qs "step.: 3" {tmp_path}/log.jsonl', tmp_path / "died"
    dies = f"{given} & until {started}; do sleep 0.1; done; kill -9 $!; touch {died}; wait $!; test $? = 137"
    # The time counts from the death: how long ranks take to begin says nothing.
    ends = f"until test -e {died}; do sleep 0.1; done; timeout {PATIENCE:.0f} tail --pid=$! -f /dev/null || kill -9 $!"
    lives = f"{given} & {ends}; wait $! || exit $((100 + $?))"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29512", **setting.environment}
    done = run_on_two_hosts(
        [["bash", "-c", dies if host == victim else lives] for host in range(2)],
        [{"RANK": str(host), **place} for host in range(2)],
        cwd=tmp_path,
        seconds=3 * PATIENCE,
    )
    assert done.returncode == 101, done.stderr
    (said,) = (line for line in done.stderr.splitlines() if "ERROR: " in line)
    assert f"rank {victim} on " in said
