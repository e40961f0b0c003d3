"""This library beside transformers, llama.cpp and vLLM on a CPU: one model, every side a process of its own, in turns.

    python benchmarks/inference.py --peers --install       # the peers' environments, once: an hour
    python benchmarks/inference.py --peers                 # both shapes, 90 minutes at most
    python benchmarks/inference.py --peers --shapes mid --sides accessory vllm --rows prefill --minutes 15

All sides have the same random weights, the same prompts and as many threads. They are measured in two groups, since not
all of them fit into memory at once: 16 bits, and quantized weights beside ours in bfloat16. Of a group the processes
begin one after another, again in every round (seconds and memory of loading, seconds to the first token); the last ones
stay. Then each round measures every row, in each row side by side in turn, and before all the machine: the best of
several ways to read 1 GB, and a product of large bfloat16 matrices. Who is not asked is stopped. A row's ratio is the
median of the rounds' ratios; what each side's steps read is counted from its weights and from the experts that ours
chose. In a decoding row sequences share a prompt but for its last token, and each goes on with its most likely token.
"""

import argparse
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from machine import cpu_name
from mid import SHAPES
from peers import weights
from peers.environments import ENVIRONMENTS, InstallError, install, python_of
from peers.process import SideError, SideProcess
from peers.report import draw, tables

from accessory.config import QUANT_FORMS, ModelArgs

HERE = Path(__file__).parent
# Seconds for an answer: to load (vLLM compiles), and to anything else (32 sequences of 8,000 tokens are laid out).
LOAD_LIMIT, ANSWER_LIMIT = 300.0, 180.0
# Tokens of the first prompt of a fresh process, and what is noted of each.
FIRST_PROMPT = 9
STARTED = ("load", "first", "peak_private", "peak_resident")
# Of a group's time that fresh processes may take; once they have been started twice.
SHARE_OF_STARTS = 0.4
# Outputs and inputs of the product that is called the dense rate.
DENSE = 4096


@dataclass(frozen=True)
class Row:
    """What is measured: reading a prompt of ``count`` tokens, or a step of ``batch`` sequences at a position."""

    call: str
    count: int = 0
    batch: int = 0
    position: int = 0

    @property
    def name(self) -> str:
        if self.call == "prefill":
            return f"prefill, {self.count:,} tokens"
        return f"decode, batch {self.batch}, position {self.position:,}"

    def asked(self, steps: int) -> dict[str, Any]:
        """As the protocol has it."""
        if self.call == "prefill":
            return {"call": "prefill", "count": self.count}
        return {"call": "decode", "batch": self.batch, "position": self.position, "steps": steps}


ROWS = (
    *(Row("prefill", count=count) for count in (512, 2048)),
    *(Row("decode", batch=batch, position=position) for position in (100, 8000) for batch in (1, 8, 32)),
)


@dataclass(frozen=True)
class Side:
    """One of those that are compared.

    Attributes:
        program: what it is, and with ``form`` its name.
        form: of its weights.
        variants: ways to compute of its one process, each compared for itself.
        left_out: (variant, call) that is not measured.
    """

    program: str
    form: str
    variants: tuple[str, ...] = ("",)
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.program} {self.form}"

    def named(self, variant: str) -> str:
        return f"{self.name} {variant}".strip()


BF16, COMPILED = "bf16", "compiled grouped_mm"
OURS = f"accessory {BF16}"
# batched_mm copies an expert's matrices for every token that chose it: 22 GB for a prompt of 512.
TRANSFORMERS = Side("transformers", BF16, ("eager", "grouped_mm", "batched_mm"), (("batched_mm", "prefill"),))
GROUPS = {
    "16 bits": (Side("accessory", BF16), TRANSFORMERS, Side("llama.cpp", "BF16"), Side("vllm", BF16)),
    "quantized": (
        Side("accessory", BF16),
        *(Side("accessory", form) for form in QUANT_FORMS),
        *(Side("llama.cpp", kind) for kind in ("Q8_0", "Q4_0", "Q4_K_M")),
    ),
}


@dataclass
class Settings:
    """How a comparison is made."""

    folder: Path
    threads: int = 2
    rounds: int = 5
    starts: int = 3
    steps: int = 8
    rows: Sequence[Row] = ROWS
    deadline: float = field(default_factory=lambda: time.perf_counter() + 90 * 60)

    def left(self) -> float:
        """Seconds until the end."""
        return self.deadline - time.perf_counter()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="inference.py --peers", description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="make the peers' environments, and no more")
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="of environments, weights and results")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes of benchmarks/mid.py")
    parser.add_argument("--sides", nargs="+", metavar="WORD", help="only those whose name has one of these in it")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only those whose name has one of these in it")
    parser.add_argument("--compiled", action="store_true", help="transformers with torch.compile, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of each side behind the first")
    parser.add_argument("--steps", type=int, default=8, help="decoding steps in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=90.0, help="in all; fewer rounds are made where it is short")
    parser.add_argument("--report", type=Path, metavar="JSON", help="only show and draw what a run has written")
    arguments = parser.parse_args(given)
    if arguments.install:
        for name, result in install(arguments.folder).items():
            print(f"{name}: {result}")
        return
    path = arguments.report or arguments.folder / "results.json"
    if not arguments.report:
        settings = Settings(
            arguments.folder,
            arguments.threads,
            arguments.rounds,
            arguments.starts,
            arguments.steps,
            [row for row in ROWS if _has(row.name, arguments.rows)],
            time.perf_counter() + 60 * arguments.minutes,
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the sides are ended
        results = heading(settings)
        groups = {group: _wanted(sides, arguments.sides, arguments.compiled) for group, sides in GROUPS.items()}
        parts = [(shape, group) for shape in arguments.shapes for group, sides in groups.items() if sides]
        try:
            for number, (shape, group) in enumerate(parts):
                share = settings.left() / (len(parts) - number)
                part = replace(settings, deadline=time.perf_counter() + share)
                comparison = Comparison(shape, weights.args_of(shape), group, part)
                try:
                    comparison.run(groups[group])
                finally:
                    results["parts"].append(comparison.results())
                    path.write_text(json.dumps(results, indent=1) + "\n")
        except KeyboardInterrupt:
            print("stopped; what was measured until then:", file=sys.stderr)
    results = json.loads(path.read_text())
    print("\n".join(tables(results)))
    picture = path.with_suffix(".png")
    picture.write_bytes(draw(results))
    print(f"\nwrote {path} and {picture}")


def _has(name: str, words: Sequence[str] | None) -> bool:
    return words is None or any(word in name for word in words)


def _wanted(sides: Sequence[Side], words: Sequence[str] | None, compiled: bool) -> list[Side]:
    """The sides of a group that are asked for; none where but ours in bfloat16 is, which is there for the others."""
    found = [side for side in sides if _has(side.name, words)]
    if found == [Side("accessory", BF16)]:
        return []
    if compiled:
        found = [replace(side, variants=(*side.variants, COMPILED)) if side == TRANSFORMERS else side for side in found]
    return found


def heading(settings: Settings) -> dict[str, Any]:
    """Where and with what is measured; the results of each part go to "parts"."""
    return {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d"),
        "threads": settings.threads,
        "parts": [],
    }


class Comparison:
    """One group of sides with one shape, while they are measured."""

    def __init__(self, shape: str, args: ModelArgs, group: str, settings: Settings) -> None:
        self.shape, self.args, self.group, self.settings = shape, args, group, settings
        self.folder = settings.folder / shape
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sides: dict[str, Side] = {}
        self.paths: dict[str, Path] = {}
        self.commands: dict[str, tuple[list[str], dict[str, str | None]]] = {}
        self.processes: dict[str, SideProcess] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.seconds: dict[Row, dict[str, list[float]]] = {row: {} for row in settings.rows}
        self.experts: dict[Row, float] = {}
        self.limits: list[dict[str, float]] = []
        self.missing: list[tuple[str, str, str]] = []
        self.failed: set[tuple[str, Row]] = set()

    def run(self, sides: Sequence[Side]) -> None:
        """Measure all, and end the sides whatever happens."""
        try:
            self._begin(sides)
            self._turns()
        finally:
            for process in self.processes.values():
                process.close()
            self.processes.clear()

    def results(self) -> dict[str, Any]:
        """What was measured so far, in JSON's types.

        Returns:
            {"sides": {name: {"about", "load", "first", "peak_private", "peak_resident"}}, "rows": [{"name", "seconds":
            {name: [...]}, "flops"; or "experts", "read": {name: bytes of a step}}], "limits": [{"read", "dense"}],
            "missing": [[name, row, reason]]}: a number for each round, or for each fresh process.
        """
        rows = []
        for row, seconds in self.seconds.items():
            found: dict[str, Any] = {"name": row.name, "call": row.call, "seconds": seconds}
            if row.call == "prefill":
                found["flops"] = weights.prefill_flops(self.args, row.count)
            elif row in self.experts:
                found["experts"] = self.experts[row]
                found["read"] = {
                    side.named(variant): size.per_step(self.args, self.experts[row])
                    + weights.cache_bytes(self.args, row.batch, row.position)
                    for side in self.sides.values()
                    for variant in side.variants
                    if (size := self._bytes(side))
                }
            rows.append(found)
        own = {"shape": self.shape, "group": self.group, "sides": self.facts, "rows": rows, "limits": self.limits}
        return own | {"missing": self.missing}

    def _begin(self, sides: Sequence[Side]) -> None:
        """Write the weights, then start every side once and ``starts`` times more, in turns; the last ones stay.

        The first time, which may compile, counts where there is no other.
        """
        for side in sides:
            try:
                self.paths[side.name] = self._written(side)
                self.commands[side.name] = self._command(side)
            except (InstallError, ValueError, OSError, subprocess.SubprocessError) as error:
                self._miss(side.name, "all", str(error))
                continue
            self.sides[side.name] = side
            self.facts[side.name] = {name: [] for name in STARTED}
        enough = self.settings.left() * (1 - SHARE_OF_STARTS)
        for number in range(self.settings.starts + 1):
            for side in list(self.sides.values()):
                self._start(side, counts=number > 0 or not self.settings.starts)
            self._say(f"started {number + 1} times")
            if number and self.settings.left() < enough:
                break

    def _turns(self) -> None:
        """The rounds: the machine, then every row, each side in turn."""
        began = time.perf_counter()
        for number in range(self.settings.rounds):
            if number and self.settings.left() < (time.perf_counter() - began) / number:
                self._say(f"time for {number} rounds of {self.settings.rounds}")
                break
            self.limits.append(machine_limits(self.settings.threads))
            for row in self.settings.rows:
                if self.settings.left() < 0:
                    if not self.seconds[row]:
                        self._miss("all", row.name, "the time was out")
                    continue
                for side in list(self.sides.values()):
                    for variant in side.variants:
                        if (variant, row.call) not in side.left_out:
                            self._ask(side, variant, row)
            self._say(f"round {number + 1}")

    def _start(self, side: Side, *, counts: bool) -> None:
        """Load a side in a fresh process, in place of the one that it has."""
        if old := self.processes.pop(side.name, None):
            old.close()
        command, variables = self.commands[side.name]
        process = SideProcess(command, variables, self.folder / f"{side.name.replace(' ', '-')}.log")
        try:
            asked = {"folder": str(self.paths[side.name]), "threads": self.settings.threads}
            loaded = process.ask(timeout=LOAD_LIMIT, call="load", **asked)
            process.ask(timeout=ANSWER_LIMIT, call="prefill", count=FIRST_PROMPT, first=True)
        except SideError as error:
            process.close()
            del self.sides[side.name]
            self._miss(side.name, "all", str(error))
            return
        self.processes[side.name] = process
        found = self.facts[side.name]
        if counts:
            loaded["first"], loaded["load"] = time.perf_counter() - process.started, loaded["seconds"]
            for name in STARTED:
                found[name].append(loaded[name])
        found |= {name: loaded[name] for name in ("about", "expert_bytes", "other_bytes") if name in loaded}

    def _ask(self, side: Side, variant: str, row: Row) -> None:
        """Measure a row once; what fails is not asked again."""
        name = side.named(variant)
        if (name, row) in self.failed:
            return
        if side.name not in self.processes:  # it was lost over another row
            self._start(side, counts=False)
        if side.name not in self.processes:
            return
        asked = row.asked(self.settings.steps) | ({"variant": variant} if variant else {})
        try:
            answer = self.processes[side.name].ask(timeout=ANSWER_LIMIT, **asked)
        except SideError as error:
            self.failed.add((name, row))
            self._miss(name, row.name, str(error))
            if error.lost:
                del self.processes[side.name]
            return
        self.seconds[row].setdefault(name, []).append(answer["seconds"])
        if side.name == OURS:
            self.experts[row] = answer.get("experts", 0.0)

    def _written(self, side: Side) -> Path:
        """The weights of a side; made where they are not there."""
        if side.program == "llama.cpp":
            quantizer = [
                str(python_of(self.settings.folder, side.program)),
                str(HERE / "side_llama_cpp.py"),
                "quantize",
            ]
            return weights.gguf(self.folder, self.args, side.form, quantizer)
        if side.form == BF16:
            return weights.written(self.folder, self.args)
        return weights.quantized(self.folder, self.args, side.form)

    def _command(self, side: Side) -> tuple[list[str], dict[str, str | None]]:
        """What starts a side, and variables for it."""
        variables: dict[str, str | None] = {"OMP_NUM_THREADS": str(self.settings.threads)}
        python = sys.executable
        if side.program in ENVIRONMENTS:
            python = str(python_of(self.settings.folder, side.program))
            caches = str((self.settings.folder / "caches").absolute())
            variables |= {"PYTHONPATH": None, "VLLM_CACHE_ROOT": caches, "TORCHINDUCTOR_CACHE_DIR": caches}
        return [python, str(HERE / f"side_{side.program.replace('.', '_')}.py")], variables

    def _bytes(self, side: Side) -> weights.Bytes | None:
        """Of its weights; None where nobody counted them."""
        if side.program == "llama.cpp":
            return weights.bytes_of_gguf(self.paths[side.name])
        counted = self.facts[side.name if side.program == "accessory" else OURS]
        return weights.Bytes(counted["expert_bytes"], counted["other_bytes"]) if "expert_bytes" in counted else None

    def _miss(self, name: str, row: str, reason: str) -> None:
        self.missing.append((name, row, reason))
        self._say(f"{name}, {row}: {reason}")

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.shape}, {self.group}: {text}", file=sys.stderr, flush=True)


def machine_limits(threads: int) -> dict[str, float]:
    """Bytes that the machine reads in a second, the best of several ways over 1 GB, and operations of a product of
    large bfloat16 matrices."""
    torch.set_num_threads(threads)
    block = torch.ones(2**28)
    square, row = block.view(2**14, 2**14), torch.ones(2**14)
    ways: tuple[Callable[[], object], ...] = (block.sum, block.amax, lambda: torch.mv(square, row))
    read = min(_seconds(way) for _ in range(3) for way in ways)  # interleaved: whoever else works, does so for all
    matrix = torch.randn(DENSE, DENSE).bfloat16()
    dense = min(_seconds(lambda: matrix @ matrix) for _ in range(3))
    return {"read": block.numel() * block.element_size() / read, "dense": 2 * DENSE**3 / dense}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
