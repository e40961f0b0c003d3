"""Peak private memory of loading the shape 'mid' (a 1.6 GB checkpoint), at mp 1 and 2, as it is and quantized, and as
Hugging Face's folder, whose time is held against ours in turn.

    python benchmarks/load.py

Each rank is a process of its own that notes its RssAnon every few milliseconds while it loads: private memory, without
the pages of the mapped files, which are the kernel's to drop.
"""

import itertools
import multiprocessing
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from machine import free_port, rss_anon

# Of a rank's weights, and bytes beside them: as they are stored, and quantized while they are read.
ALLOWED = {None: (1.15, 400e6), "int8": (1.2, 1.5e9), "int4": (1.2, 1.5e9), "nf4": (1.2, 1.5e9)}


# Of the comparison, for medians.
ROUNDS = 5


def main() -> None:
    from mid import ARGS, write_checkpoint

    from accessory.checkpoint.convert import convert
    from accessory.model.transformer import Transformer
    from accessory.parallel.state import ParallelState
    from accessory.train.init import init_weights

    print(f"{platform.python_version()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        model = Transformer(ARGS, ParallelState.single("cpu"), dtype=torch.bfloat16)
        init_weights(model, seed=0)
        folder = write_checkpoint(Path(scratch) / "mid", model, files=4)
        del model
        convert(folder, Path(scratch) / "hf", to="hf")
        print(f"{'':16}{'own weights':>14}{'peak RssAnon':>14}{'allowed':>12}{'seconds':>9}")
        failed = False
        for quant, size in itertools.product(ALLOWED, (1, 2)):
            for rank, (own, peak, seconds) in enumerate(measure(folder, size, quant)):
                factor, extra = ALLOWED[quant]
                allowed = factor * own + extra
                failed |= peak > allowed
                label = f"{quant or 'bf16'} mp {size}.{rank}"
                print(
                    f"{label:16}{own / 1e6:>11,.0f} MB{peak / 1e6:>11,.0f} MB{allowed / 1e6:>9,.0f} MB{seconds:>9.1f}"
                )
        for size in (1, 2):
            rounds = [(measure(folder, size, None), measure(Path(scratch) / "hf", size, None)) for _ in range(ROUNDS)]
            factor, extra = ALLOWED[None]
            for rank, (own, _, _) in enumerate(rounds[0][1]):
                peak = max(theirs[rank][1] for _, theirs in rounds)
                failed |= peak > factor * own + extra
                ours, hf = (statistics.median(both[form][rank][2] for both in rounds) for form in (0, 1))
                allowed = factor * own + extra
                print(
                    f"{f'hf mp {size}.{rank}':16}{own / 1e6:>11,.0f} MB{peak / 1e6:>11,.0f} MB{allowed / 1e6:>9,.0f} MB"
                    f"{hf:>9.2f}  {hf / ours:.2f} x ours"
                )
    if failed:
        sys.exit("a rank used more private memory than allowed")


def measure(folder: Path, size: int, quant: str | None) -> list[tuple[int, int, float]]:
    """(own bytes of weights, peak RssAnon in bytes, seconds) of every rank."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    with context.Pool(size) as pool:
        return pool.starmap(load_on_rank, [(folder, rank, size, port, quant) for rank in range(size)], chunksize=1)


def load_on_rank(folder: Path, rank: int, size: int, port: int, quant: str | None) -> tuple[int, int, float]:
    """Load and report; runs in a process of its own."""
    from accessory.model.meta import MetaModel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    settings = {"mp_group": dist.group.WORLD, "dtype": torch.bfloat16, "device": "cpu", "quant": quant}
    model = MetaModel.from_pretrained(folder, **settings)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    dist.destroy_process_group()
    return own, max(peak[0], rss_anon()), seconds


if __name__ == "__main__":
    main()
