"""Changing the number of shards of a checkpoint, tensor by tensor: the reference page's split.py."""

import logging
from collections.abc import Sequence
from pathlib import Path

from accessory.checkpoint.formats import PREFIX, Source, base_sources, obstacles_to_files
from accessory.checkpoint.manifest import Manifest
from accessory.checkpoint.reader import Checkpoint, embedding_rows
from accessory.checkpoint.weights import StoredWeights
from accessory.checkpoint.writer import create_shard
from accessory.config import PEFT_TYPES, ModelArgs
from accessory.errors import CheckpointError
from accessory.files import new_folder, write_json
from accessory.progress import showing
from accessory.text.form_files import META_NAME, copy_text

logger = logging.getLogger(__name__)


def split(
    source: str | Path, destination: str | Path, *, mp: int = 8, llama_config: Sequence[str | Path] | None = None
) -> None:
    """Write a checkpoint as ``mp`` accessory shards with config.json, meta.json and the tokenizer beside them.

    Any form that the library loads may be the source, whatever its number of shards. Both sides are
    memory-mapped: memory use does not grow with the checkpoint. The weights keep their dtype; a tensor that is put
    together from several of unlike dtypes gets one that rounds none of them.

    Args:
        mp: number of shards to write.
        llama_config: config files for a source that has none, or to overrule it.

    Raises:
        ValueError: ``mp`` shards cannot hold the model; lists the numbers that can.
        FileExistsError: the destination is not empty.
        CheckpointError, FileNotFoundError: the source cannot be read.
        OSError: the disk is full.
    """
    manifest = Manifest.read(source)
    args = stored_args(manifest, llama_config)
    weights = StoredWeights(manifest, args)
    obstacles = obstacles_to_files(args, mp, sparse=False) if mp >= 1 else ["it must be at least 1"]
    if obstacles:
        works = [n for n in range(1, args.n_heads + 1) if not obstacles_to_files(args, n, sparse=False)]
        raise ValueError(f"cannot write {mp} shards: {'; '.join(obstacles)}. Numbers that work: {works}")
    with new_folder(Path(destination)) as aside:
        targets = [target for target in base_sources(args, mp) if target.parameter in weights.held]
        with showing(f"splitting into {mp}", len(targets), unit="tensors") as splitting:
            for file in range(mp):
                wanted = [target for target in targets if target.file == file]
                _write_shard(aside / f"consolidated.{file:02d}-of-{mp:02d}.model.pth", wanted, weights)
                splitting.advance(len(wanted))
        write_beside(aside, args, PEFT_TYPES[0] if args.peft else "mistral", manifest)


def stored_args(manifest: Manifest, llama_config: Sequence[str | Path] | None = None) -> ModelArgs:
    """The folder's sizes, `with_vocabulary`, and how its matrices are quantized, which its own config says.

    Args:
        llama_config: config files in place of the folder's own.

    Raises:
        ValueError: they say otherwise of quantization.
    """
    args, own = manifest.load_args(llama_config), manifest.load_quant()
    if args.quant is not None and args.quant != own:
        given = ", ".join(map(str, llama_config or ()))
        raise ValueError(
            f"{given} sets quant {args.quant.to_dict()}, and by its own config {manifest.folder} is "
            f"{'not quantized' if own is None else f'quantized otherwise, {own.to_dict()}'}: leave quant out, or put "
            "the config that was written with the weights beside them"
        )
    return with_vocabulary(manifest, args.replace(quant=own))


def with_vocabulary(manifest: Manifest, args: ModelArgs) -> ModelArgs:
    """A vocabulary left to the tokenizer is read off the embedding; of an adapter alone it stays open.

    Raises:
        CheckpointError: the embedding is missing, and more than an adapter is there.
    """
    if args.vocab_size != -1:
        return args
    rows = embedding_rows(manifest)
    if rows is not None:
        return args.replace(vocab_size=rows)
    if not Checkpoint.open(manifest, args).is_adapter:
        raise CheckpointError(
            f"{manifest.shards[0]} lacks tensor tok_embeddings.weight, and the config does not give vocab_size: copy "
            "the file again, or give vocab_size in the config"
        )
    return args


def write_beside(
    folder: Path, args: ModelArgs, llama_type: str, source: Manifest, *, form_of: Manifest | None = None
) -> None:
    """Write what lies beside a checkpoint's weights; says so where the source has no tokenizer.

    Args:
        source: whose tokenizer it is.
        form_of: whose form, in which it is asked; None: the source's.
    """
    form = copy_text(source.folder, folder, form_of=(form_of or source).folder)
    if not source.has_tokenizer:
        logger.warning("%s has no tokenizer: put tokenizer.model into the new folder before using it", source.folder)
    write_json(folder / "config.json", args.to_dict())
    write_json(folder / META_NAME, {"llama_type": llama_type, **form})


def _write_shard(path: Path, targets: list[Source], weights: StoredWeights) -> None:
    dtypes = {target.key: weights.dtype(target.parameter, target.box) for target in targets}
    shard = create_shard(path, {PREFIX + target.key: (target.shape, dtypes[target.key]) for target in targets})
    for target in targets:
        weights.copy(target.parameter, target.box, target.view(shard[PREFIX + target.key]))
