"""Fixtures that tests share: pools of ranks, small tokenizers, and one tiny trained model."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when PyTorch is imported, here and in what the tests start: a thread that waits for another soon lets go of its
# core. By default it holds it for milliseconds, in which the other thread may be the one that wants to run.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch
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

LOGGERS = ("accessory", "accessory.kernels", "accessory.data")


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
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 384 tokens: 384 divides by 2, 3, 4, 6 and 8."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(documentation_corpus(200_000), path, vocab_size=384)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyReport]:
    """The tiny model's recipe cut short, as a release, and what it says of itself."""
    folder = tmp_path_factory.mktemp("tiny") / "released"
    return folder, make_tiny(folder, steps=150)


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
def talking(tiny: tuple[Path, TinyReport], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model taught the dialogues of talking.py."""
    return teach(tiny[0], tmp_path_factory.mktemp("talking") / "talking")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: tiny products are no faster with more, and slower where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
