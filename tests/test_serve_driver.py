"""The driver: one process that owns two ranks, which live through idle times, cancellations and bad calls."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from models import completions, load
from patience import PATIENCE, wait_until
from programs import Program

from accessory.errors import CheckpointError, OutOfMemory
from accessory.generation.sampling import Sampling
from accessory.launch.placement import Placement, environment_of
from accessory.serve.driver import Driver
from accessory.serve.request import Event, RankLost

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("one_thread")]

PROMPTS = [[1, *range(10 + length, 10 + 2 * length)] for length in (1, 60, 7, 3, 30, 2, 17, 45, 1, 5)]
SETTINGS = {"max_seq_len": 128, "dtype": "fp32", "device": "cpu"}
TIMEOUT = 2.0  # seconds, of collectives


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    config = small_config()
    target = tmp_path_factory.mktemp("driver") / "small"
    return write_folder(target, random_tensors(config, 3), config, files=2, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    with Driver(folder, ranks=2, slots=4, prefill_tokens=16, timeout=TIMEOUT, restart=True, **SETTINGS) as started:
        yield started
    assert not children()


@pytest.fixture
def others() -> set[int]:
    """Process ids of the ranks that are there before a test."""
    return set(children_ids())


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def children() -> dict[int, int]:
    """Process ids of the two ranks of this module's driver, by rank."""
    return {rank: pid for pid, (rank, size) in children_ids().items() if size == 2}


def children_ids() -> dict[int, tuple[int, int]]:
    """The ranks of all of this process's drivers, another module's among them: rank and number of ranks, by process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(pair.partition("=")[::2] for pair in (folder / "environ").read_text().split("\0"))
            command = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == os.getpid() and "accessory.serve.worker" in command:
            found[int(folder.name)] = (int(variables["RANK"]), int(variables["WORLD_SIZE"]))
    return found


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_answers_of_two_ranks_are_those_of_one_model_alone(driver: Driver, folder: Path) -> None:
    model = load(folder)
    eos = model.tokenizer.eos_id
    alone = [completions(model.llma, [prompt], max_gen_len=40, eos_id=eos)[0] for prompt in PROMPTS]
    streams = [driver.submit(prompt, Sampling(max_gen_len=40)) for prompt in PROMPTS]
    together = [tokens_of(list(stream)) for stream in streams]
    assert [[token for token in tokens if token != eos] for tokens in together] == alone
    assert driver.name == "small"
    assert driver.args.max_seq_len == 128


def test_idle_ranks_rest_and_outlive_the_time_out_of_collectives(driver: Driver) -> None:
    sampling = Sampling(max_gen_len=10)
    before = tokens_of(list(driver.submit(PROMPTS[2], sampling)))
    ranks = children()
    assert sorted(ranks) == [0, 1]
    used = {rank: processor_seconds(pid) for rank, pid in ranks.items()}
    time.sleep(1.5 * TIMEOUT)
    # Gloo's own threads wake now and then; a rank that asked again and again would use a core's 3 s.
    assert all(processor_seconds(pid) - used[rank] < 0.5 for rank, pid in ranks.items())
    assert tokens_of(list(driver.submit(PROMPTS[2], sampling))) == before
    assert children() == ranks


def test_ranks_live_in_the_programs_own_session(driver: Driver) -> None:
    assert {os.getsid(pid) for pid in children().values()} == {os.getsid(0)}


def test_many_cancellations_leave_all_as_it_was(driver: Driver) -> None:
    chance = random.Random(0)
    sampling = Sampling(max_gen_len=60)
    before = tokens_of(list(driver.submit(PROMPTS[2], sampling)))
    threads, sizes = threading.active_count(), {}
    for round_ in range(2):
        for _ in range(6):
            streams = [driver.submit(chance.choice(PROMPTS), sampling) for _ in range(6)]
            for stream in streams:
                wanted = chance.randint(0, 8)
                for count, _ in enumerate(stream):
                    if count >= wanted:
                        break
        wait_until(lambda: driver.load.running == driver.load.waiting == 0)
        sizes[round_] = [resident(pid) for pid in children().values()]
    assert driver.load.cache_tokens == 0
    assert driver.load.cancelled >= 50
    assert tokens_of(list(driver.submit(PROMPTS[2], sampling))) == before
    assert threading.active_count() == threads
    assert all(later - earlier < 2**23 for earlier, later in zip(*sizes.values(), strict=True))


def test_bad_calls_raise_and_harm_nobody(driver: Driver, folder: Path) -> None:
    stream = driver.submit(PROMPTS[1], Sampling(max_gen_len=50))
    with pytest.raises(ValueError, match="no token to score"):
        driver.call("evaluate_examples", [[1]])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        driver.call("compute_logits", [[1, 999]])
    with pytest.raises(TypeError, match="examples"):
        driver.call("compute_logits")
    with pytest.raises(Exception, match="pickle"):
        driver.call("compute_logits", lambda: None)
    logits = driver.call("compute_logits", [PROMPTS[4]])
    torch.testing.assert_close(logits, load(folder).compute_logits([PROMPTS[4]]))
    assert len(tokens_of(list(stream))) == 50


@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_that_is_killed_is_told_of_and_comes_back(driver: Driver, rank: int) -> None:
    before = tokens_of(list(driver.submit(PROMPTS[2], Sampling(max_gen_len=20))))
    reached = threading.Event()
    told: list[Event | Exception] = []

    def on_event(event: Event | Exception) -> None:
        told.append(event)
        reached.set()

    driver.submit(PROMPTS[0], Sampling(max_gen_len=120), on_event=on_event)
    stream = driver.submit(PROMPTS[0], Sampling(max_gen_len=120))
    assert reached.wait(PATIENCE)
    old = children()
    os.kill(old[rank], signal.SIGKILL)
    with pytest.raises(RankLost, match=rf"rank {rank} of 2 was killed \(SIGKILL\)"):
        list(stream)
    wait_until(lambda: isinstance(told[-1], RankLost))
    wait_until(lambda: driver.ready)
    assert driver.failure is None
    assert tokens_of(list(driver.submit(PROMPTS[2], Sampling(max_gen_len=20)))) == before
    assert not set(old.values()) & set(children().values())


def test_without_restart_a_loss_is_for_good(folder: Path, others: set[int]) -> None:
    with Driver(folder, ranks=1, slots=1, **SETTINGS) as driver:
        (pid,) = set(children_ids()) - others
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not driver.ready)
        assert driver.failure == "rank 0 of 1 was killed (SIGKILL)"
        with pytest.raises(RankLost, match="SIGKILL"):
            driver.submit(PROMPTS[0], Sampling(max_gen_len=1))
        with pytest.raises(RankLost, match="SIGKILL"):
            driver.call("compute_logits", ["a"])
    assert set(children_ids()) == others


def test_ranks_come_back_when_their_model_does_and_whatever_is_open(
    folder: Path, others: set[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Starting again fails once, in a program that has more files open than select() can watch."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    with ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        with Driver(model, ranks=1, slots=1, restart=True, **SETTINGS) as driver:
            (pid,) = set(children_ids()) - others
            model.rename(tmp_path / "away")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: "the ranks do not come back" in caplog.text)
            assert not driver.ready
            (tmp_path / "away").rename(model)
            wait_until(lambda: driver.ready)
            assert tokens_of(list(driver.submit(PROMPTS[0], Sampling(max_gen_len=3))))
    assert set(children_ids()) == others


def test_what_cannot_be_loaded_is_said_by_the_constructor(
    folder: Path, tmp_path: Path, others: set[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match="no_such_folder does not exist"):
        Driver(tmp_path / "no_such_folder", ranks=2, device="cpu")
    with pytest.raises(CheckpointError):
        Driver(tmp_path, ranks=1, device="cpu")
    with pytest.raises(OSError, match=r"the ranks cannot meet at nowhere\.invalid:\d+ .*master_addr"):
        Driver(folder, ranks=2, device="cpu", master_addr="nowhere.invalid")
    large = Path(shutil.copytree(folder, tmp_path / "large"))
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "dim": 2**16, "hidden_dim": 2**30}))
    with pytest.raises(OutOfMemory, match=r"out of memory \(\d+ bytes more were asked for\): hold"):
        Driver(large, ranks=1, device="cpu")
    assert "Traceback" not in capfd.readouterr().err
    assert set(children_ids()) == others


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 1000}, r"cannot be split over 1000 ranks: .*Rank counts that work: 1, 2"),
        ({"ranks": 1, "quant": "int4"}, "cannot be quantized so: .*whole groups of 64"),
        ({"ranks": 1, "max_seq_len": 2}, "max_seq_len must be"),
        ({"ranks": 1, "expert_placement": "x"}, "expert_placement"),
        ({"ranks": 1, "pretrained_path": ""}, "pretrained_path must be"),
        ({"ranks": 1, "pretrained_path": []}, "pretrained_path must be"),
    ],
)
def test_what_ranks_would_refuse_starts_none(
    folder: Path, settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(placement: Placement) -> None:
        raise AssertionError(f"{placement.size} processes were to be started")

    monkeypatch.setattr("accessory.serve.driver.RankProcesses", start)
    with pytest.raises(ValueError, match=message):
        Driver(**{"pretrained_path": folder, **SETTINGS, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": 0}, "ranks must be"),
        ({"ranks": "2"}, "ranks must be"),
        ({"gpu_ids": []}, "gpu_ids must be"),
        ({"gpu_ids": [0, 0]}, "gpu_ids must be"),
        ({"gpu_ids": 1}, "gpu_ids must be"),
        ({"ranks": 3, "gpu_ids": [0, 1]}, "3 ranks were asked for on 2 cards"),
        ({"slots": 0}, "slots must be"),
        ({"queue": -1}, "queue must be"),
        ({"prefill_tokens": 0}, "prefill_tokens must be"),
        ({"timeout": 0}, "timeout must be"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Driver(folder, **{**SETTINGS, **settings})  # type: ignore[arg-type]


PROGRAM = """
import sys, time
from accessory.generation.sampling import Sampling
from accessory.serve.driver import Driver
with Driver(sys.argv[1], ranks=2, max_seq_len=512, dtype="fp32", device="cpu", slots=2) as driver:
    while True:
        for event in driver.submit([1, 5], Sampling(max_gen_len=500, temperature=1.0)):
            if event.finish is None and not sys.argv[2:]:
                sys.argv.append("said")
                print("it answers", flush=True)
"""


@pytest.mark.parametrize("how", ["kill -9", "interrupt"])
def test_no_rank_outlives_its_driver(folder: Path, how: str) -> None:
    with Program([sys.executable, "-c", PROGRAM, folder]) as program:
        program.wait_for("it answers")
        assert len(program.processes()) == 3
        if how == "interrupt":  # a terminal tells every process of the foreground
            os.killpg(program.process.pid, signal.SIGINT)
        else:
            program.send(signal.SIGKILL)
        program.wait_for_all()
        if how == "interrupt":
            assert "KeyboardInterrupt" in program.text
            assert program.text.count("Traceback") == 1


def test_cards_are_taken_from_those_that_the_program_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch is told of three cards, of which the driver's program may see the machine's numbers 7, 2 and 5."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,2,5")
    placement = Placement.of(None, [2, 0], device=None)
    assert (placement.size, placement.on_cpu) == (2, False)
    assert environment_of(placement)["CUDA_VISIBLE_DEVICES"] == "5,7"
    with pytest.raises(ValueError, match=r"gpu_ids \[1, 3\] go beyond the 3 GPUs"):
        Placement.of(None, [1, 3], device=None)
    # More ranks than cards, or a device that says so: the CPU.
    for shared in (Placement.of(4, None, device=None), Placement.of(4, None, device="cpu")):
        assert shared.on_cpu


@pytest.mark.parametrize(
    ("cards", "ranks", "device", "says"),
    [
        (0, 1, "cuda", "PyTorch sees no CUDA device: give the device cpu"),
        (0, 2, "cuda:1", "PyTorch sees no CUDA device: give the device cpu"),
        (2, 1, "cuda:2", "PyTorch sees only cuda:0 to cuda:1"),
        (2, 3, "cuda", "3 ranks on this host and 2 GPUs"),
        (2, 2, "cuda:0", "is one card, and there are 2 ranks: give the device cuda"),
        (2, 1, "gpu", "'gpu' is unknown: give cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_for_all_ranks(
    folder: Path, cards: int, ranks: int, device: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before a process is started for any."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr("accessory.serve.driver.RankProcesses", None)
    with pytest.raises(ValueError, match=says):
        Driver(folder, ranks=ranks, **{**SETTINGS, "device": device})  # type: ignore[arg-type]
    on_cards = Placement.of(2, None, device="cuda") if cards == 2 else Placement.of(2, None, device="cpu")
    assert on_cards.on_cpu is (cards == 0)
