"""How the process of a program begins and ends, whatever it does between."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE
from programs import by_hand

ROOT = Path(__file__).parent.parent
MAIN_FINETUNE = str(ROOT / "accessory" / "main_finetune.py")
DEMOS = [str(ROOT / "demos" / name) for name in ("single_turn.py", "multi_turn.py")]

# Ctrl-C with the first of the package's modules that every program needs.
STOPPED = """
import os, runpy, signal, sys
class Stopping:
    def find_spec(self, name, path=None, target=None):
        if name == "accessory.arguments":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Stopping())
program, sys.argv[1:] = sys.argv[1], []
if program.endswith(".py"):
    sys.path.insert(0, os.path.dirname(program))
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def ended(*command: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("program", ["accessory", MAIN_FINETUNE, *DEMOS])
@pytest.mark.parametrize(("rank", "says"), [("0", "interrupted (Ctrl-C)\n"), ("1", "")])
def test_ctrl_c_among_the_imports_is_a_line_of_rank_0(program: str, rank: str, says: str) -> None:
    assert ended(STOPPED, program, RANK=rank, WORLD_SIZE="2") == (130, says)


@pytest.mark.parametrize(
    ("does", "code"),
    [
        ("return 3", 3),
        ("sys.exit(2)", 2),
        ("sys.exit()", 0),
        # A thread that waits for what never comes.
        ("threading.Thread(target=threading.Event().wait).start(); return 0", 0),
        # Nobody can read it any more.
        ("sys.stderr = open('/dev/full', 'w'); sys.stderr.write('a'); return 0", 0),
        ("sys.stdout.write('an answer'); sys.stdout = open('/dev/full', 'w'); sys.stdout.write('a'); return 0", 1),
    ],
)
def test_the_process_ends_with_the_programs_code(does: str, code: int) -> None:
    script = (
        f"import os, sys, threading\nfrom accessory.commands.process import run\ndef program(): {does}\nrun(program)"
    )
    assert ended(script) == (code, "")


def test_a_page_that_starts_its_ranks_is_refused_on_those_of_a_launcher(tmp_path: Path) -> None:
    """Once; also where the rest of the arguments is wrong."""
    command = [sys.executable, DEMOS[1], "--pretrained_path", tmp_path / "absent"]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True)
        for place in by_hand(2)
    ]
    said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert said == ["ERROR: multi_turn.py starts its ranks itself: give --n_gpus N in place of torchrun\n", ""]
    assert [rank.returncode for rank in ranks] == [1, 1]
