"""Throughput and waiting of `accessory serve` with 1, 4, 16 and 64 clients at once.

    python benchmarks/serve.py                                # the tiny model; 'mid' beside `transformers serve`
    python benchmarks/serve.py --models tiny --clients 64 --requests 2000   # are any lost?
    python benchmarks/serve.py --models mid --max-tokens 256 --without-transformers

Prompts are pieces of Python's documentation of 40 to 400 characters; answers are greedy, streamed, and as long as
--max-tokens allows (a model of random weights seldom ends one). The clients share the machine with the server. The
table is Markdown, and a line under it says how the goal is met (16 clients get 4 times the tokens of one); the program
fails where a request does.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import torch
from clients import Outcome, ask_at_once, prompts_of
from machine import cpu_name, free_port

from accessory.kernels import native_variant
from accessory.tools.corpus import documentation_corpus

SECONDS_TO_START = 300
CONTEXT = 1024
GOAL, GOAL_CLIENTS = 4.0, 16


@dataclass(frozen=True)
class Server:
    """A program to measure.

    Attributes:
        label: its name in the table.
        command: with PORT in place of the port.
        model: the name that requests give.
    """

    label: str
    command: tuple[str, ...]
    model: str


def main() -> None:
    arguments = _arguments()
    print(f"{cpu_name()}, {os.cpu_count()} CPUs, {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"kernels {native_variant()}, {time.strftime('%Y-%m-%d')}")
    print(f"{arguments.requests} requests in each row, {arguments.max_tokens} tokens each, {arguments.slots} slots\n")
    print("| server | model | clients | tokens/s | to 1 client | first text p50 | p95 | failures |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed, reached = 0, dict[str, float]()
    text = "\n".join(documentation_corpus(400_000))
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for name in arguments.models:
            for server in _servers(name, Path(scratch), arguments):
                failed += _measure(server, name, text, arguments, reached)
    for name, ratio in reached.items():
        verdict = "met" if ratio >= GOAL else "missed"
        print(
            f"\n{name}: {GOAL_CLIENTS} clients get {ratio:.2f} x the tokens of one; the goal, {GOAL:g} x, is {verdict}"
        )
    if failed:
        sys.exit(f"{failed} requests failed")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("tiny", "mid"), default=["tiny", "mid"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=64, help="in each row (default 64)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (default 64)")
    parser.add_argument("--slots", type=int, default=16, help="answers that our server writes at once (default 16)")
    parser.add_argument("--nproc", type=int, default=1, help="ranks of our server (default 1)")
    parser.add_argument("--dtype", default="auto", help="of our server's weights (default: as stored)")
    parser.add_argument("--tiny", type=Path, help="folder of a tiny model that is there already")
    parser.add_argument("--without-transformers", action="store_true", help="leave out `transformers serve` on 'mid'")
    return parser.parse_args()


def _servers(name: str, scratch: Path, arguments: argparse.Namespace) -> Iterator[Server]:
    """The programs to measure with a model, whose files are made first."""
    theirs: Path | None = None
    if name == "tiny":
        ours = arguments.tiny or _make_tiny(scratch)
    else:
        ours, theirs = _make_mid(scratch, with_theirs=not arguments.without_transformers)
    # Room for every client: what is measured here is the wait, not the refusal.
    queue = str(max(arguments.clients))
    command = [sys.executable, "-m", "accessory", "serve", str(ours), "--port", "PORT", "--nproc", str(arguments.nproc)]
    command += ["--slots", str(arguments.slots), "--queue", queue, "--max_seq_len", str(CONTEXT)]
    command += ["--dtype", arguments.dtype, "--device", "cpu", "--model-name", name]
    yield Server("accessory", tuple(command), name)
    if theirs is None:
        return
    program = Path(sys.executable).with_name("transformers")
    if not program.is_file():
        print("transformers serve is not installed: pip install 'transformers[serving]'", file=sys.stderr)
        return
    command = [str(program), "serve", str(theirs), "--port", "PORT", "--device", "cpu", "--dtype", "bfloat16"]
    version = metadata.version("transformers")
    yield Server(f"transformers {version}", tuple(command), str(theirs))
    yield Server(f"transformers {version}, continuous batching", (*command, "--continuous-batching"), str(theirs))


def _make_tiny(scratch: Path) -> Path:
    from accessory.tools.tiny import make_tiny

    make_tiny(scratch / "tiny", steps=150)
    return scratch / "tiny"


def _make_mid(scratch: Path, *, with_theirs: bool) -> tuple[Path, Path | None]:
    """The same random weights as a checkpoint of ours and, where wanted, as a folder of transformers."""
    from mid import ARGS, transformers_model, with_weights_of, write_checkpoint
    from transformers import LlamaTokenizer

    model = transformers_model(ARGS)
    folder = write_checkpoint(scratch / "mid", with_weights_of(model, ARGS), files=1)
    if not with_theirs:
        return folder, None
    theirs = scratch / "mid-transformers"
    model.save_pretrained(theirs)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(theirs)
    return folder, theirs.absolute()


def _measure(server: Server, name: str, text: str, arguments: argparse.Namespace, reached: dict[str, float]) -> int:
    """Print a server's rows; returns how many requests failed. Notes in ``reached`` what the goal is about."""
    failed = 0
    alone: float | None = None
    with _running(server) as url:
        if url is None:
            print(f"| {server.label} | {name} | does not start |", flush=True)
            return 0
        # What is made once is made before the clock runs.
        ask_at_once(url, server.model, prompts_of(text, 4), clients=4, max_tokens=8)
        for clients in arguments.clients:
            prompts = prompts_of(text, max(arguments.requests, clients))
            outcome = ask_at_once(url, server.model, prompts, clients=clients, max_tokens=arguments.max_tokens)
            alone = outcome.rate if clients == 1 else alone
            print(_row(server, name, clients, outcome, alone), flush=True)
            if alone and clients == GOAL_CLIENTS and server.label == "accessory":
                reached[name] = outcome.rate / alone
            failed += len(outcome.failures)
            for failure in dict.fromkeys(outcome.failures):
                print(failure, file=sys.stderr)
    return failed if server.label == "accessory" else 0


def _row(server: Server, name: str, clients: int, outcome: Outcome, alone: float | None) -> str:
    ratio = f"{outcome.rate / alone:.2f} x" if alone else ""
    waits = [f"{outcome.percentile(percent) * 1e3:,.0f} ms" for percent in (50, 95)]
    cells = [server.label, name, str(clients), f"{outcome.rate:,.1f}", ratio, *waits, str(len(outcome.failures))]
    return f"| {' | '.join(cells)} |"


@contextmanager
def _running(server: Server) -> Iterator[str | None]:
    """The server's address once it is well, or None where it ends before."""
    port = free_port()
    command: Sequence[str] = [part.replace("PORT", str(port)) for part in server.command]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        program = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            well = _wait_until_well(program, url)
            if not well:
                log.seek(0)
                print(log.read().decode(errors="replace")[-2000:], file=sys.stderr)
            yield url if well else None
        finally:
            program.terminate()
            try:
                program.wait(15)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def _wait_until_well(program: "subprocess.Popen[bytes]", url: str) -> bool:
    end = time.monotonic() + SECONDS_TO_START
    while program.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    return False


if __name__ == "__main__":
    main()
