"""A trained model in the reference page's layout: what from_pretrained and the demos load.

File i of as many as there are model-parallel ranks is written by the first data-parallel rank that holds slice i.
Parameters are gathered one after another straight into the file, so that no rank holds more than one of others'.
"""

import logging
import re
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from accessory.checkpoint.formats import PREFIX, Source, obstacles_to_files, sources
from accessory.checkpoint.writer import create_shard
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
    name = f"consolidated.{state.mp_rank:02d}-of-{state.mp_size:02d}.model.pth"
    try:
        sparse = agreed(everyone, lambda: _choose_form(model), (folder.name, dtype))
        agreed(everyone, lambda: _prepare(folder, aside) if everyone.is_first else None)
        only_trainable = only_trainable or model.llma.args.quant is not None
        everything = sources(model.llma.args.replace(quant=None), state.mp_size, sparse=sparse)
        kept = {name for name, own in model.llma.named_parameters() if own.requires_grad or not only_trainable}
        targets = [source for source in everything if source.file == state.mp_rank and source.parameter in kept]
        tensors = {PREFIX + target.key: (target.shape, dtype) for target in targets}
        writes = state.dp_rank == 0
        shard = agreed(everyone, lambda: create_shard(aside / name, tensors) if writes else {})
        with torch.no_grad():
            _fill(model, targets, shard, placement="tensor" if sparse else "expert", dtype=dtype)
        del shard
        agreed(everyone, lambda: sync(aside / name) if writes else None)
        agreed(everyone, lambda: _finish(model, form, folder, aside, sparse) if everyone.is_first else None)
    finally:
        if everyone.is_first:
            shutil.rmtree(aside, ignore_errors=True)
    if everyone.is_first:
        logger.info("model %s: written in %.1f s", folder, time.monotonic() - start)
    return folder


def _choose_form(model: MetaModel) -> bool:
    """Whether the files must be sparse."""
    args, state = model.llma.args.replace(quant=None), model.llma.state
    if state.mp_size > 1 and not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("a model on several ranks must be sharded for training (shard_model) to be exported")
    forms = {sparse: obstacles_to_files(args, state.mp_size, sparse=sparse) for sparse in (False, True)}
    for sparse, obstacles in forms.items():
        if not obstacles:
            return sparse
    raise ValueError(f"{state.mp_size} files cannot hold this model: {'; '.join(forms[False])}; train at another mp")


def _prepare(folder: Path, aside: Path) -> None:
    if folder.exists() and not (folder / META_NAME).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is no exported model: move it away or choose another output_dir")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was cut short
    aside.mkdir(parents=True)


def _fill(
    model: MetaModel, targets: list[Source], shard: dict[str, Tensor], *, placement: ExpertPlacement, dtype: torch.dtype
) -> None:
    """Gather the parameters one by one and copy them into this rank's file, if it writes one."""
    args, state = model.llma.args, model.llma.state
    reshard(model)
    of_parameter: dict[str, list[Source]] = {}
    for target in targets:
        of_parameter.setdefault(target.parameter, []).append(target)
    for name, parameter in model.llma.named_parameters():
        if name not in of_parameter:
            continue
        own = local_box(name, tuple(parameter.shape), args, placement=placement, rank=state.mp_rank, size=state.mp_size)
        gathered = _slice(name, parameter, placement, dtype)
        for target in of_parameter[name] if shard else []:
            target.view(shard[PREFIX + target.key]).copy_(gathered[target.box.within(own)])


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


def _finish(model: MetaModel, form: Form | None, folder: Path, aside: Path, sparse: bool) -> None:
    """Write what lies beside the shards, then give the whole its name."""
    # An adapter fits its base however that is quantized.
    write_json(aside / "config.json", model.llma.args.replace(quant=None).to_dict())
    kind = model.llama_type.removesuffix("_sparse")
    suffix = "_sparse" if sparse and model.llma.args.peft is None else ""  # with adapters the form has no name
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
