"""Training, generation and serving alone on the machine, and beside one other process that computes all the time.

    python benchmarks/busy.py                                       # as a user has it
    python benchmarks/busy.py --settings as-it-is,GOMP_SPINCOUNT=300000,GOMP_SPINCOUNT=0,OMP_NUM_THREADS=1

The model is `accessory tiny`'s, whose threads wait for one another the most: every product is small. Each measurement
is a program of its own that works a while before it is timed; alone and beside take turns. A setting is a variable of
the environment, or several joined by "+"; any of those above switches off what `accessory.model.threads` does, and
300000 turns of spinning are what GNU's OpenMP does when nobody sets it.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

WORKS = ("train", "generate", "generate on 2 ranks", "serve")
PROMPT = "The list method"
TOKENS = 64
_BUSY = "while True: pass"
# Until the process ends.
_KEPT = ExitStack()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", default="as-it-is", help="joined by commas")
    parser.add_argument("--works", default=",".join(WORKS), help="joined by commas")
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement (default 6)")
    parser.add_argument("--times", type=int, default=3, help="that each is taken (default 3)")
    parser.add_argument("--work", nargs=2, metavar=("WORK", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(*arguments.work, arguments.seconds)
        return

    import torch
    from machine import cpu_name

    from accessory.tools.tiny import make_tiny

    print(f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.python_version()}, torch {torch.__version__}")
    print("| work | setting | alone | beside one busy process | alone / beside |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        make_tiny(Path(scratch) / "tiny", steps=1)
        for name in arguments.works.split(","):
            for setting in arguments.settings.split(","):
                alone, beside = [], []
                for _ in range(arguments.times):
                    alone.append(rate(name, setting, f"{scratch}/tiny", arguments.seconds))
                    with busy():
                        beside.append(rate(name, setting, f"{scratch}/tiny", arguments.seconds))
                one, other = statistics.median(alone), statistics.median(beside)
                unit = "steps/s" if name == "train" else "tokens/s"
                print(f"| {name} | {setting} | {one:.1f} {unit} | {other:.1f} | {one / other:.1f} |", flush=True)


def rate(name: str, setting: str, model: str, seconds: float) -> float:
    """What one program reaches, in units of a second."""
    own = dict(pair.split("=", 1) for pair in setting.split("+") if "=" in pair)
    program = [__file__, "--work", name, model, "--seconds", str(seconds)]
    command = [sys.executable, *(["-c", _ON_RANKS] if name.endswith("ranks") else []), *program]
    output = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.split()[-1])


# As `accessory generate --nproc 2` starts its ranks.
_ON_RANKS = """
import sys
from collections import deque
from accessory.launch.local import Ranks
from accessory.launch.placement import Placement, environments
store, own = environments(Placement.of(2, None, device="cpu"))
with Ranks([sys.executable, *sys.argv[1:]], own) as ranks:
    sys.exit(ranks.wait(deque()))
"""


@contextmanager
def busy() -> Iterator[None]:
    """One other process that computes meanwhile."""
    other = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def work(name: str, model: str, seconds: float) -> None:
    """Do a work for a while, and print how much of it a second has seen."""
    units, made = {"train": training, "serve": serving}.get(name, generation)(model)
    begin = time.perf_counter()
    while goes_on(begin + seconds / 3):
        made()
    count, begin = 0, time.perf_counter()
    while goes_on(begin + seconds):
        made()
        count += units
    if os.environ.get("RANK", "0") == "0":
        print(count / (time.perf_counter() - begin), flush=True)
    os._exit(0)


def goes_on(end: float) -> bool:
    """Whether it is earlier, by the clock of the first rank."""
    import torch
    import torch.distributed as dist

    earlier = torch.tensor(time.perf_counter() < end)
    if dist.is_initialized():
        dist.broadcast(earlier, 0)
    return bool(earlier)


def training(model: str) -> tuple[int, Callable[[], object]]:
    """The step of `accessory tiny`."""
    import torch

    from accessory.model.meta import MetaModel
    from accessory.train.optim import adamw
    from accessory.train.trainer import train_step

    own = MetaModel.from_pretrained(model, max_seq_len=256, dtype=torch.float32).train()
    own.requires_grad_(True)
    optimizer = adamw(own.named_parameters(), lr=0.0, weight_decay=0.1)
    rows = torch.randint(3, 2000, (4, 128))
    return 1, lambda: train_step(own, optimizer, [(rows, rows)], lr=1e-4, clip_grad=1.0)


def generation(model: str) -> tuple[int, Callable[[], object]]:
    """`MetaModel.generate`, on the ranks that this process is one of."""
    import logging

    import torch

    from accessory.launch.rendezvous import process_group_of_launcher
    from accessory.model.meta import MetaModel

    group = _KEPT.enter_context(process_group_of_launcher("cpu", say=lambda error: logging.error("%s", error)))
    own = MetaModel.from_pretrained(model, max_seq_len=256, dtype=torch.float32, mp_group=group)
    return TOKENS, lambda: own.generate([PROMPT], max_gen_len=TOKENS, temperature=0.0)


def serving(model: str) -> tuple[int, Callable[[], object]]:
    """Four requests at once to an engine with a process of its own."""
    from accessory.generation.sampling import Sampling
    from accessory.serve.driver import Driver

    driver = Driver(model, max_seq_len=256, device="cpu")
    prompt = driver.tokenizer.encode(PROMPT, bos=True, eos=False)
    sampling = Sampling(max_gen_len=TOKENS)

    def four() -> None:
        for stream in [driver.submit(prompt, sampling) for _ in range(4)]:
            for _ in stream:
                pass

    return 4 * TOKENS, four


if __name__ == "__main__":
    main()
