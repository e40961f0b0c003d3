"""Training that stops and goes on from a checkpoint, and what is left on disk when saving fails halfway."""

import contextlib
import errno
import json
import logging
import re
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from patience import PATIENCE
from ranks import error_of
from test_training import CLIP_GRAD, SCHEDULE, WEIGHT_DECAY, step_rows
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.data.sampler import StepSampler
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained, load_transformer
from accessory.parallel.state import ParallelState, Ranks, all_ranks
from accessory.train import checkpointer
from accessory.train.checkpointer import Checkpointer
from accessory.train.optim import adamw, adamw8bit, muon
from accessory.train.sharding import device_mesh, shard_model
from accessory.train.shelf import Shelf
from accessory.train.snapshot import tensors_of
from accessory.train.trainer import train_step

STOP, END = 6, 12
SAMPLER = StepSampler([3, 1, 2] * 16, 4, seed=3)


class Run(NamedTuple):
    """A model in training and where its state is kept."""

    model: MetaModel
    optimizer: torch.optim.Optimizer
    store: Checkpointer

    def save(self, step: int, *, asynchronous: bool = False) -> None:
        progress = {"step": step, "sampler": SAMPLER.state(0, step)}
        self.store.save(self.model, self.optimizer, progress, f"step-{step}", asynchronous=asynchronous)


class Course(NamedTuple):
    """What a run of training went through, and a random number that it draws at its end."""

    begin: int
    losses: list[float]
    weights: dict[str, Tensor]
    random: float


@contextlib.contextmanager
def running(
    folder: Path,
    output: Path,
    mp_size: int,
    placement: str = "auto",
    keep_last: int | None = None,
    build: Callable[..., torch.optim.Optimizer] = adamw,
    ep_size: int = 1,
) -> Iterator[Run]:
    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    llma = load_transformer(pretrained, state, dtype=torch.float32, expert_placement=placement)
    shard_model(llma, device_mesh(state))
    model = MetaModel(llma, pretrained.tokenizer).train()
    world = all_ranks(torch.distributed.new_group(backend="gloo"))
    store = Checkpointer(output, state, world, keep_last=keep_last)
    yield Run(model, build(model.named_parameters(), lr=1.0, weight_decay=WEIGHT_DECAY), store)
    store.wait()
    torch.distributed.destroy_process_group(world.group)


def steps_on_rank(
    folder: Path,
    output: Path,
    mp_size: int,
    placement: str,
    end: int,
    save_at: int,
    build: Any = adamw,
    ep_size: int = 1,
) -> Course:
    """Train from the last checkpoint on (from step 0 without one) up to ``end``, saving on the way."""
    with running(folder, output, mp_size, placement, build=build, ep_size=ep_size) as run:
        state = run.model.llma.state
        torch.manual_seed(state.dp_rank)
        begin, latest = 0, run.store.latest()
        if latest is not None:
            progress = run.store.load(latest, run.model, run.optimizer, seed=1)
            begin = progress["step"]
            assert SAMPLER.resume(progress["sampler"]) == (0, begin)
        losses = []
        for step in range(begin, end):
            share = len(step_rows(step)[0]) // state.dp_size
            own = slice(state.dp_rank * share, (state.dp_rank + 1) * share)
            batch = tuple(rows[own] for rows in step_rows(step))
            losses.append(train_step(run.model, run.optimizer, [batch], lr=SCHEDULE(step), clip_grad=CLIP_GRAD).loss)  # type: ignore[list-item]
            torch.rand(1)
            if step + 1 == save_at:
                # The steps that follow must not reach what is being written.
                run.save(step + 1, asynchronous=True)
        run.store.wait()
        weights = {name: parameter.detach().full_tensor() for name, parameter in run.model.named_parameters()}
        return Course(begin, losses, weights, torch.rand(1).item())


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config()
    where = tmp_path_factory.mktemp("state") / "base"
    return write_folder(where, random_tensors(config, 5), config, files=1, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def unbroken(ranks: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Course]]:
    """Twelve steps at (2, 2) that saved a checkpoint after six."""
    output = tmp_path_factory.mktemp("unbroken")
    return output, ranks(4).run(steps_on_rank, folder, output, 2, "expert", END, STOP)


def test_a_run_that_is_stopped_twice_goes_on_to_the_same_bits(
    ranks: Any, folder: Path, unbroken: tuple[Path, list[Course]], tmp_path: Path
) -> None:
    saved, whole = unbroken
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    second = ranks(4).run(steps_on_rank, folder, tmp_path, 2, "expert", 9, 9)
    third = ranks(4).run(steps_on_rank, folder, tmp_path, 2, "expert", END, 0)
    for before, middle, after in zip(whole, second, third, strict=True):
        assert (middle.begin, after.begin) == (STOP, 9)
        assert middle.losses + after.losses == before.losses[STOP:]
        assert all(torch.equal(after.weights[name], weight) for name, weight in before.weights.items())
        assert after.random == before.random
    assert len({course.random for course in third}) > 1, "each rank has a random state of its own"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("build", "rel"), [(muon, 1e-5), (adamw8bit, 1e-3)])
def test_an_optimizer_goes_on_with_the_same_ranks_and_with_others(
    build: Any, rel: float, ranks: Any, small_tokenizer: Path, tmp_path: Path
) -> None:
    """Of the second the blocks are the same everywhere, and roundings to other codes make steps differ."""
    config = small_config(dim=128, hidden_dim=128, head_dim=16)
    folder = write_folder(tmp_path / "m", random_tensors(config, 5), config, files=1, tokenizer=small_tokenizer)
    if build is adamw8bit:
        pytest.importorskip("torchao", reason="no torchao: pip install -e .[adamw8bit]")
    whole = ranks(4).run(steps_on_rank, folder, tmp_path, 2, "tensor", 4, 2, build)[0]
    for mp_size, placement, size, ep_size in ((2, "tensor", 4, 1), (1, "auto", 1, 1), (1, "auto", 4, 2)):
        found = ranks(size).run(steps_on_rank, folder, tmp_path, mp_size, placement, 4, 0, build, ep_size)[0]
        assert found.begin == 2
        if mp_size == 2:
            assert found.losses == whole.losses[2:]
            assert all(torch.equal(found.weights[name], weight) for name, weight in whole.weights.items())
            continue
        assert found.losses == pytest.approx(whole.losses[2:], rel=rel)
        for name, weight in whole.weights.items():
            torch.testing.assert_close(found.weights[name], weight, rtol=10 * rel, atol=rel, msg=name)


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement", "ep_size"),
    [(4, 1, "auto", 1), (1, 2, "tensor", 1), (1, 1, "auto", 1), (1, 4, "expert", 1), (4, 1, "auto", 4)],
)
def test_a_run_goes_on_with_other_ranks(
    dp_size: int, mp_size: int, placement: str, ep_size: int, ranks: Any, folder: Path, unbroken: Any
) -> None:
    saved, whole = unbroken
    where = (folder, saved, mp_size, placement, END, 0, adamw, ep_size)
    assert_goes_on(ranks(dp_size * mp_size).run(steps_on_rank, *where), whole[0])


def assert_goes_on(courses: list[Course], whole: Course) -> None:
    for course in courses:
        assert course.begin == STOP
        assert course.losses == pytest.approx(whole.losses[STOP:], rel=1e-4)
        for name, weight in whole.weights.items():
            assert (course.weights[name] - weight).abs().max() <= 1e-4 * weight.abs().max(), name
    assert len({course.random for course in courses}) == len(courses)


def test_experts_that_were_spread_go_on_anywhere(
    ranks: Any, folder: Path, unbroken: tuple[Path, list[Course]], tmp_path: Path
) -> None:
    """A state of four ranks over which experts were spread, with the same ranks and with others."""
    whole = ranks(4).run(steps_on_rank, folder, tmp_path, 1, "auto", END, STOP, adamw, 4)
    assert whole[0].losses == pytest.approx(unbroken[1][0].losses, rel=1e-4)
    for size, mp_size, placement, ep_size in (
        (4, 1, "auto", 4),
        (4, 1, "auto", 2),
        (4, 2, "tensor", 2),
        (2, 2, "expert", 1),
        (1, 1, "auto", 1),
    ):
        courses = ranks(size).run(steps_on_rank, folder, tmp_path, mp_size, placement, END, 0, adamw, ep_size)
        if ep_size == 4:
            assert courses[0].losses == whole[0].losses[STOP:]
            assert [course.random for course in courses] == [course.random for course in whole]
        else:
            assert_goes_on(courses, whole[0])


def before_the_first_step_on_rank(folder: Path, output: Path) -> bool:
    with running(folder, output, 1) as run:
        run.save(0)
        run.store.load(output / "step-0", run.model, run.optimizer)
        return not run.optimizer.state


def test_a_state_before_the_first_step_has_no_moments(ranks: Any, folder: Path, tmp_path: Path) -> None:
    assert all(ranks(2).run(before_the_first_step_on_rank, folder, tmp_path))


def asynchronous_on_rank(folder: Path, output: Path) -> bool:
    """Whether a save that is held up while training goes on holds the weights of its own step."""
    written, go_on = checkpointer.dcp.save, threading.Event()

    def held_up(*arguments: Any, **settings: Any) -> Any:
        assert go_on.wait(PATIENCE)
        return written(*arguments, **settings)

    with running(folder, output, 2) as run:
        with mock.patch.object(checkpointer.dcp, "save", held_up):
            for step in range(2):
                train_step(run.model, run.optimizer, [step_rows(step)], lr=SCHEDULE(step), clip_grad=CLIP_GRAD)
                if step == 0:
                    before = {name: value.clone() for name, value in tensors_of(run.model, run.optimizer).items()}
                    run.save(1, asynchronous=True)
            go_on.set()
            run.store.wait()
        after = tensors_of(run.model, run.optimizer)
        assert not any(torch.equal(_local(after[name]), _local(before[name])) for name in after if "norm" in name)
        run.store.load(output / "step-1", run.model, run.optimizer)
        return all(torch.equal(_local(after[name]), _local(before[name])) for name in after)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_steps_taken_during_a_save_do_not_reach_it(ranks: Any, folder: Path, tmp_path: Path) -> None:
    assert all(ranks(2).run(asynchronous_on_rank, folder, tmp_path))


class Messages(logging.Handler):
    """Texts of warnings, on a rank."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def shelf_on_rank(folder: Path, output: Path) -> list[Any]:
    found: list[Any] = []
    with running(folder, output, 2, keep_last=2) as run:
        found.append(run.store.latest())
        for step in (1, 2, 3):
            run.save(step)
        run.save(3)  # is there already
        found.append(names(output))
        found.append(run.store.latest())
    with running(folder, output, 1, keep_last=1) as run:  # another run that begins anew in the same folder
        run.save(3)
        found.append(names(output))
        found.append(run.store.latest())
    return found


def test_the_last_checkpoints_are_kept(ranks: Any, folder: Path, tmp_path: Path) -> None:
    for found in ranks(2).run(shelf_on_rank, folder, tmp_path):
        assert found == [
            None,
            ["latest", "step-2", "step-3"],
            tmp_path / "step-3",
            ["latest", "step-3.1"],
            tmp_path / "step-3.1",
        ]


def renamed_on_rank(folder: Path, output: Path) -> list[str]:
    with running(folder, output, 1, keep_last=1) as run:
        run.save(1)
        if run.model.llma.state.dp_rank == 0:
            (output / "step-1").rename(output / "best")
        run.save(2)
        run.save(3)
        return names(output)


def test_what_a_user_renamed_is_kept(ranks: Any, folder: Path, tmp_path: Path) -> None:
    assert ranks(2).run(renamed_on_rank, folder, tmp_path)[0] == ["best", "latest", "step-3"]


def test_keep_last_must_be_positive() -> None:
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpointer("nowhere", ParallelState.single("cpu"), Ranks(), keep_last=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_without_ranks(folder: Path, tmp_path: Path) -> None:
    """The three steps of a save, and those of a load, as one process that belongs to no group takes them."""
    alone, shelf = ParallelState.single("cpu"), Shelf(tmp_path)
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    model = MetaModel(load_transformer(pretrained, alone, dtype=torch.float32), pretrained.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters())
    aside, final = shelf.aside("step-1")
    staged = checkpointer.stage(model, optimizer, aside, copy=True)
    for parameter in model.parameters():
        parameter.detach().zero_()
    files = checkpointer.write(staged, aside, Ranks())
    assert Shelf.incomplete(aside), "it has no name yet, and nothing that says how long its files are"
    checkpointer.publish(shelf, aside, final, {"args": pretrained.args.to_dict(), "files": files})
    assert shelf.latest() == final
    assert checkpointer.read_record(final, pretrained.args)["files"] == files
    tensors = checkpointer.tensors_to_fill(final, model, optimizer)
    torch.distributed.checkpoint.load(tensors, checkpoint_id=final, no_dist=True)
    assert all(torch.equal(parameter, staged.tensors[f"model.{name}"]) for name, parameter in model.named_parameters())
    assert staged.bytes > 0


def half_written_on_rank(folder: Path, output: Path) -> tuple[list[Any], list[str]]:
    handler = Messages()
    logging.getLogger("accessory").addHandler(handler)
    found: list[Any] = []
    try:
        with running(folder, output, 2) as run:
            first = run.model.llma.state.is_first
            run.save(1)
            run.save(2)
            if first:
                (output / ".step-3.tmp-0123abcd").mkdir()  # killed while it wrote
                (output / ".step-3.tmp-0123abcd" / "__0_0.distcp").write_bytes(b"half")
                (output / "mine").mkdir()  # a user's own
            found.append(run.store.latest())
            if first:
                victim = next((output / "step-2").glob("__1_*"))
                victim.write_bytes(victim.read_bytes()[:-100])
            found.append(run.store.latest())
            found.append(error_of(run.store.load, output / "step-2", run.model, run.optimizer))
            if first:
                shutil.rmtree(output / "step-2")
                (output / "step-1" / "state.json").write_text("{")
            found.append(run.store.latest())
            run.save(4)
            found.append(names(output))
    finally:
        logging.getLogger("accessory").removeHandler(handler)
    return found, handler.texts


def test_half_written_folders_are_ignored_and_it_is_said(ranks: Any, folder: Path, tmp_path: Path) -> None:
    results = ranks(2).run(half_written_on_rank, folder, tmp_path)
    for found, _ in results:
        whole, shortened, (kind, text), none, left = found
        assert (whole, shortened, none) == (tmp_path / "step-2", tmp_path / "step-1", None)
        assert kind == "CheckpointError"
        assert str(tmp_path / "step-2") in text
        assert "is cut short" in text
        assert left == ["latest", "mine", "step-1", "step-4"]
    said = "\n".join(results[0][1])
    for part in (".step-3.tmp-0123abcd: its writing was cut short", "step-2, which", "step-1: ValueError"):
        assert part in said
    assert not results[1][1], "one rank speaks"


def killed_on_rank(folder: Path, output: Path) -> list[Any]:
    """Saves that end before their folder is renamed and before ``latest`` is."""
    found: list[Any] = []
    with running(folder, output, 2, keep_last=1) as run:
        run.save(1)
        for step, last in ((2, "state.json"), (3, "step-3")):
            with mock.patch.object(Path, "rename", _renaming_up_to(last)):
                found.append(error_of(run.save, step))
            found.append(run.store.latest())
            found.append(names(output))
        run.save(4)
        found.append(names(output))
    return found


def _renaming_up_to(last: str) -> Callable[[Path, Path], Path]:
    """A Path.rename that fails from the one after ``last`` on."""
    rename, done = Path.rename, False

    def renamed(path: Path, target: Path) -> Path:
        nonlocal done
        if done:
            raise OSError("killed")
        done = target.name == last
        return rename(path, target)

    return renamed


def test_latest_moves_last(ranks: Any, folder: Path, tmp_path: Path) -> None:
    for found in ranks(2).run(killed_on_rank, folder, tmp_path):
        (kind, text), former, there, (_, later), still, both, end = found
        assert kind == "OSError"
        assert "step-2 cannot be written" in text
        assert "killed" in text
        assert former == still == tmp_path / "step-1"
        assert there == ["latest", "step-1"]
        assert "step-3 cannot be written" in later
        assert both == ["latest", "step-1", "step-3"]
        assert end == ["latest", "step-4"]


def full_disk_on_rank(folder: Path, output: Path, where: str) -> list[Any]:
    found: list[Any] = []
    with running(folder, output, 2) as run:
        run.save(1)
        rank = run.model.llma.state.mp_rank
        full = OSError(errno.ENOSPC, "No space left on device")
        patch: Any = mock.patch(where, side_effect=full) if rank == 1 else contextlib.nullcontext()
        with patch:
            found.append(error_of(run.save, 2))
            found.append(error_of(asynchronously, run, 3))
        found.append(run.store.latest())
        found.append(names(output))
        run.save(2)
        found.append(names(output))
        # One that fails beside the steps is said, and the next one is tried all the same.
        with patch, contextlib.suppress(OSError):
            run.save(4, asynchronous=True)
            assert run.store._pending.exception(60) is not None
        run.save(5)
        found.append(names(output))
    return found


def asynchronously(run: Run, step: int) -> None:
    run.save(step, asynchronous=True)
    run.store.wait()


@pytest.mark.parametrize(
    "where",
    [
        "torch.distributed.checkpoint.FileSystemWriter.write_data",
        "accessory.train.checkpointer.sync",
        "accessory.train.checkpointer.rng_state",
    ],
)
def test_a_full_disk_on_one_rank_stops_all_alike(where: str, ranks: Any, folder: Path, tmp_path: Path) -> None:
    results = ranks(2).run(full_disk_on_rank, folder, tmp_path, where)
    assert results[0] == results[1]
    (kind, text), (later_kind, later), latest, left, after, end = results[0]
    assert kind == later_kind == "OSError"
    assert "No space left on device" in text
    assert "No space left on device" in later
    if "rng" not in where:
        assert "step-2 cannot be written" in text
        assert "free space" in text
    assert latest == tmp_path / "step-1"
    assert left == ["latest", "step-1"]
    assert after == ["latest", "step-1", "step-2"]
    assert end == ["latest", "step-1", "step-2", "step-5"]


def limited_on_rank(folder: Path, output: Path, limited: tuple[int, ...]) -> list[Any]:
    """A limit on file sizes fails as a full disk does, from the system itself, in the middle of PyTorch's writer."""
    found: list[Any] = []
    with running(folder, output, 2) as run:
        run.save(1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if run.model.llma.state.mp_rank in limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            found.append(error_of(run.save, 2))
            found.append(error_of(asynchronously, run, 3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        run.store.latest()  # the first rank tidies up
        found.append(names(output))
        run.save(4)
        found.append(names(output))
    return found


@pytest.mark.parametrize("limited", [(0, 1), (1,)], ids=["all", "one"])
def test_a_disk_that_takes_no_more_is_said_with_what_it_takes(
    limited: tuple[int, ...], ranks: Any, folder: Path, tmp_path: Path
) -> None:
    results = ranks(2).run(limited_on_rank, folder, tmp_path, limited)
    assert results[0] == results[1]
    *failed, left, after = results[0]
    for step, (kind, text) in enumerate(failed, 2):
        assert kind == "OSError"
        reason = "File too large|the disk took less than was written"
        where = rf"checkpoint {tmp_path}/step-{step} cannot be written on rank {limited[0]}"
        sizes = r"it takes over [\d.]+ [kM]B, and [\d.]+ [GT]B are free"
        assert re.match(rf"{where} \(({reason}); {sizes}\): free space, or choose another output_dir; earlier", text), (
            text
        )
        assert "\n" not in text
        assert "inline_container" not in text
    assert left == ["latest", "step-1"]
    assert after == ["latest", "step-1", "step-4"]


def refused_on_rank(folder: Path, output: Path, other: Path) -> list[tuple[str, str]]:
    found = []
    with running(folder, output, 1) as run:
        run.save(1)
        found.append(error_of(run.store.save, run.model, run.optimizer, {"a": {1, 2}}, "odd"))
        blocked = output / "file"
        if run.model.llma.state.dp_rank == 0:
            blocked.write_text("")
        found.append(error_of(Checkpointer(blocked, run.model.llma.state, run.store.world).check_folder))
    with running(other, output, 1) as run:
        found.append(error_of(run.store.load, output / "step-1", run.model, run.optimizer))
        found.append(error_of(run.store.load, output / "step-7", run.model, run.optimizer))
        if run.model.llma.state.dp_rank == 0:
            state = json.loads((output / "step-1" / "state.json").read_text())
            state["args"] = run.model.llma.args.to_dict()
            (output / "step-1" / "state.json").write_text(json.dumps(state))
        torch.distributed.barrier()
        found.append(error_of(run.store.load, output / "step-1", run.model, run.optimizer))
    return found


def test_what_cannot_be_saved_or_resumed_is_refused(
    ranks: Any, folder: Path, small_tokenizer: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = small_config(hidden_dim=32, moe={"num_experts": 4, "num_experts_per_tok": 2})
    other = tmp_path_factory.mktemp("other") / "base"
    write_folder(other, random_tensors(config, 5), config, files=1, tokenizer=small_tokenizer)
    results = ranks(2).run(refused_on_rank, folder, tmp_path, other)
    assert results[0] == results[1]
    unjson, blocked, sizes, absent, lying = results[0]
    assert unjson[0] == "TypeError"
    assert "JSON" in unjson[1]
    assert blocked[0] == "OSError"
    assert f"output_dir {tmp_path / 'file'} cannot be written to" in blocked[1]
    for kind, text in (sizes, absent, lying):
        assert kind == "CheckpointError"
        assert str(tmp_path / "step-") in text
    assert "hidden_dim 48 (here 32)" in sizes[1]
    assert "moe.num_experts 8 (here 4)" in sizes[1]
    assert "state.json" in absent[1]
    assert "size" in lying[1].lower()
    assert "\n" not in lying[1]
