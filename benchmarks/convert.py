"""Converting a large checkpoint from form to form: peak private memory, and time beside a copy of the same bytes.

    python benchmarks/convert.py            # makes 12 GB, needs three times as much room, and removes all of it
    python benchmarks/convert.py --gb 2 --times 3

Each conversion is a process of its own that notes its RssAnon every few milliseconds: private memory, without the pages
of the mapped files, which are the kernel's to drop. Between two of them the source's files are copied and synced; the
ratio is the copy's time over the conversion's, of the medians.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from machine import cpu_name, rss_anon

# The largest tensor comes on top.
ALLOWED = 1.5e9
# From a form to another; "release" is the torrent's one archive.
ROUTES = (
    ("release", "accessory"),
    ("accessory", "hf"),
    ("hf", "accessory"),
    ("hf", "accessory-sparse"),
    ("accessory-sparse", "hf"),
    ("hf", "mistral"),
    ("mistral", "hf"),
    ("hf", "gguf"),
    ("gguf", "hf"),
)
SIZES = {"dim": 4096, "hidden_dim": 14336, "head_dim": 128, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 32000}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=12, help="of the checkpoint (default 12)")
    parser.add_argument("--times", type=int, default=5, help="that each conversion is timed (default 5)")
    arguments = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.python_version()}, torch {torch.__version__}")
    failed = False
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(scratch)
        largest = make_release(folder / "release", arguments.gb)
        print(f"{'from':18}{'to':18}{'GB':>6}{'peak RssAnon':>14}{'seconds':>9}{'cp, fsync':>11}{'ratio':>7}")
        for source, to in ROUTES:
            made = folder / to
            times, copies, peaks = [], [], []
            for _ in range(arguments.times):
                shutil.rmtree(made, ignore_errors=True)
                copies.append(copied(folder / source, folder / "copy"))
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, peak = pool.apply(converted, (folder / source, made, to))
                times.append(seconds)
                peaks.append(peak)
            size = sum(path.stat().st_size for path in made.iterdir())
            own, copy = statistics.median(times), statistics.median(copies)
            failed |= max(peaks) > ALLOWED + largest
            print(
                f"{source:18}{to:18}{size / 1e9:>6.1f}{max(peaks) / 1e6:>11,.0f} MB{own:>9.1f}{copy:>11.1f}"
                f"{copy / own:>7.2f}",
                flush=True,
            )
            if source in ("release", "mistral", "accessory-sparse", "gguf"):
                shutil.rmtree(folder / source)
    if failed:
        sys.exit("a conversion used more private memory than allowed")


def make_release(folder: Path, gigabytes: float) -> int:
    """Write a bfloat16 model of Mixtral's widths and so many layers; returns the bytes of its largest tensor."""
    from accessory.checkpoint.containers import create_tensors
    from accessory.checkpoint.layouts import MISTRAL
    from accessory.config import ModelArgs, MoEArgs
    from accessory.files import write_json

    experts = 8
    layer = 2 * (3 * experts * SIZES["dim"] * SIZES["hidden_dim"] + 2.5 * SIZES["dim"] ** 2)
    layers = max(1, round((gigabytes * 1e9 - 4 * SIZES["dim"] * SIZES["vocab_size"]) / layer))
    args = ModelArgs(**SIZES, n_layers=layers, moe=MoEArgs(num_experts=experts))
    folder.mkdir()
    sources = [source for source in MISTRAL.sources(args, 1) if source.written]
    tensors = {source.key: (source.shape, torch.bfloat16) for source in sources}
    block = torch.randn(1 << 22).bfloat16()
    for tensor in create_tensors(folder / "consolidated.00.pth", tensors).values():
        for part in tensor.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
    write_json(folder / "params.json", args.to_dict())
    return max(2 * torch.Size(source.shape).numel() for source in sources)


def copied(source: Path, copy: Path) -> float:
    """Seconds that a copy of a folder's files takes until it is on the disk."""
    start = time.perf_counter()
    shutil.copytree(source, copy)
    for path in copy.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def converted(source: Path, destination: Path, to: str) -> tuple[float, int]:
    """Seconds of a conversion, and the peak of its private memory in bytes."""
    from accessory.checkpoint.convert import convert

    peak, over = [rss_anon()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    convert(source, destination, to=to, mp=4 if to.startswith("accessory") else None)
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    return seconds, peak[0]


if __name__ == "__main__":
    main()
