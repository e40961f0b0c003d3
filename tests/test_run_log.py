"""What a run leaves behind for those who watch it, read back with TensorBoard's and Pillow's own readers."""

import contextlib
import errno
import io
import json
import logging
import math
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from accessory.log import setup_logging
from accessory.train import appended_file, trackers
from accessory.train.heatmap import draw
from accessory.train.metrics import StepMetrics, expert_shares, peak_memory_gib
from accessory.train.progress import ProgressLines
from accessory.train.run_log import RunLog

LAYERS, EXPERTS = 3, 4


def pairs(step: int) -> Tensor:
    """Different in every step; layer l gives most to expert l."""
    pairs_LE = torch.full((LAYERS, EXPERTS), 10.0 + step)
    return pairs_LE + 30 * torch.eye(LAYERS, EXPERTS)


def metrics(step: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "epoch": step / 8,
        "loss": 2 + 1 / step,
        "balance_loss": 1.05,
        "lr": 5e-6,
        "grad_norm": 0.71,
        "tokens_per_s": 12345.0,
        "learned_per_s": 2345.0,
        "padding": 0.04,
        "memory": 61.2,
        "pairs_LE": pairs(step),
        **changes,
    }
    return StepMetrics(**values)


def write(folder: Path, steps: range, *, total: int = 10, first: int = 0, every: int = 50) -> None:
    with RunLog(folder, total_steps=total, first_step=first, active=True, heatmap_every=every) as log:
        for step in steps:
            log.step(metrics(step))


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    """All that TensorBoard sees of a run."""
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalar(read: EventAccumulator, tag: str) -> dict[int, float]:
    found = [(event.step, event.value) for event in read.Scalars(tag)]
    assert len(dict(found)) == len(found), "a step stands there twice"
    return dict(found)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The package's logger, whose settings are put back."""
    logger = logging.getLogger("accessory")
    before = logger.handlers[:], logger.level, logger.propagate
    levels = {name: logging.getLogger(f"accessory.{name}").level for name in ("kernels", "data")}
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before
    for name, level in levels.items():
        logging.getLogger(f"accessory.{name}").setLevel(level)


@pytest.fixture
def log(package: logging.Logger, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    package.propagate = True
    with caplog.at_level(logging.INFO, logger="accessory"):
        yield caplog


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


# -- metrics


def test_a_record_says_what_was_measured() -> None:
    pairs_LE = torch.tensor([[1, 5, 1, 1], [0, 4, 0, 4], [0, 0, 0, 0]])
    record = metrics(2, pairs_LE=pairs_LE).to_record()
    assert list(record) == [
        *(
            "step",
            "epoch",
            "loss",
            "balance_loss",
            "lr",
            "grad_norm",
            "tokens_per_s",
            "learned_per_s",
            "padding",
            "memory",
            "max_vio",
            "dead_experts",
        ),
        *("heaviest", "lightest", "experts"),
    ]
    assert record["experts"] == pytest.approx([0.125 / 3, 1.125 / 3, 0.125 / 3, 0.625 / 3], abs=1e-6)
    assert (record["step"], record["epoch"], record["loss"]) == (2, 0.25, 2.5)
    # The third layer has no tokens at all, as in a step of padding.
    assert record["heaviest"] == [[1, 0.625], [1, 0.5], [0, 0.0]]
    assert record["lightest"] == [[0, 0.125], [0, 0.0], [0, 0.0]]
    # 5 where 2 is the mean, and 4 where 2 is; the second layer has two experts without tokens.
    assert (record["max_vio"], record["dead_experts"]) == (pytest.approx((1.5 + 1.0) / 2), 2)
    assert expert_shares(pairs_LE).sum(-1).tolist() == [1, 1, 0]


def test_a_record_has_what_applies_to_some_runs_only_there() -> None:
    record = metrics(1, z_loss=0.5, mfu=0.4, loss_scale=1024.0, skipped=True).to_record()
    assert (record["z_loss"], record["mfu"], record["loss_scale"], record["skipped"]) == (0.5, 0.4, 1024, True)
    assert "skipped" not in metrics(1, loss_scale=1024.0).to_record()


def test_a_record_has_null_for_what_is_not_finite() -> None:
    record = metrics(1, loss=math.nan, grad_norm=math.inf, z_loss=-math.inf).to_record()
    assert record["loss"] is record["grad_norm"] is record["z_loss"] is None
    json.dumps(record, allow_nan=False)


def test_peak_memory_is_what_the_system_says() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    touched = np.ones(2**26, dtype=np.uint8)
    ours = peak_memory_gib(torch.device("cpu"))
    (kib,) = (int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert ours == pytest.approx(kib / 2**20, rel=0.01)
    assert ours > touched.nbytes / 2**30


# -- the picture


def colours(png: bytes) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pixels are reddish and which bluish, left of the colour bar."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    image = image[:, : image.shape[1] * 3 // 4]
    red, blue = image[..., 0], image[..., 2]
    return red - blue > 60, blue - red > 60


def middle(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Row and column."""
    row, column = np.argwhere(mask).mean(0)
    return float(row), float(column)


def test_the_picture_shows_which_expert_has_more() -> None:
    even = [0.25] * EXPERTS
    for layer, expert in ((0, 0), (0, 3), (2, 0), (2, 3)):
        shares_LE = torch.tensor([even] * LAYERS)
        shares_LE[layer, expert], shares_LE[layer, 3 - expert] = 0.45, 0.05
        reddish, bluish = colours(draw(shares_LE))
        (row, heavy), (same_row, light) = middle(reddish), middle(bluish)
        assert (heavy < light) == (expert == 0)
        assert row == pytest.approx(same_row, abs=2)
        assert (row < reddish.shape[0] / 2) == (layer == 0)
    reddish, bluish = colours(draw(torch.tensor([even] * LAYERS)))
    assert not reddish.any()
    assert not bluish.any()
    # Beside numbers, which such a picture has no room for, a cross.
    crossed = torch.full((40, 8), 1 / 7)
    crossed[:, 3] = 0
    plain = crossed.clone()
    plain[:, 3] = 1e-9
    assert draw(crossed) != draw(plain)


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 4), (32, 8), (64, 64)])
def test_the_picture_has_a_size_that_fits_its_cells(layers: int, experts: int) -> None:
    png = draw(torch.full((layers, experts), 1 / experts))
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        width, height = image.size
    assert 450 <= width <= 1600
    assert max(200, min(20 * layers, 1280)) <= height <= 2000
    # Even cells are white, so that nothing in their midst is dark but numbers.
    grey = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    midst = grey[height // 3 : height * 2 // 3, width // 4 : width // 2]
    assert (midst < 100).any() == (layers * experts <= 256)


def test_layers_without_tokens_can_be_drawn() -> None:
    assert draw(torch.zeros(LAYERS, EXPERTS)).startswith(b"\x89PNG")


def test_imports_wait_until_they_are_needed() -> None:
    code = (
        "import sys, torch\nimport accessory.train.run_log as run_log\n"
        "early = [name for name in ('matplotlib', 'tensorboard', 'google.protobuf') if name in sys.modules]\n"
        "run_log.draw(torch.ones(2, 2) / 2)\n"
        "sys.exit(str(early) if early or 'matplotlib.pyplot' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- files


def test_a_run_leaves_lines_events_and_a_picture(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    write(tmp_path, range(1, 6), total=5, every=2)
    assert lines(tmp_path) == [metrics(step).to_record() for step in range(1, 6)]
    read = events(tmp_path)
    assert scalar(read, "loss") == {step: pytest.approx(2 + 1 / step) for step in range(1, 6)}
    for tag, value in (("balance_loss", 1.05), ("lr", 5e-6), ("grad_norm", 0.71), ("tokens_per_s", 12345)):
        assert scalar(read, tag) == dict.fromkeys(range(1, 6), pytest.approx(value))
    assert scalar(read, "memory")[5] == pytest.approx(61.2)
    for layer in range(LAYERS):
        shares_E = pairs(4)[layer] / pairs(4)[layer].sum()
        assert scalar(read, f"expert_share_max/layer_{layer:02d}")[4] == pytest.approx(shares_E.max().item())
        assert scalar(read, f"expert_share_min/layer_{layer:02d}")[4] == pytest.approx(shares_E.min().item())
    assert not {"z_loss", "mfu", "loss_scale"} & set(read.Tags()["scalars"])
    pictures = read.Images("experts")
    assert [picture.step for picture in pictures] == [2, 4, 5]
    assert [pictures[0].width, pictures[0].height] == list(Image.open(io.BytesIO(draw(pairs(1)))).size)
    # Each picture is of the steps since the one before.
    both = draw(expert_shares(pairs(3) + pairs(4)), title="Tokens of each expert, steps 3 to 4")
    assert pictures[1].encoded_image_string == both
    last = draw(expert_shares(pairs(5)), title="Tokens of each expert, step 5")
    assert (tmp_path / "experts.png").read_bytes() == pictures[2].encoded_image_string == last
    assert not warnings_of(log)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts.png", "log.jsonl", "tensorboard"]


def track(folder: Path, name: str, steps: range, *, first: int = 0) -> None:
    settings = {"lr": 1e-3 + first}
    numbers = ("loss", "perplexity", "token_accuracy", "balance_loss", "tokens", "records")
    with RunLog(folder, total_steps=9, first_step=first, active=True, log_to=[name], settings=settings) as run:
        for step in steps:
            run.step(metrics(step))
        run.evaluation(steps[-1], 0.5, dict.fromkeys(numbers, 1.5))


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a file of wandb's: LevelDB's log format behind a head of 7 bytes, in blocks of 32 KiB."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""
        if 2**15 - at % 2**15 < 7:
            at += -at % 2**15


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    track(tmp_path, "wandb", range(1, 4))
    track(tmp_path, "wandb", range(3, 5), first=2)
    assert not warnings_of(log)
    found: list[tuple[str, dict[str, Any]]] = []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        run = ""
        for data in wandb_records(file):
            record = Record()
            record.ParseFromString(data)
            run = record.run.run_id or run
            if record.WhichOneof("record_type") == "history":
                names = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                found.append((run, {name: json.loads(value) for name, value in names.items()}))
    assert len({run for run, _ in found}) == 1, "a resumed run goes on in the same one"
    assert [row["step"] for _, row in found if "loss" in row] == [1, 2, 3, 3, 4]
    assert [row["loss"] for _, row in found if "loss" in row][:2] == [metrics(step).loss for step in (1, 2)]
    assert [(row["step"], row["eval_loss"]) for _, row in found if "eval_loss" in row] == [(3, 1.5), (4, 1.5)]
    pictures = [row["step"] for _, row in found if any(name.startswith("experts/") for name in row)]
    assert pictures == [3, 4], found[-1]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_the_output_folder(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="mlflow's database is not installed")
    track(tmp_path, "mlflow", range(1, 4))
    track(tmp_path, "mlflow", range(3, 5), first=2)
    assert not warnings_of(log)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("accessory").experiment_id])
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.001"})
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(value.step for value in history) == [1, 2, 3, 3, 4]
    assert {value.step: value.value for value in history}[2] == metrics(2).loss
    assert [value.step for value in client.get_metric_history(run.info.run_id, "eval_loss")] == [3, 4]
    assert sorted(path.name for path in tmp_path.glob("mlflow/**/*.png")) == ["step-00000003.png", "step-00000004.png"]


class Failing:
    """A tracker that fails at its second step."""

    patient = False
    taken: list[int]

    def __init__(self, *_: Any, **settings: Any) -> None:
        if settings["first_step"] == 7:
            raise ConnectionError("no network\nand many words")
        Failing.taken = []

    def add(self, step: int, _: Any) -> None:
        Failing.taken.append(step)
        if step == 2:
            raise ConnectionError("no network\nand many words")

    def close(self) -> None:
        raise AssertionError("it was given up")


def test_a_tracker_that_fails_is_said_once(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", trackers.Kind("wandb", Failing))
    for first, says in ((0, "failed"), (7, "cannot begin")):
        log.clear()
        with RunLog(tmp_path, total_steps=9, first_step=first, active=True, log_to=["wandb", "tensorboard"]) as run:
            for step in range(first + 1, first + 5):
                run.step(metrics(step))
        assert warnings_of(log) == [f"--log_to wandb {says} (ConnectionError: no network): training goes on without it"]
    assert Failing.taken == [1, 2]
    taken = [1, 2, 3, 4, 8, 9, 10, 11]
    assert [line["step"] for line in lines(tmp_path)] == list(scalar(events(tmp_path), "loss")) == taken


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", trackers.Kind("wandb_that_nobody_has", Failing))
    trackers.refuse_absent(["tensorboard"])
    with pytest.raises(ValueError, match=r"--log_to wandb needs a package .*: pip install wandb_that"):
        trackers.refuse_absent(["tensorboard", "wandb"])


def test_a_line_can_be_read_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=10, first_step=0, active=True) as log:
        for step in (1, 2, 3):
            log.step(metrics(step))
            assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 1))
            assert list(scalar(events(tmp_path), "loss")) == list(range(1, step + 1))


def test_special_numbers_reach_tensorboard_where_they_apply(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=2, first_step=0, active=True) as log:
        log.step(metrics(1, z_loss=0.5, mfu=0.4, loss_scale=65536.0))
        log.step(metrics(2, z_loss=0.5, mfu=0.4, loss_scale=32768.0, loss=math.nan, grad_norm=math.inf, skipped=True))
    read = events(tmp_path)
    assert scalar(read, "loss_scale") == {1: 65536, 2: 32768}
    assert scalar(read, "z_loss") == {1: 0.5, 2: 0.5}
    assert scalar(read, "mfu")[1] == pytest.approx(0.4)
    assert list(scalar(read, "loss")) == [1]
    assert lines(tmp_path)[1]["skipped"] is True


def test_ranks_that_are_not_the_first_do_nothing(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    with RunLog(tmp_path / "output", total_steps=2, first_step=0, active=False) as other:
        other.step(metrics(1))
    other.close()
    assert not list(tmp_path.iterdir())
    assert not log.records


def test_a_resumed_run_takes_steps_out_that_it_takes_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "loss": 1.2')
    with RunLog(tmp_path, total_steps=10, first_step=3, active=True) as log:
        log.step(metrics(4, loss=7.0))
        log.step(metrics(5, loss=7.0))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        *((step, metrics(step).loss) for step in (1, 2, 3)),
        *((step, 7.0) for step in (4, 5)),
    ]
    assert scalar(events(tmp_path), "loss") == {1: 3, 2: 2.5, 3: pytest.approx(2 + 1 / 3), 4: 7, 5: 7}
    assert not list(tmp_path.glob(".*")), "what is written aside is renamed"


def test_an_evaluation_that_is_taken_again_has_one_line(tmp_path: Path) -> None:
    """A run that was stopped between a step and its evaluation goes on with that, each time that it goes on there."""
    measured = dict.fromkeys(("loss", "perplexity", "token_accuracy", "balance_loss", "tokens", "records"), 1.5)
    write(tmp_path, range(1, 4))
    for _ in range(2):
        with RunLog(tmp_path, total_steps=9, first_step=3, active=True) as log:
            log.evaluation(3, 0.5, measured)
            log.step(metrics(4))
        found = [(line["step"], "eval_loss" in line) for line in lines(tmp_path)]
        assert found == [(1, False), (2, False), (3, False), (3, True), (4, False)]
    write(tmp_path, range(4, 5), first=3)  # by one that has the evaluation behind it
    assert [(line["step"], "eval_loss" in line) for line in lines(tmp_path)] == found


@pytest.mark.parametrize(
    "rest",
    [
        b'{"step": 3, "loss": 1.2',
        b'{"step": 3}',  # whole, but for the end of the line
        b'\n\n{"step": 2\n',
        b"\x00\x00\x00\xff\n",  # what a file system leaves after a power cut
        b'[3]\n"3"\n{"loss": 1}\n{"step": null}\n',
    ],
)
def test_what_a_crash_left_is_dropped(tmp_path: Path, rest: bytes) -> None:
    write(tmp_path, range(1, 3))
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(rest)
    write(tmp_path, range(3, 4), first=2)
    assert lines(tmp_path) == [metrics(step).to_record() for step in (1, 2, 3)]


def test_a_run_that_begins_anew_puts_the_log_of_one_that_saved_nothing_aside(tmp_path: Path) -> None:
    for steps in (3, 2, 1):
        write(tmp_path, range(1, steps + 1))
    assert [line["step"] for line in lines(tmp_path)] == [1]
    earlier = [(tmp_path / f"log.{number}.jsonl").read_text().splitlines() for number in (1, 2)]
    assert [[json.loads(line)["step"] for line in lines] for lines in earlier] == [[1, 2, 3], [1, 2]]
    assert list(scalar(events(tmp_path), "loss")) == [1]


def test_a_run_can_go_on_in_another_folder(tmp_path: Path) -> None:
    write(tmp_path, range(8, 10), first=7)
    assert [line["step"] for line in lines(tmp_path)] == [8, 9]


def test_an_error_passes_and_what_was_measured_stays(tmp_path: Path) -> None:
    def run() -> None:
        with RunLog(tmp_path, total_steps=9, first_step=0, active=True) as log:
            log.step(metrics(1))
            raise FloatingPointError("loss nan is not finite")

    with pytest.raises(FloatingPointError, match="loss nan is not finite"):
        run()
    assert lines(tmp_path) == [metrics(1).to_record()]
    assert list(scalar(events(tmp_path), "loss")) == [1]
    assert (tmp_path / "experts.png").stat().st_size > 0


def test_a_run_without_steps_leaves_no_picture(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=9, first_step=9, active=True) as log:
        pass
    log.close()
    assert not list(tmp_path.iterdir())


def test_pictures_must_be_some_steps_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heatmap_every is 0: give 1 or more"):
        RunLog(tmp_path, total_steps=1, first_step=0, active=True, heatmap_every=0)


# -- a disk that is full, and a folder that cannot be written to


class Disk:
    """Room for so many bytes, and a file that takes no more of them than that."""

    def __init__(self, room: int) -> None:
        disk = self
        self.room = room

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if disk.room == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                taken = super().write(data[: disk.room])
                disk.room -= taken
                return taken

        self.file = File


def test_a_full_disk_is_said_once_and_nothing_is_torn(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(1000)
    monkeypatch.setattr(appended_file, "FileIO", disk.file)
    with RunLog(tmp_path, total_steps=20, first_step=0, active=True) as run:
        for step in range(1, 10):
            run.step(metrics(step))
        assert len(warnings_of(log)) == 1
        assert "No space left" in warnings_of(log)[0]
        assert str(tmp_path) in warnings_of(log)[0]
        disk.room = 10**9
        run.step(metrics(10))
        assert lines(tmp_path) == [metrics(step).to_record() for step in range(1, 11)]
    assert list(scalar(events(tmp_path), "loss")) == list(range(1, 11))
    assert len(warnings_of(log)) == 1


def test_a_disk_that_stays_full_ends_nothing(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended_file, "FileIO", Disk(0).file)
    write(tmp_path, range(1, 4), every=2)
    assert len(warnings_of(log)) == 1
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_a_folder_that_cannot_be_written_to_ends_nothing(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    write(tmp_path / "file" / "output", range(1, 4), every=2)
    (warning,) = warnings_of(log)
    assert "NotADirectoryError" in warning
    assert warning.endswith("training goes on")


def test_a_picture_that_cannot_be_saved_still_reaches_tensorboard(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "experts.png").mkdir()
    write(tmp_path, range(1, 5), every=2)
    assert [picture.step for picture in events(tmp_path).Images("experts")] == [2, 4]
    assert len(warnings_of(log)) == 1


def test_drawing_that_fails_ends_nothing(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("accessory.train.run_log.draw", fail)
    write(tmp_path, range(1, 5), every=1)
    (warning,) = warnings_of(log)
    assert "RuntimeError: no fonts" in warning
    assert len(lines(tmp_path)) == 4


def test_an_appended_file_writes_through_a_real_full_device() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    file = appended_file.AppendedFile(Path("/dev/full"))
    file.write(b"line\n")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            file.flush()
    file.close()


# -- what a watcher sees


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def said(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records]


def test_lines_come_every_ten_seconds_and_for_the_first_and_last_step(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = ProgressLines(total_steps=3000, first_step=2970, clock=clock)
    for step in range(2971, 3001):
        clock.now += 3
        progress.update(metrics(step, epoch=0.4, loss=1.234))
    # The first after 3 s, then every fourth, 12 s apart.
    assert [int(line.split("/")[0].split()[1]) for line in said(log)] == [*range(2971, 3000, 4), 3000]
    assert said(log)[2] == (
        "step 2979/3000 (epoch 0.40): loss 1.234, balance 1.05, lr 5.0e-06, norm 0.71, "
        "12,345 tokens/s (2,345 learned, 4% padding), 61.2 GiB, 1 min 3 s left"
    )
    assert said(log)[-1].endswith("61.2 GiB")
    count = len(said(log))
    progress.close()
    assert len(said(log)) == count


def test_the_time_left_does_not_count_what_the_first_step_took(log: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = ProgressLines(total_steps=12, first_step=0, clock=clock)
    clock.now += 600
    progress.update(metrics(1))
    clock.now += 20
    progress.update(metrics(2))
    assert [line.split(", ")[-1] for line in said(log)] == ["61.2 GiB", "3 min 20 s left"]


def test_a_run_that_ends_early_says_its_last_step(log: pytest.LogCaptureFixture) -> None:
    progress = ProgressLines(total_steps=9, first_step=0, clock=Clock())
    for step in (1, 2, 3):
        progress.update(metrics(step))
    progress.close()
    assert [line.split(" ")[1] for line in said(log)] == ["1/9", "3/9"]


def test_lines_say_what_applies_to_some_runs_only_there(log: pytest.LogCaptureFixture) -> None:
    progress = ProgressLines(total_steps=1, first_step=0, clock=Clock())
    progress.update(metrics(1, mfu=0.412, loss=math.nan, loss_scale=512.0, skipped=True))
    (line,) = said(log)
    assert "loss nan" in line
    assert "12,345 tokens/s (2,345 learned, 4% padding) (MFU 41.2%)" in line
    assert line.endswith("skipped: gradients overflowed at loss scale 512.0")


def test_lines_and_not_a_bar_where_nobody_sits_at_a_terminal(
    tmp_path: Path, log: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, range(1, 4), total=3)
    assert [line.split(":")[0] for line in said(log)] == ["step 1/3 (epoch 0.12)", "step 3/3 (epoch 0.38)"]
    assert "|" not in capfd.readouterr().err


class Terminal:
    """A pseudo-terminal of 120 columns, and what it has been sent."""

    def __init__(self) -> None:
        self.reading, writing = pty.openpty()
        termios.tcsetwinsize(writing, (24, 120))
        self.stream = open(writing, "w", encoding="utf-8")  # noqa: SIM115  closed by `screen`

    def screen(self) -> list[str]:
        """The lines that stand there in the end: what a carriage return goes back over is overwritten."""
        self.stream.close()
        sent = b""
        while True:
            try:
                sent += (part := os.read(self.reading, 65536))
            except OSError:  # Linux's way to say that the other side is closed
                part = b""
            if not part:
                break
        os.close(self.reading)
        return [overwritten(line) for line in sent.decode().replace("\r\n", "\n").split("\n")]


def overwritten(line: str) -> str:
    cells: list[str] = []
    for text in line.split("\r"):
        cells[: len(text)] = text
    return "".join(cells).rstrip()


def test_a_terminal_gets_a_bar_that_leaves_log_lines_whole(
    tmp_path: Path, package: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    setup_logging(0)
    (handler,) = package.handlers
    elsewhere = logging.getLogger("accessory.train.loop")
    with RunLog(tmp_path, total_steps=30, first_step=20, active=True) as log:
        for step in range(21, 25):
            log.step(metrics(step))
        elsewhere.warning("something happened")
        log.step(metrics(25))
    elsewhere.info("after the bar")
    assert package.handlers == [handler]
    monkeypatch.undo()
    screen = terminal.screen()
    assert "WARNING: something happened" in screen
    assert "INFO: after the bar" in screen
    (bar,) = (line for line in screen if "|" in line)
    assert screen.index("WARNING: something happened") < screen.index(bar) < screen.index("INFO: after the bar")
    assert bar.startswith("25/30 |")
    assert "? left, loss 2.040, lr 5.0e-06, norm 0.71, 12,345 tokens/s (2,345 learned, 4% padding), 61.2 GiB" in bar
    assert len(bar) <= 120
    assert [line["step"] for line in lines(tmp_path)] == list(range(21, 26))


def test_a_terminal_that_goes_away_ends_nothing(
    tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    with RunLog(tmp_path, total_steps=9, first_step=0, active=True) as run:
        run.step(metrics(1))
        os.close(terminal.reading)
        for step in (2, 3):
            run.step(metrics(step))
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        terminal.stream.close()
    assert len(lines(tmp_path)) == 3
