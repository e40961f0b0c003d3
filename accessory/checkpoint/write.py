"""Writing checkpoints in any layout: skeletons of all files first, then their tensors, one part in memory at a time."""

import dataclasses
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.blocks import Coding, Stored, nbytes_of
from accessory.checkpoint.containers import Wanted, create_tensors, lay_out
from accessory.checkpoint.folder import Folder, Weights
from accessory.checkpoint.layouts import SPARSE, Layout, Source, load_args, parts_of
from accessory.checkpoint.manifest import Sum, SummedFile, sum_of, write_manifest
from accessory.config import PEFT_TYPES, ModelArgs
from accessory.files import new_folder, sync, write_json
from accessory.parallel.box import Box
from accessory.text.form_files import META_NAME, SETTINGS_KEY, copy_text, find_form, templates_of, write_ends
from accessory.text.forms import Form
from accessory.text.gguf import text_metadata, unlike, unsaid
from accessory.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Settings that a caller overrules anyway.
HINTS = ("max_batch_size", "max_seq_len")
# Elements that are read and written at once; they stay in a core's cache from the one to the other.
AT_ONCE = 1 << 20
# Of a layout whose tensors may lie in any file; as transformers' save_pretrained has it.
LARGEST_FILE = 5 * 10**9


class Writer:
    """The weight files of a new checkpoint, each written as a skeleton and then filled.

    Args:
        folder: where they are to lie; it is there.
        held: names of the parameters that are to be written; all that the layout can hold of them are.
        dtype: of each tensor; of GGUF also how it is coded.
        files: how many; of a layout whose tensors lie in any file as few as `LARGEST_FILE` allows, where it is None.
        ending: of the files' names, which decides what kind they are; None: the layout's usual one.

    Attributes:
        sums: of the files that are written, by their names.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        args: ModelArgs,
        *,
        held: Iterable[str],
        dtype: Callable[[Source], Coding],
        files: int | None = None,
        ending: str | None = None,
    ) -> None:
        self.folder, self.layout, self.args = folder, layout, args
        self.metadata: Mapping[str, Any] | None = None  # of GGUF, before the first file is written
        self.sums: dict[str, Sum] = {}
        held = frozenset(held)
        sources = [one for one in layout.sources(args, files or 1) if one.written and one.parameter in held]
        codings = [layout.coded(source, dtype(source)) for source in sources]
        if layout.cut is None:
            sources = _spread(sources, codings, math.inf if layout.one_file else LARGEST_FILE)
        files = files or 1 + max((source.file or 0 for source in sources), default=0)
        self.names = [layout.file_name(file, files, ending) for file in range(files)]
        self._sources: list[list[Source]] = [[] for _ in self.names]
        self._tensors: list[dict[str, Wanted]] = [{} for _ in self.names]
        for source, coding in zip(sources, codings, strict=True):
            assert source.file is not None
            self._sources[source.file].append(source)
            self._tensors[source.file][self._key(source)] = source.shape, coding
        self._open: dict[int, dict[str, Stored]] = {}
        self._parts = parts_of(sources)

    def _key(self, source: Source) -> str:
        return self.layout.prefix + source.key

    @property
    def count(self) -> int:
        """Of all tensors."""
        return sum(map(len, self._tensors))

    @property
    def most(self) -> Coding:
        """The dtype of most weights."""
        sizes: Counter[Coding] = Counter()
        for shape, coding in itertools.chain(*(own.values() for own in self._tensors)):
            sizes[coding] += math.prod(shape)
        return sizes.most_common(1)[0][0]

    def open(self, files: Iterable[int]) -> None:
        """Write files' skeletons and map them, for `put`.

        Raises:
            OSError: the disk is full.
        """
        for file in files:
            self._open[file] = create_tensors(self.folder / self.names[file], self._tensors[file], self.metadata)

    def boxes(self, name: str) -> list[Box]:
        """The parts of a parameter that the files hold, each once."""
        return list(dict.fromkeys(source.box for source in self._parts[name].sources))

    def put(self, name: str, box: Box, values: Tensor) -> None:
        """Write a part of a parameter to wherever an open file holds some of it."""
        for source, common in self._parts[name].within(box) if name in self._parts else ():
            assert source.file is not None
            if source.file in self._open:
                source.write(self._open[source.file][self._key(source)], common, values[common.within(box)])

    def close(self, files: Sequence[int]) -> None:
        """Let go of files that are filled, and have them on the disk; they are summed meanwhile."""
        for file in files:
            del self._open[file]
        paths = [self.folder / self.names[file] for file in files]
        with ThreadPoolExecutor(1) as thread:
            sums = thread.map(sum_of, paths)
            for path in paths:
                sync(path)
            self.sums.update(zip((path.name for path in paths), sums, strict=True))

    def fill(
        self,
        read: Callable[[Source, Box], Tensor],
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Write all files one after the other, each from front to back; their sums are reckoned beside that.

        Who made their folder has them on the disk at the end.

        Args:
            read: the values of a part of a source's box.
            advance: is called after each tensor.
        """
        for name, sources, tensors in zip(self.names, self._sources, self._tensors, strict=True):
            path = self.folder / name
            places = lay_out(path, tensors, self.metadata)
            in_order = sorted((places[self._key(source)], number) for number, source in enumerate(sources))
            with SummedFile(path) as written:
                for place, number in in_order:
                    source = sources[number]
                    coding, named = tensors[self._key(source)][1], f"{path}: {source.key}"
                    written.keep(place)
                    for part in source.pieces(AT_ONCE):
                        written.write(source.encoded(part, read(source, part), coding, named))
                    advance()
                self.sums[name] = written.finish()

    def write_beside(
        self,
        llama_type: str,
        said: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        form: Form | None = None,
        *,
        always: bool = False,
    ) -> None:
        """Write what lies beside the weights, but for the tokenizer: index, config, meta.json, manifest.

        Settings that the layout's own config cannot say stand in meta.json, which other programs do not read.

        Args:
            llama_type: of the model; meta.json adds that the layout is sparse, for which adapters have no name.
            said: of the form in which the model is asked.
            tokenizer: it tells where an answer ends, of layouts that say it; None: nothing does.
            form: likewise; None: that of the folder.
            always: meta.json is written even where it says nothing more.
        """
        folder, layout, args = self.folder, self.layout, self.args
        if layout.index_name is not None and len(self.names) > 1:
            weight_map = {key: name for name, own in zip(self.names, self._tensors, strict=True) for key in own}
            size = sum(nbytes_of(*wanted) for own in self._tensors for wanted in own.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / layout.index_name, index)
        name = self.names[0]
        if layout.config is not None:
            dtype = self.most
            assert isinstance(dtype, torch.dtype)
            name, config = layout.config(args, dtype)
            write_json(folder / name, config)
        in_config = load_args([folder / name]).to_dict()
        lost = {key: value for key, value in args.to_dict().items() if in_config.get(key) != value}
        for_others = ", ".join(f"{key} {value}" for key, value in lost.items() if key not in HINTS)
        if for_others:
            logger.warning(
                "%s cannot say %s, which other programs will not know: it stands in %s",
                *(layout.shown, for_others, META_NAME),
            )
        meta = {**said, **({SETTINGS_KEY: lost} if lost else {})}
        if meta or always or not layout.plain:
            kind = llama_type.removesuffix("_sparse") + ("_sparse" if layout is SPARSE and args.peft is None else "")
            write_json(folder / META_NAME, {"llama_type": kind, **meta})
        if layout.says_ends and tokenizer is not None:
            write_ends(tokenizer, form or find_form(tokenizer, [folder]), folder)
        write_manifest(folder, self.sums)


@contextmanager
def new_checkpoint(
    destination: str | Path,
    layout: Layout,
    args: ModelArgs,
    source: Folder,
    *,
    held: Iterable[str],
    dtype: Callable[[Source], Coding],
    files: int | None = None,
    ending: str | None = None,
    form_of: Folder | None = None,
    replaces: Callable[[Path], None] | None = None,
) -> Iterator[Writer]:
    """Give a `Writer` of a new folder; when its files are filled, what lies beside weights is written, and all renamed.

    Args:
        source: whose tokenizer it gets; where that has none, it is said.
        held, dtype, files, ending: the Writer's.
        form_of: whose form, in which it is asked; None: the source's.
        replaces: as `new_folder` has it.

    Raises:
        ValueError, FileNotFoundError: the tokenizer cannot be read, of which the layout's files are to tell.
        FileExistsError, OSError: as `new_folder`.
    """
    form_of = form_of or source
    with new_folder(Path(destination), replaces=replaces) as aside:
        writer = Writer(aside, layout, args, held=held, dtype=dtype, files=files, ending=ending)
        found = Tokenizer.find(source.place)
        tokenizer = Tokenizer(found) if found and (layout.says_ends or layout.metadata is not None) else None
        if layout.metadata is not None:
            templates = {own: text for own, (text, _) in templates_of(form_of.place).items()}
            known = text_metadata(_of_llama(tokenizer, layout), templates, args.vocab_size)
            writer.metadata = layout.metadata(args, writer.most, Path(destination).name) | known
        yield writer
        said = copy_text(source.place, aside, form_of=form_of.place)
        if found is None:
            logger.warning("%s has no tokenizer: put tokenizer.model into the new folder before using it", source.path)
        # With the form's templates, which may stand in its own files.
        tokenizer = Tokenizer(aside) if layout.says_ends and found else None
        writer.write_beside(PEFT_TYPES[0] if args.peft else "mistral", said, tokenizer)


def _of_llama(tokenizer: Tokenizer | None, layout: Layout) -> Tokenizer | None:
    """The tokenizer, if it is one that llama.cpp can be told of; else it is said that it is not."""
    if tokenizer is not None and (reason := unsaid(tokenizer)):
        logger.warning(
            "%s %s, and %s is given no other: llama.cpp takes token ids alone", tokenizer.path, reason, layout.name
        )
        return None
    if tokenizer is not None and (more := unlike(tokenizer)):
        logger.warning("%s %s, and llama.cpp does not", tokenizer.path, more)
    return tokenizer


def _spread(sources: Sequence[Source], dtypes: Sequence[Coding], largest: float) -> list[Source]:
    """The sources with the files that they are to lie in, none larger than that but for one tensor."""
    spread = []
    file, size = 0, 0
    for source, dtype in zip(sources, dtypes, strict=True):
        own = nbytes_of(source.shape, dtype)
        if size and size + own > largest:
            file, size = file + 1, 0
        size += own
        spread.append(dataclasses.replace(source, file=file))
    return spread


def shards_like(weights: Weights, layout: Layout, args: ModelArgs) -> int | None:
    """As many files as the source has, where it has shards and they can hold the model; None: the layout has none."""
    if layout.cut is None:
        return None
    files = len(weights.folder.files) if weights.layout.cut is not None else 1
    return 1 if layout.obstacles(args, files) else files


def cut_out(parameters: Mapping[str, Tensor], layout: Layout, args: ModelArgs) -> dict[str, Tensor]:
    """The tensors of a layout's one file, copied from whole parameters; without its prefix."""
    tensors = {}
    for source in layout.sources(args, 1):
        if source.written:
            parameter = parameters[source.parameter].detach()
            tensors[source.key] = torch.empty(source.shape, dtype=parameter.dtype)
            whole = Box.whole(tuple(parameter.shape))
            source.write(tensors[source.key], source.box, parameter[source.box.within(whole)])
    return tensors
