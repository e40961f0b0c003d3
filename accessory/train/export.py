"""A trained model in the reference page's layout: what from_pretrained and the demos load.

File i of as many as there are model-parallel ranks is written by the first data-parallel rank that holds slice i.
Parameters are gathered one after another straight into the file, so that no rank holds more than one of others'.
"""

import itertools
import logging
import re
import shutil
import time
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from accessory.checkpoint.base import numbers_of, router_names
from accessory.checkpoint.companions import COMPANIONS
from accessory.checkpoint.folder import BASE_KEY
from accessory.checkpoint.layouts import BASE, SPARSE, Layout, written_layout
from accessory.checkpoint.write import Writer
from accessory.files import put_in_place
from accessory.model.meta import MetaModel
from accessory.parallel.box import Box
from accessory.parallel.plan import cut_axis, local_box, split_of
from accessory.parallel.state import agreed, all_ranks, on_first
from accessory.text.form_files import META_NAME, MORE_TEMPLATES, write_text
from accessory.text.forms import Form
from accessory.train.options import FinetuneOptions
from accessory.train.snapshot import frozen_of, reshard

logger = logging.getLogger(__name__)

_EPOCHS_END, _WITHIN_EPOCH = re.compile(r"epoch\d+"), re.compile(r"epoch\d+-iter\d+")
BEST = "best"  # the model of the lowest held-out loss
_ASIDE = re.compile(rf"\.(epoch\d+(-iter\d+)?|{BEST})\.(exporting|replaced|dropped)")
_WRITTEN = COMPANIONS | {MORE_TEMPLATES}  # beside the weights
_WEIGHTS = ("consolidated.*.pth", "consolidated.safetensors", "model*.safetensors", "model.safetensors.index.json")


def export_name(epoch: int, iteration: int | None = None) -> str:
    """The folder's name at an epoch's end, or within one."""
    return f"epoch{epoch}" if iteration is None else f"epoch{epoch}-iter{iteration}"


def model_due(options: FinetuneOptions, *, done: int, end: int, per_epoch: int) -> str | None:
    """Name of the model to write after step ``done``, if any, of a run that ends with step ``end``."""
    epoch, step = (done - 1) // per_epoch, (done - 1) % per_epoch + 1
    ends_epoch, ends_run = step == per_epoch, done == end
    interval = options.save_iteration_interval
    within = interval > 0 and step % max(1, interval // options.accum_iter) == 0
    if ends_epoch and ((epoch + 1) % options.save_interval == 0 or ends_run):
        return export_name(epoch)
    if within or ends_run:
        return export_name(epoch, step * options.accum_iter)
    return None


def drop_older_models(written: Path, *, keep_last: int, keep_models: int | None = None) -> None:
    """Remove all but the newest models of the run in whose folder ``written`` lies, which is the newest itself.

    Folders that hold anything else than an export, or are links, stay and do not count.

    Args:
        keep_last: how many stay of those that were written within epochs.
        keep_models: of those of epochs' ends; None: all.
    """
    folder = written.parent
    _remove_dropped(folder)
    for kind, keep in ((_WITHIN_EPOCH, keep_last), (_EPOCHS_END, keep_models)):
        found = [path for path in folder.iterdir() if kind.fullmatch(path.name) and _is_export(path)]
        # A clock may have been set back.
        found.sort(key=lambda path: (path == written, (path / META_NAME).stat().st_mtime_ns))
        for path in found[:-keep] if keep is not None else ():
            # Renamed first: a removal that is cut short leaves nothing that looks whole, and is taken up again.
            path.rename(path.with_name(f".{path.name}.dropped"))
    _remove_dropped(folder)


def _is_export(folder: Path) -> bool:
    """Whether a folder is an export and nothing has been put into it."""
    if folder.is_symlink() or not (folder / META_NAME).is_file():
        return False
    return all(path.name in _WRITTEN or any(map(path.match, _WEIGHTS)) for path in folder.iterdir())


def left_aside(folder: Path) -> list[Path]:
    """The models in a run's folder whose writing or removal is under way, or was cut short."""
    found = (path for path in folder.glob(".*") if _ASIDE.fullmatch(path.name))
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _remove_dropped(folder: Path) -> None:
    for path in left_aside(folder):
        if path.suffix == ".dropped":
            shutil.rmtree(path, ignore_errors=True)


def export_checkpoint(
    model: MetaModel,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    form: Form | None = None,
    only_trainable: bool = False,
    to: str = BASE.name,
) -> Path:
    """Write the model with its config, meta.json and the tokenizer; collective over all ranks.

    Accessory's shards have the base form; where their number does not divide the experts, which then lie whole in none,
    they have the sparse form. All is written aside and renamed at the end. An export of the same name is replaced.

    Args:
        form: in which the model was trained, for all that ask it; None: nothing is said of it.
        only_trainable: leave frozen weights out, but for correction biases that balancing moves; such a folder
            overlays that of its base. Of a model that is quantized they always stay out.
        to: the layout, a key of `layouts.WRITTEN`; where that does not cut tensors, every rank has each whole in turn.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something else than an export.
        ValueError: the model's slices fit neither form.
        OSError: a file cannot be written, for instance on a full disk; what was there before is untouched.
    """
    start = time.monotonic()
    folder = Path(folder).absolute()
    state = model.llma.state
    everyone = all_ranks()
    aside = folder.with_name(f".{folder.name}.exporting")
    try:
        layout = agreed(everyone, lambda: _choose_layout(model, to), (folder.name, dtype, to))
        on_first(everyone, partial(_prepare, folder, aside))
        args = model.llma.args.replace(quant=None)
        only_trainable = only_trainable or model.llma.args.quant is not None
        frozen = {name.removeprefix("llma.") for name in frozen_of(model)} if only_trainable else set()
        kept = {name for name, _ in model.llma.named_parameters()} - frozen
        files = None if layout.cut is None else state.mp_size
        writer = Writer(aside, layout, args, held=kept, dtype=lambda _: dtype, files=files)
        # Each rank of the first data-parallel row writes, and sums, every so many-th file: of shards its own.
        own = range(state.mp_rank, len(writer.names), state.mp_size) if state.dp_rank == 0 else range(0)
        agreed(everyone, lambda: writer.open(own))
        with torch.no_grad():
            _fill(model, kept, writer, dtype=dtype)
            base = _base_of(model) if only_trainable and args.peft is not None else {}
        agreed(everyone, lambda: writer.close(own))
        writer.sums = dict(itertools.chain(*(sums.items() for sums in everyone.gathered(writer.sums))))
        on_first(everyone, partial(_finish, model, form, folder, writer, base))
    finally:
        if everyone.is_first:
            shutil.rmtree(aside, ignore_errors=True)
    if everyone.is_first:
        logger.info("model %s: written in %.1f s", folder, time.monotonic() - start)
    return folder


def _choose_layout(model: MetaModel, to: str) -> Layout:
    """The layout of that name; of accessory's two base, where the number of files divides the experts."""
    args, state = model.llma.args.replace(quant=None), model.llma.state
    if state.mp_size > 1 and not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("a model on several ranks must be sharded for training (shard_model) to be exported")
    if to != BASE.name:
        return written_layout(to, args)
    for layout in (BASE, SPARSE):
        if not layout.obstacles(args, state.mp_size):
            return layout
    obstacles = "; ".join(BASE.obstacles(args, state.mp_size))
    raise ValueError(f"{state.mp_size} files cannot hold this model: {obstacles}; train at another mp")


def _prepare(folder: Path, aside: Path) -> None:
    if folder.exists() and not (folder / META_NAME).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is no exported model: move it away or choose another output_dir")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was cut short
    aside.mkdir(parents=True)


def _fill(model: MetaModel, kept: Set[str], writer: Writer, *, dtype: torch.dtype) -> None:
    """Gather the parameters one by one and write them into the files that this rank has open."""
    args, state = model.llma.args, model.llma.state
    placement = writer.layout.cut
    reshard(model)
    for name, parameter in model.llma.named_parameters():
        if name not in kept:
            continue
        own, axis = Box.whole(tuple(parameter.shape)), None
        if placement is not None:
            own = local_box(name, own.size, args, placement=placement, rank=state.mp_rank, size=state.mp_size)
            axis = cut_axis(name, args, placement=placement, size=state.mp_size)
        # What is float32 whatever the others are is so in the files too.
        own_dtype = torch.float32 if split_of(name).kind == "correction" else dtype
        writer.put(name, own, _slice(parameter, axis, own_dtype))


def _slice(parameter: nn.Parameter, axis: int | None, dtype: torch.dtype) -> Tensor:
    """This rank's slice of a parameter, cut along ``axis``, whichever way it is cut now; None: the whole."""
    if not isinstance(parameter, DTensor):
        return parameter.to(dtype)
    cast = parameter.to(dtype)
    assert isinstance(cast, DTensor)
    wanted: Placement = Replicate() if axis is None else Shard(axis)
    elsewhere = any(type(kind) is Shard and kind.dim == axis for kind in cast.placements[:-1])
    if cast.placements[-1] != wanted or elsewhere:
        # Whole in between: gloo has no direct way from one split to another, and of an axis that two axes of the mesh
        # split a rank's slice is another one without the first.
        cast = cast.redistribute(placements=[Replicate()] * len(cast.placements))
    return cast.redistribute(placements=[*[Replicate()] * (len(cast.placements) - 1), wanted]).to_local()


def _base_of(model: MetaModel) -> dict[str, Any]:
    """What meta.json says of the base of an adapter that is written alone; collective."""
    parameters = dict(model.llma.named_parameters())
    routers = [parameters[name] for name in router_names(model.llma.args)]
    return {BASE_KEY: numbers_of([own.full_tensor() if isinstance(own, DTensor) else own for own in routers])}


def _finish(model: MetaModel, form: Form | None, folder: Path, writer: Writer, base: dict[str, Any]) -> None:
    """Write what lies beside the weights, then give the whole its name."""
    said = write_text(model.tokenizer, form, writer.folder) | base
    writer.write_beside(model.llama_type, said, model.tokenizer, form, always=True)
    put_in_place(writer.folder, folder)
