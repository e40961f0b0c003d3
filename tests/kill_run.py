"""A finetuning run that is killed again and again: the driver of tests/test_finetune_kill.py and of `make soak`.

A run of two ranks under torchrun saves often and is started with --auto_resume. At seeded random moments one of its
processes, or all of them, get a kill -9; then it is started again, until it is through. After each restart it is seen
where the run goes on. At the end everything that it wrote is held against a run that nobody killed.
"""

import itertools
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from finetuning import Setting, latest_state, log_lines, model_tensors, state_tensors, under_torchrun
from patience import PATIENCE
from programs import Program
from ranks import assert_same

INTERVAL = 4  # steps between two saves; at an epoch's end there are fewer
# A life gets hardly farther: it lets a save pass, is killed around the next, and may take a few steps to its end.
STEPS_OF_LIFE = 4 * INTERVAL
VICTIMS = ("rank 0", "rank 1", "torchrun", "everything")
PHASES = ("export", "writing", "renaming")
# Seconds to let pass in a phase, which may be as short as that.
_LONGEST = {"export": 0.02, "writing": 0.05, "renaming": 0.005}
_PHASE_LINE = re.compile(r"checkpoint \S*/step-(\d+)(?:\.\d+)?: (writing|renaming|saved)")


@dataclass(frozen=True)
class Kill:
    """What one kill hit.

    Attributes:
        phase: of a save; "start" before the first step; "steps" otherwise.
        last_step: of which the run had written a line.
        unsaved_since: step of the save that was under way, if any.
        seconds: until nothing of the run was left.
    """

    victim: str
    phase: str
    last_step: int
    unsaved_since: int | None
    seconds: float


@dataclass
class KillRun:
    """One run and its kills.

    Args:
        kills: how many; a third of them, at least, inside a save.
        output: the run's folder.
        ep_size: of its two ranks, those over which experts are spread.
    """

    setting: Setting
    output: Path
    kills: int
    seed: int
    ep_size: int = 1
    done: list[Kill] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps of the whole run: enough to have them all."""
        return STEPS_OF_LIFE * self.kills

    def arguments(self, output: Path) -> list[str]:
        return self.setting.arguments(
            output,
            batch_size=4,
            expert_parallel_size=self.ep_size,
            epochs=1000,
            max_steps=self.steps,
            save_iteration_interval=INTERVAL,
            save_interval=1,
            keep_last=2,
            auto_resume=True,
            eval_ratio=0.2,
            eval_interval=INTERVAL - 1,
            keep_best=True,
        )

    def go(self) -> None:
        """Kill and restart until the run is through.

        Raises:
            AssertionError: it lost more than it may, went on from something incomplete, or did not end.
        """
        chance = random.Random(self.seed)
        # Every victim in every phase, in random order; the other kills come at any time.
        hits = list(itertools.product(VICTIMS, PHASES))
        chance.shuffle(hits)
        for number in range(self.kills):
            inside = hits[number // 2 % len(hits)] if number % 2 == 0 else None
            self._live(chance, inside)
        with self._start() as program:
            self._see_where_it_goes_on(program)
            assert program.wait(600) == 0, program.text
            program.wait_for_all()
        inside = sum(kill.phase in PHASES for kill in self.done)
        assert 3 * inside >= self.kills, f"only {inside} of {self.kills} kills hit a save"

    def _start(self) -> Program:
        return Program(under_torchrun(2, self.arguments(self.output)), self.setting.environment)

    def _live(self, chance: random.Random, hit: tuple[str, str] | None) -> None:
        """One life: start, go on, be killed, end."""
        with self._start() as program:
            victim = hit[0] if hit else chance.choice(VICTIMS)
            early = hit is None and chance.random() < 0.3
            if early:
                time.sleep(chance.uniform(0, 5))
            else:
                self._see_where_it_goes_on(program)
                program.wait_for(r"INFO: step \d+/")
                self._wait_for_moment(program, chance, hit)
            targets = self._targets(program, victim)
            at = time.monotonic()
            for target in targets:
                with suppress(ProcessLookupError):
                    os.kill(target, signal.SIGKILL)
            phase, unsaved = self._phase(program)
            program.wait_for_all()
            seconds = time.monotonic() - at
            assert program.wait() != 0
            if victim != "torchrun":  # whose ranks go on, to save
                phase, unsaved = self._phase(program)
            last = self._last_step()
            if not re.search(r"INFO: step \d+/", program.text):
                phase = "start"
            self.done.append(Kill(victim, phase, last, unsaved, seconds))
        self._see_that_all_is_whole()

    def _wait_for_moment(self, program: Program, chance: random.Random, hit: tuple[str, str] | None) -> None:
        if hit is None:
            last = self._last_step() + chance.randrange(2 * INTERVAL)
            _wait(lambda: self._last_step() >= last, program)
            time.sleep(chance.uniform(0, 0.1))
            return
        _, phase = hit
        saves = program.text.count(": saved in") + chance.randrange(2)
        _wait(lambda: program.text.count(": saved in") >= saves, program)
        seen = len(program.lines)
        if phase == "export":  # whose begin is not logged
            _wait(lambda: any(self.output.glob(".*.exporting")), program)
        else:
            _wait(lambda: any(f": {phase}" in line for line in program.lines[seen:]), program)
        time.sleep(chance.uniform(0, _LONGEST[phase]))

    def _phase(self, program: Program) -> tuple[str, int | None]:
        """What the run was doing, and the step of a training state that it had begun to write."""
        last = None
        for match in map(_PHASE_LINE.search, list(program.lines)):
            last = match or last
        writing = last is not None and last[2] != "saved"
        if any(self.output.glob(".*.exporting")):
            return "export", int(last[1]) if writing else None
        return (last[2], int(last[1])) if writing else ("steps", None)

    def _targets(self, program: Program, victim: str) -> list[int]:
        if victim == "torchrun":
            return [program.process.pid]
        everything = program.processes()
        if victim == "everything":
            return list(everything)
        chosen = program.processes(lambda environment: environment.get("RANK") == victim.removeprefix("rank "))
        return list(chosen or everything)  # it may not be there yet

    def _last_step(self) -> int:
        with suppress(FileNotFoundError):
            lines = (self.output / "log.jsonl").read_bytes().split(b"\n")[:-1]
            return max((json.loads(line)["step"] for line in lines), default=0)
        return 0

    def _see_where_it_goes_on(self, program: Program) -> None:
        """What is lost since the kill before: one interval, and the steps taken during an unfinished save."""
        expected = latest_state(self.output) if (self.output / "checkpoints" / "latest").exists() else None
        line = program.wait_for(r"resuming .* after step \d+|beginning anew")
        resumed = re.search(r"resuming (\S+) after step (\d+)", line)
        assert (Path(resumed[1]) if resumed else None) == expected, line
        if self.done:
            kill = self.done[-1]
            during_save = 0 if kill.unsaved_since is None else max(0, kill.last_step - kill.unsaved_since)
            lost = kill.last_step - (int(resumed[2]) if resumed else 0)
            assert lost <= INTERVAL + during_save, f"{lost} steps lost by {kill}"
            self.lost.append(lost)

    def _see_that_all_is_whole(self) -> None:
        """Read every training state and model that has its final name."""
        if (self.output / "checkpoints" / "latest").exists():
            assert all(tensor.isfinite().all() for tensor in state_tensors(latest_state(self.output)).values())
        for folder in (*self.output.glob("epoch*"), *self.output.glob("best")):
            assert {"config.json", "meta.json", "tokenizer.model"} < {path.name for path in folder.iterdir()}
            assert model_tensors(folder)

    def see_that_it_equals(self, whole: Path) -> None:
        """Hold all that the run wrote against a run in one go.

        Raises:
            AssertionError: a step, a weight or a moment differs, or a model is missing or left over.
        """
        assert log_lines(self.output) == log_lines(whole)
        assert_same(state_tensors(latest_state(self.output)), state_tensors(latest_state(whole)))
        for rng in latest_state(whole).glob("rng.*.pt"):
            assert_same(torch.load(latest_state(self.output) / rng.name), torch.load(rng))
        models = sorted(path.parent.name for path in whole.glob("*/meta.json"))
        assert "best" in models
        assert sorted(path.parent.name for path in self.output.glob("*/meta.json")) == models
        for name in models:
            assert_same(model_tensors(self.output / name), model_tensors(whole / name))
        # Nothing half-written is left behind.
        assert not [path for path in self.output.rglob(".*") if path.name not in (".lock", ".metadata")]

    def summary(self) -> str:
        """One line on what was hit and what was lost."""
        counts = Counter(kill.victim for kill in self.done), Counter(kill.phase for kill in self.done)
        victims, phases = (", ".join(f"{name} {count}" for name, count in count.most_common()) for count in counts)
        slowest = max(kill.seconds for kill in self.done)
        return (
            f"{len(self.done)} kills (seed {self.seed}) in {self.steps} steps, saving every {INTERVAL}: "
            f"hit {victims}; during {phases}; lost at most {max(self.lost)} and {sum(self.lost) / len(self.lost):.1f} "
            f"steps in the mean; all processes gone within {slowest:.1f} s; losses, models, weights and optimizer "
            "equal an unkilled run's bit for bit"
        )


def _wait(reached: Callable[[], bool], program: Program) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, program.text
        time.sleep(0.0005)
