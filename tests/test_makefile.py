"""What `make` does in a fresh clone, as it says itself: `make -n`."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from documented import ROOT, Reader, clone


def planned(target: str, folder: Path) -> list[str]:
    """The lines that make would run where nothing is installed or made yet."""
    command = ["make", "-n", "-C", ROOT, target, f"VENV={folder / 'venv'}", f"TINY={folder / 'tiny'}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def place(lines: list[str], text: str) -> int:
    """The number of the only line with that text."""
    (found,) = [number for number, line in enumerate(lines) if text in line]
    return found


def test_demo_says_what_comes_then_installs_what_it_needs_and_no_more(tmp_path: Path) -> None:
    lines = planned("demo", tmp_path)
    said = place(lines, "stopped, it goes on with the same command")
    installed = place(lines, "--editable .")
    assert said < place(lines, "- train a tiny Mixtral") < installed < place(lines, "accessory tiny --out")
    assert place(lines, "bin/pip install --quiet --no-compile --constraint constraints.txt torch") < installed
    assert not any("[dev]" in line for line in lines)
    next_step = f"Next: source {tmp_path}/venv/bin/activate, then go on with docs/quickstart.md."
    assert place(lines, next_step) > place(lines, "processes wrote the same text")


@pytest.mark.parametrize("target", ["test", "lint", "docs", "soak", "bench"])
def test_what_developers_run_installs_their_tools_on_top(target: str, tmp_path: Path) -> None:
    lines = planned(target, tmp_path)
    users, developers = (number for number, line in enumerate(lines) if "--editable" in line)
    assert ".[dev]" not in lines[users]
    assert ".[dev]" in lines[developers]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_finetuning_demos_answer_what_they_taught(tmp_path: Path) -> None:
    """The first four questions are of the training data, and the answers are right to the letter."""
    clone(folder := tmp_path / "clone")
    with Reader(folder, tmp_path, threads=2) as reader:
        for target in ("finetune-demo", "peft-demo"):
            written = reader.run(f"make {target}", 1800)
            after = written[written.rindex("--- after") :]
            dialogues = json.loads((folder / "runs" / "dialogues" / "train.json").read_text())
            taught = {said[0]["value"]: said[1]["value"] for said in (one["conversations"] for one in dialogues)}
            found = dict(re.findall(r"^--- \d of 6: (.+)\n(.+)$", after, re.MULTILINE))
            known = [question for question in found if question in taught]
            assert len(known) == 4
            assert {question: found[question] for question in known} == {
                question: taught[question] for question in known
            }
