"""What `make` does in a fresh clone, as it says itself: `make -n`."""

import subprocess
from pathlib import Path

import pytest
from documented import ROOT


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
    assert place(lines, "bin/pip install --quiet --constraint constraints.txt torch") < installed
    assert not any("[dev]" in line for line in lines)


@pytest.mark.parametrize("target", ["test", "lint", "docs", "soak", "bench"])
def test_what_developers_run_installs_their_tools_on_top(target: str, tmp_path: Path) -> None:
    lines = planned(target, tmp_path)
    users, developers = (number for number, line in enumerate(lines) if "--editable" in line)
    assert ".[dev]" not in lines[users]
    assert ".[dev]" in lines[developers]
