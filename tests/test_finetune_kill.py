"""kill -9 at random moments, saving included: nothing is lost but a few steps, and the end is the same to the bit.

`make soak` runs it with more kills, SOAK_KILLS of them (30), at moments drawn by SOAK_SEED (0); spread experts too.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from finetuning import finetune_on_rank, make_setting
from kill_run import KillRun
from ranks import RankPool

Pools = Callable[[int], RankPool]


def survive(kills: int, seed: int, ranks: Pools, tokenizer: Path, folder: Path, *, ep_size: int = 1) -> KillRun:
    # Large enough that a save takes a while.
    setting = make_setting(folder, tokenizer, dim=64, hidden_dim=64, n_layers=3)
    run = KillRun(setting, folder / "killed", kills, seed, ep_size)
    whole = folder / "whole"
    ranks(2).run(finetune_on_rank, setting, run.arguments(whole), seconds=600)
    run.go()
    run.see_that_it_equals(whole)
    return run


@pytest.mark.timeout(1200)  # about a minute on two free cores; a dozen starts of Python on busy ones
def test_a_run_survives_kills(ranks: Pools, small_tokenizer: Path, tmp_path: Path) -> None:
    survive(2, 1, ranks, small_tokenizer, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("ep_size", [1, 2])
def test_a_run_survives_many_kills(
    ep_size: int, ranks: Pools, small_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kills, seed = (int(os.environ.get(name, default)) for name, default in (("SOAK_KILLS", "30"), ("SOAK_SEED", "0")))
    run = survive(kills, seed, ranks, small_tokenizer, tmp_path, ep_size=ep_size)
    with capsys.disabled():
        print(f"\n{run.summary()}")
