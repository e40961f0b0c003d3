"""Writing checkpoints in any layout: skeletons of all files first, then their tensors, one part in memory at a time."""

import dataclasses
import logging
import math
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
from accessory.checkpoint.manifest import Sum, SummedFile
from accessory.config import PEFT_TYPES, ModelArgs
from accessory.files import sync, write_json
from accessory.parallel.box import Box
from accessory.text.form_files import META_NAME, SETTINGS_KEY, copy_text, find_form, templates_of, write_ends
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
        sums: of the files that `fill` has written, by their names.
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
        self.metadata: Mapping[str, Any] | None = None  # of `say_within`
        self.sums: dict[str, Sum] = {}
        held = frozenset(held)
        sources = [one for one in layout.sources(args, files or 1) if one.written and one.parameter in held]
        dtypes = [layout.coded(source, dtype(source)) for source in sources]
        if layout.cut is None:
            sources = _spread(sources, dtypes, math.inf if layout.one_file else LARGEST_FILE)
        files = files or 1 + max((source.file or 0 for source in sources), default=0)
        self.sources: list[list[Source]] = [[] for _ in range(files)]
        self._dtypes: dict[tuple[int, str], Coding] = {}
        for source, own in zip(sources, dtypes, strict=True):
            assert source.file is not None
            self.sources[source.file].append(source)
            self._dtypes[source.file, source.key] = own
        self.names = [layout.file_name(file, len(self.sources), ending) for file in range(len(self.sources))]
        self._open: dict[int, dict[str, Stored]] = {}
        self._parts = parts_of(source for own in self.sources for source in own)

    @property
    def count(self) -> int:
        """Of all tensors."""
        return len(self._dtypes)

    @property
    def most(self) -> Coding:
        """The dtype of most weights."""
        sizes: dict[Coding, int] = {}
        for file, sources in enumerate(self.sources):
            for source in sources:
                own = self._dtypes[file, source.key]
                sizes[own] = sizes.get(own, 0) + Box.whole(source.shape).numel
        return max(sizes, key=sizes.__getitem__)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(
            nbytes_of(source.shape, self._dtypes[file, source.key])
            for file, sources in enumerate(self.sources)
            for source in sources
        )

    def open(self, *files: int) -> None:
        """Write files' skeletons and map them.

        Raises:
            OSError: the disk is full.
        """
        for file in files:
            self._open[file] = create_tensors(self.folder / self.names[file], self._wanted(file), self.metadata)

    @contextmanager
    def all_open(self) -> Iterator[None]:
        """Meanwhile every file is open; at the end they are on the disk."""
        self.open(*range(len(self.names)))
        yield
        self.close(*range(len(self.names)))

    def boxes(self, name: str) -> list[Box]:
        """The parts of a parameter that the files hold, each once."""
        return list(dict.fromkeys(source.box for source in self._parts[name].sources))

    def put(self, name: str, box: Box, values: Tensor) -> None:
        """Write a part of a parameter to wherever an open file holds some of it."""
        for source, common in self._parts[name].within(box) if name in self._parts else ():
            assert source.file is not None
            if source.file in self._open:
                source.write(self._stored(source), common, values[common.within(box)])

    def close(self, *files: int) -> None:
        """Let go of files, and have them on the disk."""
        for file in files:
            del self._open[file]
            sync(self.folder / self.names[file])

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
        with ThreadPoolExecutor(1) as thread:
            for file, name in enumerate(self.names):
                places = lay_out(self.folder / name, self._wanted(file), self.metadata)
                with SummedFile(self.folder / name, thread) as written:
                    self._fill_one(file, places, written, read, advance)
                    self.sums[name] = written.finish()
        self.write_index()

    def _fill_one(
        self,
        file: int,
        places: Mapping[str, int],
        written: SummedFile,
        read: Callable[[Source, Box], Tensor],
        advance: Callable[[], None],
    ) -> None:
        prefix, path = self.layout.prefix, self.folder / self.names[file]
        for source in sorted(self.sources[file], key=lambda own: places[prefix + own.key]):
            written.keep(places[prefix + source.key])
            coding, named = self._dtypes[file, source.key], f"{path}: {source.key}"
            for part in source.pieces(AT_ONCE):
                written.write(source.encoded(part, read(source, part), coding, named))
            advance()

    def write_index(self) -> None:
        """Write which file holds which tensor, where the layout has that."""
        if self.layout.index_name is None or len(self.sources) == 1:
            return
        weight_map = {source.key: self.names[file] for file, own in enumerate(self.sources) for source in own}
        write_json(
            self.folder / self.layout.index_name,
            {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))},
        )

    def _wanted(self, file: int) -> dict[str, Wanted]:
        assert self.layout.metadata is None or self.metadata, "say_within comes first"
        return {self.layout.prefix + own.key: (own.shape, self._dtypes[file, own.key]) for own in self.sources[file]}

    def _stored(self, source: Source) -> Stored:
        assert source.file is not None
        return self._open[source.file][self.layout.prefix + source.key]


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


def write_beside(
    folder: Path,
    layout: Layout,
    args: ModelArgs,
    source: Folder,
    *,
    dtype: Coding,
    form_of: Folder | None = None,
) -> None:
    """Write what lies beside a checkpoint's weights; says so where the source has no tokenizer.

    Settings that the layout's own config cannot say stand in meta.json, which other programs do not read.

    Args:
        source: whose tokenizer it is.
        dtype: of most weights.
        form_of: whose form, in which it is asked; None: the source's.
    """
    said = copy_text(source.place, folder, form_of=(form_of or source).place)
    if not source.has_tokenizer:
        logger.warning("%s has no tokenizer: put tokenizer.model into the new folder before using it", source.path)
    write_config(folder, layout, args, PEFT_TYPES[0] if args.peft else "mistral", said, dtype=dtype)
    if layout.says_ends and source.has_tokenizer:
        tokenizer = Tokenizer(folder)
        write_ends(tokenizer, find_form(tokenizer, [folder]), folder)


def say_within(writer: Writer, source: Folder, *, name: str, form_of: Folder | None = None) -> None:
    """Have a writer's files say what those of other layouts have beside them, where its layout's do.

    A tokenizer that the layout's files are to tell of is opened before any weight is written.

    Args:
        source: whose tokenizer it is.
        name: of the model.
        form_of: whose chat templates; None: the source's.

    Raises:
        ValueError, FileNotFoundError: the tokenizer cannot be read.
    """
    layout, args = writer.layout, writer.args
    of_tokenizer = layout.says_ends or layout.metadata is not None
    found = Tokenizer.find(source.place) if of_tokenizer else None
    tokenizer = None if found is None else Tokenizer(found)
    if layout.metadata is None:
        return
    if tokenizer is not None and (reason := unsaid(tokenizer)):
        logger.warning(
            "%s %s, and %s is given no other: llama.cpp takes token ids alone", tokenizer.path, reason, layout.name
        )
        tokenizer = None
    if tokenizer is not None and (more := unlike(tokenizer)):
        logger.warning("%s %s, and llama.cpp does not", tokenizer.path, more)
    templates = {own: text for own, (text, _) in templates_of((form_of or source).place).items()}
    writer.metadata = layout.metadata(args, writer.most, name) | text_metadata(tokenizer, templates, args.vocab_size)


def write_config(
    folder: Path,
    layout: Layout,
    args: ModelArgs,
    llama_type: str,
    said: Mapping[str, Any],
    *,
    dtype: Coding,
    always: bool = False,
) -> None:
    """Write the sizes in the layout's own file, and meta.json with what that has no word for.

    Args:
        llama_type: of the model; meta.json adds that the layout is sparse, for which adapters have no name.
        said: of the form in which the model is asked.
        always: meta.json is written even where it says nothing more.
    """
    if layout.config is None:
        name = layout.file_name(0, 1, None)
    else:
        assert isinstance(dtype, torch.dtype)
        name, config = layout.config(args, dtype)
        write_json(folder / name, config)
    lost = settings_beside(args, folder / name)
    for_others = {key: value for key, value in lost.items() if key not in HINTS}
    if for_others:
        logger.warning(
            "%s cannot say %s, which other programs will not know: it stands in %s",
            *(layout.shown, ", ".join(f"{key} {value}" for key, value in for_others.items()), META_NAME),
        )
    meta = {**said, **({SETTINGS_KEY: lost} if lost else {})}
    if meta or always or not layout.plain:
        kind = llama_type.removesuffix("_sparse") + ("_sparse" if layout is SPARSE and args.peft is None else "")
        write_json(folder / META_NAME, {"llama_type": kind, **meta})


def settings_beside(args: ModelArgs, config: Path) -> dict[str, Any]:
    """The settings that a model has otherwise than its config says."""
    said, own = load_args([config]).to_dict(), args.to_dict()
    return {key: value for key, value in own.items() if said.get(key) != value}
