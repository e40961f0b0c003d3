"""Fixtures that tests share: pools of ranks, small tokenizers, and one tiny trained model."""

import logging
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when PyTorch is imported, here and in what the tests start: a thread that waits for another soon lets go of its
# core. By default it holds it for milliseconds, in which the other thread may be the one that wants to run.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch
from filelock import FileLock
from http_api import ServedApi
from ranks import RankPool
from talking import teach

from accessory.serve.driver import Driver
from accessory.tools.corpus import documentation_corpus, train_tokenizer
from accessory.tools.tiny import TinyReport, make_tiny

torch.set_num_threads(2)

# Started in the background of a shell, programs ignore Ctrl-C, and so would those that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

Made = TypeVar("Made")
MadeOnce = Callable[[str, Callable[[Path], Made]], Made]

# Files whose tests start programs again and again, or train: `make test-fast` leaves them out, and most of the time.
SLOW = {
    *("test_docs_run", "test_finetune_launch", "test_trained_answers", "test_commands", "test_finetune_signals"),
    *("test_finetune_lost_ranks", "test_quant_quality", "test_quant_training", "test_finetune_resume"),
    *("test_finetune_kill", "test_http_clients", "test_building", "test_finetune_ranks", "test_finetune_options"),
    *("test_training", "test_peft_training", "test_tiny", "test_quant_model", "test_padded_vocabulary"),
    *("test_multi_gpu_wrapper", "test_dialogues", "test_simple_inference", "test_stopping", "test_triton_kernels"),
    *("test_triton_steps", "test_web_browser", "test_validation", "test_beside_trainer", "test_web_demos"),
    *("test_chat", "test_http_command", "test_memory", "test_form_exports", "test_families", "test_expert_parallel"),
    *("test_train_state", "test_recompute", "test_evaluate", "test_export", "test_threads", "test_texts", "test_gguf"),
    *("test_benchmark_sides", "test_peft_model"),
}


# The longest tests, begun first: one that is begun last is what all others wait for. One of each, then the second of
# each, so that the other two run where the pages that come later would wait for the first.
FIRST = (
    "test_a_page_runs_with_little_of_each_training",
    "test_a_run_survives_kills",
    "test_an_experiment_as_the_reference_page_starts_it",
    "test_every_door_gives_every_trained_answer",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    by_name = [[item for item in items if getattr(item, "originalname", item.name) == name] for name in FIRST]
    first = [item for turn in zip_longest(*by_name) for item in turn if item is not None]
    begun = set(first)
    rest = [item for item in items if item not in begun]
    items[:] = dealt(first, rest, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def dealt(first: list[pytest.Item], rest: list[pytest.Item], hands: int) -> list[pytest.Item]:
    """Each of xdist's workers begins with an equal part of all: to each its own of the first, then of the rest."""
    part = -(-len(rest) // hands)
    return [item for hand in range(hands) for item in (*first[hand::hands], *rest[hand * part : hand * part + part])]


LOGGERS = ("accessory", "accessory.kernels", "accessory.data", "accessory.text")


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A command that a test runs in this process sets logging up, for itself and not for the tests behind it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(n)`` is the session's pool of n gloo processes."""
    pools: dict[int, RankPool] = {}

    def pool(size: int) -> RankPool:
        return pools.setdefault(size, RankPool(size))

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, make)``: what ``make`` returns, given a new folder of that name, in one of pytest's processes.

    Where several of them run the files of tests, the first that asks makes it, and the others wait for it.
    """
    together = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        together = together.parent

    def get(name: str, make: Callable[[Path], Made]) -> Made:
        result = together / f"{name}.pickle"
        with FileLock(together / f"{name}.lock"):
            if not result.exists():
                folder = together / name
                folder.mkdir(exist_ok=True)  # there already where making it has failed before
                result.write_bytes(pickle.dumps(make(folder)))
            return pickle.loads(result.read_bytes())

    return get


@pytest.fixture(scope="session")
def small_tokenizer(made_once: MadeOnce) -> Path:
    """A sentencepiece model of 384 tokens: 384 divides by 2, 3, 4, 6 and 8."""

    def make(folder: Path) -> Path:
        path = folder / "tokenizer.model"
        train_tokenizer(documentation_corpus(200_000), path, vocab_size=384)
        return path

    return made_once("tokenizer", make)


@pytest.fixture(scope="session")
def tiny(made_once: MadeOnce) -> tuple[Path, TinyReport]:
    """The tiny model's recipe cut short, as a release, and what it says of itself."""

    def make(folder: Path) -> tuple[Path, TinyReport]:
        return folder / "released", make_tiny(folder / "released", steps=150)

    return made_once("tiny", make)


@pytest.fixture(scope="session")
def tiny_engine(tiny: tuple[Path, TinyReport]) -> Iterator[Driver]:
    """A server's engine with the tiny model in float32 on one rank; it holds 4 requests, and 8 may wait."""
    settings = {"dtype": "fp32", "device": "cpu", "max_seq_len": 128}
    with Driver(tiny[0], slots=4, queue=8, **settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def api(tiny_engine: Driver) -> Iterator[ServedApi]:
    """The API with that engine, at a port of this machine."""
    with ServedApi(tiny_engine) as api:
        yield api


@pytest.fixture(scope="session")
def talking(tiny: tuple[Path, TinyReport], made_once: MadeOnce) -> Path:
    """The tiny model taught the dialogues of talking.py."""
    return made_once("talking", lambda folder: teach(tiny[0], folder / "talking"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: tiny products are no faster with more, and slower where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
