"""Training state on disk: saved beside the training steps, complete or not at all, for any number of ranks.

A checkpoint is a folder in the run's output folder. torch.distributed.checkpoint (DCP) writes the tensors, each
once and whole however it is sharded, so that other ranks can read it; state.json holds the plain values, the
model's sizes and the length of every file. A small file, ``latest``, names the checkpoint to go on from.

A save is three steps: `stage` takes the tensors, `write` puts a rank's part into a folder aside, `publish` gives the
whole its name.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from accessory.config import ModelArgs, read_json
from accessory.errors import CheckpointError, first_line, shown_bytes
from accessory.files import no_room, sync, write_json
from accessory.launch.rendezvous import is_lost_peer
from accessory.model.meta import MetaModel
from accessory.parallel.plan import parameter_shapes
from accessory.parallel.state import ParallelState, Ranks, agreed, on_first
from accessory.train.shelf import Shelf
from accessory.train.snapshot import (
    check_same_model,
    copied,
    frozen_of,
    prime,
    restore_rng,
    rng_state,
    seed_rank,
    tensors_of,
)

logger = logging.getLogger(__name__)


class Staged(NamedTuple):
    """What a rank writes of a state: tensors by the names of the checkpoint, and its random generators."""

    tensors: dict[str, Tensor]
    rng: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class Checkpointer:
    """The checkpoints of a run. Every method is collective over ``world``, and raises on all of its ranks alike.

    Attributes:
        folder: where the checkpoints lie, on a file system that all ranks share (`check_folder` sees to that).
        world: all ranks as one group, whose members may wait for one another for hours. While a state is being
            written it belongs to that; `wait` before it is used otherwise.
    """

    def __init__(
        self,
        folder: str | Path,
        state: ParallelState,
        world: Ranks,
        *,
        keep_last: int | None = None,
        without_frozen: bool = False,
    ) -> None:
        """Touches nothing.

        Args:
            world: `all_ranks` of a group of its own: saves run in a thread beside training steps, whose
                collectives theirs must not meet.
            keep_last: how many checkpoints stay; None: all.
            without_frozen: leave out what does not train; the model must have it already when a state is loaded.

        Raises:
            ValueError: keep_last is not positive.
        """
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}: keep at least 1, or None for all")
        self.folder, self.world = Path(folder).absolute(), world
        self._shelf, self._state, self._keep_last = Shelf(self.folder), state, keep_last
        self._without_frozen = without_frozen
        self._pending: Future[None] | None = None
        self._saved = ""

    def check_folder(self) -> None:
        """Make the folder, and see that it can be written to, and is the same one on all ranks.

        Raises:
            OSError: it cannot, or is not.
        """
        probe = on_first(self.world, partial(make_probe, self._shelf))
        try:
            agreed(self.world, partial(must_be_shared, probe))
        finally:
            if self.world.is_first:
                shutil.rmtree(probe, ignore_errors=True)

    def save(
        self,
        model: MetaModel,
        optimizer: torch.optim.Optimizer,
        progress: dict[str, Any],
        name: str,
        *,
        asynchronous: bool = True,
    ) -> None:
        """Save model, optimizer, the ranks' random states and ``progress`` in the folder ``name``.

        Waits for the save before this one, whose failure has been said and is no reason not to try again. Where an
        earlier run has left a folder of this name, the new one gets a number behind it; what was saved last is not
        saved again.

        Args:
            progress: plain JSON values, the same on every rank: step, epoch, sampler and scaler state, ...
            asynchronous: return once the tensors are copied to memory; they are written while training goes on.

        Raises:
            OSError: this save failed; earlier checkpoints are untouched.
            TypeError: progress holds something else than JSON values.
        """
        with contextlib.suppress(OSError):
            self.wait()
        if name == self._saved:
            return
        record = {"torch": torch.__version__, **self._sizes, "args": model.llma.args.to_dict(), "progress": progress}
        record = agreed(self.world, lambda: json.loads(json.dumps(record)), (name, progress))
        aside, final = on_first(self.world, partial(self._shelf.aside, name))
        taking = partial(stage, model, optimizer, aside, copy=asynchronous, without_frozen=self._without_frozen)
        with self._removing_on_failure(aside):
            staged = agreed(self.world, taking)
        self._say(f"checkpoint {final}: writing")
        self._saved = name
        if asynchronous:
            self._pending = in_thread(partial(self._write_beside_steps, staged, record, aside, final))
        else:
            self._write(staged, record, aside, final)

    def wait(self) -> None:
        """Wait until an asynchronous save is on disk.

        Raises:
            OSError: it failed; earlier checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Path | None:
        """The checkpoint to go on from: what ``latest`` names, else the newest complete one; None without any.

        Half-written folders are ignored, with a warning.
        """
        self.wait()
        return on_first(self.world, self._shelf.latest)

    def last_saved(self) -> Path | None:
        """The folder that ``latest`` names now, on whichever rank and thread asks; None without any."""
        return self._shelf.named()

    def locate(self, path: str | Path) -> Path:
        """The checkpoint at a path that a user gave: one itself, or the last of another run's folder.

        Raises:
            CheckpointError: there is none.
        """
        return on_first(self.world, partial(Shelf.locate, Path(path).absolute()))

    def sizes(self, path: Path) -> ModelArgs:
        """The model's sizes in a complete checkpoint; raises CheckpointError where it is not one."""
        return agreed(self.world, partial(read_sizes, path), path.name)

    def check(self, path: Path, args: ModelArgs) -> dict[str, Any]:
        """See that a checkpoint is complete and of a model of these sizes; returns its record, with ``progress``.

        Raises:
            CheckpointError: names the folder and the field.
        """
        return agreed(self.world, partial(read_record, path, args), path.name)

    def is_whole(self, path: Path, args: ModelArgs) -> bool:
        """Whether a checkpoint has every parameter of a model of these sizes, also those that did not train.

        Raises:
            CheckpointError: it cannot be read.
        """

        def look() -> bool:
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            return all(f"model.llma.{name}" in stored for name, _ in parameter_shapes(args))

        return agreed(self.world, self._explained(path)(look))

    def load(
        self, path: str | Path, model: MetaModel, optimizer: torch.optim.Optimizer, *, seed: int = 0
    ) -> dict[str, Any]:
        """Fill model, optimizer and the rank's random state from a checkpoint; returns its ``progress``.

        The ranks and the experts' placement may be others than those of the save; the random states then begin
        anew from seed and rank, which is said. Learning rate, betas and weight decay stay those of ``optimizer``.
        DCP's index is a pickle: resume only from folders that you trust.

        Raises:
            CheckpointError: incomplete, damaged, or of a model of other sizes; names the folder and the field.
        """
        self.wait()
        path = Path(path).absolute()
        record = self.check(path, model.llma.args)
        # A rank that fails before the collectives of DCP must not leave the others in them.
        explained = self._explained(path)
        tensors = agreed(self.world, explained(partial(tensors_to_fill, path, model, optimizer)))
        copied = agreed(self.world, explained(partial(saved_in_copies, path, tensors)))
        read = partial(dcp.load, {**tensors, **copied}, checkpoint_id=path, process_group=self.world.group)
        agreed(self.world, explained(read))
        for key, copies in copied.items():
            fill_from_copies(tensors[key], copies)
        saved = {axis: record.get(axis, 1) for axis in self._sizes}  # those of before know no ep_size
        if saved == self._sizes:
            file = path / f"rng.{self.world.rank}.pt"
            agreed(self.world, lambda: restore_rng(torch.load(file, weights_only=True), self._state.device))
        else:
            seed_rank(seed, self.world.rank)
            before, now = (
                ", ".join(f"{axis.removesuffix('_size')} {size}" for axis, size in sizes.items())
                for sizes in (saved, self._sizes)
            )
            self._say(
                f"{path} was saved at {before}, and is resumed at {now}: random states begin anew from seed {seed} and "
                "rank"
            )
        progress: dict[str, Any] = record["progress"]
        return progress

    @staticmethod
    def _explained(path: Path) -> "contextlib._GeneratorContextManager[None]":
        return in_one_line(f"{path} cannot be read", "resume from another one", CheckpointError)

    @property
    def _sizes(self) -> dict[str, int]:
        state = self._state
        return {"dp_size": state.dp.size, "mp_size": state.mp.size, "ep_size": state.ep.size}

    def _write(self, staged: Staged, record: dict[str, Any], aside: Path, final: Path) -> None:
        start, world = time.monotonic(), self.world
        remedy = "free space, or choose another output_dir; earlier checkpoints are untouched"
        explained = in_one_line(f"checkpoint {final} cannot be written", remedy, writing=(aside, staged.bytes))
        with self._removing_on_failure(aside):
            own = agreed(world, explained(partial(write, staged, aside, world)))
            lengths = world.gathered(own)
            self._say(f"checkpoint {final}: renaming")
            files = {name: length for part in lengths for name, length in part.items()}
            publishing = partial(publish, self._shelf, aside, final, {**record, "files": files})
            on_first(world, explained(partial(publishing, keep_last=self._keep_last)))
        self._say(f"checkpoint {final}: saved in {time.monotonic() - start:.1f} s")

    def _write_beside_steps(self, *what: Any) -> None:
        """The same beside the steps of training, in which nobody waits for the outcome."""
        try:
            self._write(*what)
        except OSError as error:
            if self.world.is_first:
                logger.error("%s; training goes on, and the next save is tried", error)
            raise

    @contextlib.contextmanager
    def _removing_on_failure(self, aside: Path) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._saved = ""
            if self.world.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _say(self, message: str) -> None:
        if self.world.is_first:
            logger.info(message)


def make_probe(shelf: Shelf) -> Path:
    """Make a folder as a save does; raises OSError where that cannot be."""
    with in_one_line(f"output_dir {shelf.folder} cannot be written to", "choose a folder that you may write to"):
        return shelf.aside("probe")[0]


def must_be_shared(folder: Path) -> None:
    """Raise OSError where another rank's folder is not there for this one."""
    if not folder.is_dir():
        raise OSError(f"{folder.parent} is not the same folder on all ranks: choose an output_dir that all hosts share")


def stage(
    model: MetaModel, optimizer: torch.optim.Optimizer, aside: Path, *, copy: bool, without_frozen: bool = False
) -> Staged:
    """What this rank saves, as it is now (``copy``) or as the model's own tensors; and see that it can be written."""
    must_be_shared(aside)
    tensors = tensors_of(model, optimizer, without_frozen=without_frozen)
    return Staged(copied(tensors) if copy else tensors, rng_state(model.llma.state.device))


def write(staged: Staged, aside: Path, world: Ranks) -> dict[str, int]:
    """Write this rank's part into the folder; returns the lengths of its files. Collective over ``world``."""
    rank = world.rank
    dcp.save(staged.tensors, storage_writer=dcp.FileSystemWriter(aside), process_group=world.group)
    torch.save(staged.rng, aside / f"rng.{rank}.pt")
    sync(aside / f"rng.{rank}.pt")
    names = [f"rng.{rank}.pt", *(path.name for path in aside.glob(f"__{rank}_*")), *([".metadata"] * (rank == 0))]
    return {name: (aside / name).stat().st_size for name in names}


def publish(shelf: Shelf, aside: Path, final: Path, record: dict[str, Any], *, keep_last: int | None = None) -> None:
    """Write the record that makes a folder complete, and give it its name; for one rank."""
    write_json(aside / Shelf.INDEX, record)
    shelf.publish(aside, final, keep_last=keep_last)


def read_record(path: Path, args: ModelArgs | None = None) -> dict[str, Any]:
    """The record of a complete checkpoint, of a model of these sizes; raises CheckpointError where it is not one."""
    reason = Shelf.incomplete(path)
    if reason:
        raise CheckpointError(f"{path} is no complete checkpoint ({reason}): resume from another one")
    content: dict[str, Any] = read_json(path / Shelf.INDEX)
    if args is not None:
        check_same_model(path, content["args"], args)
    return content


def read_sizes(path: Path) -> ModelArgs:
    """The sizes in `read_record`; raises CheckpointError where they are none that are known here."""
    try:
        return ModelArgs.from_dict(read_record(path)["args"])
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} holds the state of another model ({error}): resume from another one") from None


def tensors_to_fill(path: Path, model: MetaModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of model and optimizer that the checkpoint has; a new optimizer is given its own first."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    frozen = {f"model.{name}" for name in frozen_of(model)}
    prime(optimizer, empty=not any(key.startswith("optimizer.") for key in stored))
    # A frozen weight that the state leaves out stays as it was built, and so do correction biases of which a run before
    # --bias_update_rate knew nothing.
    tensors = tensors_of(model, optimizer, without_frozen=not frozen <= stored.keys())
    moved = {f"model.{name}" for name, own in model.named_parameters() if not own.requires_grad} - frozen
    return {name: tensor for name, tensor in tensors.items() if name in stored or name not in moved}


def saved_in_copies(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors those that the checkpoint has several times, one copy behind the other, with room for all copies.

    A norm that all heads share was saved so by earlier versions, once for each model-parallel rank.
    """
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {}
    for key, own in tensors.items():
        size = getattr(stored.get(key), "size", own.shape)
        if own.dim() == 1 and size != own.shape and len(size) == 1 and size[0] % len(own) == 0:
            found[key] = torch.empty(size, dtype=own.dtype, device=own.device)
    return found


def fill_from_copies(own: Tensor, copies: Tensor) -> None:
    """Fill a tensor with the first of several copies; collective over the ranks among which it is split."""
    whole = copies[: len(own)]
    with torch.no_grad():
        own.copy_(distribute_tensor(whole, own.device_mesh, own.placements) if isinstance(own, DTensor) else whole)


def in_thread(work: Callable[[], None]) -> "Future[None]":
    """Begin a work in a thread of its own, for which the process waits at its end."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    begun = pool.submit(work)
    pool.shutdown(wait=False)
    return begun


@contextlib.contextmanager
def in_one_line(
    what: str, remedy: str, kind: type[Exception] = OSError, *, writing: tuple[Path, int] | None = None
) -> Iterator[None]:
    """Errors of DCP, of many types and many lines, become one line of one type.

    Args:
        writing: the folder that is written, and how many bytes it will have, for a disk that is full.
    """
    try:
        with torch.no_grad():
            yield
    except (CheckpointException, Exception) as error:
        where = ""
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
            where = f" on rank {rank}"
        if is_lost_peer(cause):
            raise cause from None  # nothing is wrong with the folder
        reason = None if writing is None else _no_room_for(cause, *writing)
        if reason is None:
            reason = f"{type(cause).__name__}: {first_line(str(cause), otherwise='')}"
        raise kind(f"{what}{where} ({reason}): {remedy}") from None


def _no_room_for(error: BaseException, folder: Path, size: int) -> str | None:
    """Why there was no room for a state, and how much it takes; None where the error is about something else."""
    reason = no_room(error, folder)
    if reason is None:
        return None
    # What is written of it is about to be removed.
    written = sum(file.stat().st_size for file in folder.glob("*"))
    free = shutil.disk_usage(folder).free + written
    return f"{reason}; it takes over {shown_bytes(size)}, and {shown_bytes(free)} are free"
