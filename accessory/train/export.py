"""A trained model in the reference page's layout: what from_pretrained and the demos load.

File i of as many as there are model-parallel ranks is written by the first data-parallel rank that holds slice i.
Parameters are gathered one after another straight into the file, so that no rank holds more than one of others'.
"""

import logging
import re
import shutil
import time
from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from accessory.checkpoint.layouts import BASE, SPARSE, Layout
from accessory.checkpoint.write import Writer
from accessory.files import by_umask, sync, write_json
from accessory.model.meta import MetaModel
from accessory.parallel.plan import Placement as ExpertPlacement
from accessory.parallel.plan import local_box, split_of
from accessory.parallel.state import agreed
from accessory.text.form_files import META_NAME, MORE_TEMPLATES, TEXT_NAMES, write_text
from accessory.text.forms import Form
from accessory.train.options import FinetuneOptions
from accessory.train.snapshot import over_all_ranks, reshard

logger = logging.getLogger(__name__)

_EPOCHS_END, _WITHIN_EPOCH = re.compile(r"epoch\d+"), re.compile(r"epoch\d+-iter\d+")
_ASIDE = re.compile(r"\.epoch\d+(-iter\d+)?\.(exporting|replaced|dropped)")
_WRITTEN = frozenset({"config.json", META_NAME, MORE_TEMPLATES, *TEXT_NAMES})  # beside the shards


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
    return all(path.name in _WRITTEN or path.match("consolidated.*.pth") for path in folder.iterdir())


def left_aside(folder: Path) -> list[Path]:
    """The models in a run's folder whose writing or removal is under way, or was cut short."""
    found = (path for path in folder.glob(".epoch*") if _ASIDE.fullmatch(path.name))
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
) -> Path:
    """Write the model as accessory shards with config.json, meta.json and the tokenizer; collective over all ranks.

    The files have the base form; where their number does not divide the experts, which then lie whole in none, they
    have the sparse form. All is written aside and renamed at the end. An export of the same name is replaced.

    Args:
        form: in which the model was trained, for all that ask it; None: nothing is said of it.
        only_trainable: leave frozen weights out; such a folder overlays that of its base. Of a model that is
            quantized they always stay out.

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
    everyone = over_all_ranks(state)
    aside = folder.with_name(f".{folder.name}.exporting")
    try:
        layout = agreed(everyone, lambda: _choose_layout(model), (folder.name, dtype))
        agreed(everyone, lambda: _prepare(folder, aside) if everyone.is_first else None)
        args = model.llma.args.replace(quant=None)
        only_trainable = only_trainable or model.llma.args.quant is not None
        kept = {name for name, own in model.llma.named_parameters() if own.requires_grad or not only_trainable}
        writer = Writer(aside, layout, args, held=kept, dtype=lambda _: dtype, files=state.mp_size)
        writes = state.dp_rank == 0
        agreed(everyone, lambda: writer.open(state.mp_rank) if writes else None)
        with torch.no_grad():
            _fill(model, kept, writer, dtype=dtype)
        agreed(everyone, lambda: writer.close(state.mp_rank) if writes else None)
        agreed(everyone, lambda: _finish(model, form, folder, aside, layout) if everyone.is_first else None)
    finally:
        if everyone.is_first:
            shutil.rmtree(aside, ignore_errors=True)
    if everyone.is_first:
        logger.info("model %s: written in %.1f s", folder, time.monotonic() - start)
    return folder


def _choose_layout(model: MetaModel) -> Layout:
    """Base, where the number of files divides the experts."""
    args, state = model.llma.args.replace(quant=None), model.llma.state
    if state.mp_size > 1 and not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("a model on several ranks must be sharded for training (shard_model) to be exported")
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
    """Gather the parameters one by one and write them into this rank's file, if it has one open."""
    args, state = model.llma.args, model.llma.state
    placement = writer.layout.cut
    assert placement is not None
    reshard(model)
    for name, parameter in model.llma.named_parameters():
        if name in kept:
            shape = tuple(parameter.shape)
            own = local_box(name, shape, args, placement=placement, rank=state.mp_rank, size=state.mp_size)
            writer.put(name, own, _slice(name, parameter, placement, dtype))


def _slice(name: str, parameter: nn.Parameter, placement: ExpertPlacement, dtype: torch.dtype) -> Tensor:
    """This rank's slice of a parameter, cut as ``placement`` says, whichever way it is cut now."""
    if not isinstance(parameter, DTensor):
        return parameter.to(dtype)
    cast = parameter.to(dtype)
    assert isinstance(cast, DTensor)
    axis = split_of(name).axis[placement]
    wanted: Placement = Replicate() if axis is None else Shard(axis)
    if cast.placements[-1] != wanted:
        # Whole in between: gloo has no direct way from one split to another.
        cast = cast.redistribute(placements=[Replicate()] * len(cast.placements))
    return cast.redistribute(placements=[*[Replicate()] * (len(cast.placements) - 1), wanted]).to_local()


def _finish(model: MetaModel, form: Form | None, folder: Path, aside: Path, layout: Layout) -> None:
    """Write what lies beside the shards, then give the whole its name."""
    # An adapter fits its base however that is quantized.
    write_json(aside / "config.json", model.llma.args.replace(quant=None).to_dict())
    kind = model.llama_type.removesuffix("_sparse")
    suffix = (
        "_sparse" if layout is SPARSE and model.llma.args.peft is None else ""
    )  # with adapters the form has no name
    write_json(aside / META_NAME, {"llama_type": kind + suffix, **write_text(model.tokenizer, form, aside)})
    by_umask(aside)
    for file in aside.rglob("*"):
        sync(file)
    sync(aside)
    if folder.exists():
        replaced = aside.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        aside.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        aside.rename(folder)
    sync(folder.parent)
