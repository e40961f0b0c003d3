"""Examples tokenised once, in files that all processes of a host map into memory.

    <cache folder>/<key>/tokens.bin, labels.bin   the examples one after another, uint16 or int32
                         offsets.bin              int64: example i is [offsets[i], offsets[i + 1])
                         digests.bin              uint64: of the record that each example is of
                         meta.json                the sizes, and what became of the records
    <cache folder>/<key>.lock                     held by the one process that writes

The key is a digest of all that the files depend on: the bytes of the data and of the tokenizer, the templates and
the day where one writes it, the settings. So nothing has to be deleted by hand when data change.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from accessory.data.examples import Recipe
from accessory.data.finetune_data import INDEX_NAME, FinetuneData, is_complete
from accessory.data.readers import data_files
from accessory.data.sources import Source, read_data_config
from accessory.data.tokenise import SourceReport, bad_record, check_source, token_dtype, write_source
from accessory.files import locked, sync
from accessory.gguf_header import SUFFIX
from accessory.text.forms import Form
from accessory.text.gguf import content_of
from accessory.text.template import TemplateForm
from accessory.text.tokenizer import Tokenizer

_FORMAT = 5  # raise it when records become other examples than before
CACHE_VARIABLE = "ACCESSORY_DATA_CACHE"

logger = logging.getLogger(__name__)


def load_finetune_data(
    config: str | Path,
    tokenizer: Tokenizer,
    *,
    max_words: int,
    dialog: bool = False,
    form: Form | None = None,
    ignore_fields: Iterable[str] = (),
    seed: int = 0,
    skip_bad_records: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> FinetuneData:
    """The examples of the data yaml `config`, from the cache, or tokenised into it first.

    `max_words` is the most tokens of an example; `dialog`, `form` and `ignore_fields` are as Recipe has them; `seed`
    draws the share of a source with a ratio. `cache_dir` is by default $ACCESSORY_DATA_CACHE, else
    ~/.cache/accessory/data. Any number of processes may call it at once: one writes, the others wait and map its
    files. If the data are bad each finds that out for itself, so let one process of a host call it first and tell the
    others.

    Raises FileNotFoundError or ValueError, with file and place, for bad data as the modules sources, readers
    and tokenise say, and OSError where the cache cannot be written.
    """
    if isinstance(max_words, bool) or not isinstance(max_words, int) or max_words < 2:
        raise ValueError(f"--max_words is {max_words!r}: give a number of tokens of 2 or more")
    sources = read_data_config(config)
    if dialog and any((source.preprocess, source.prompt_type) != ("alpaca", "alpaca") for source in sources):
        logger.warning("%s: preprocess and prompt_type have no effect on dialogues", config)
    recipe = Recipe(tokenizer, max_words, dialog, form, seed, frozenset(ignore_fields))
    folder = _cache_dir(cache_dir) / _key(sources, recipe)
    if not is_complete(folder):
        with _explained(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")) as alone:
            if not is_complete(folder):
                _write(folder, sources, recipe, skip_bad_records=skip_bad_records, progress=progress, alone=alone)
    data = FinetuneData(folder)
    for source, report in zip(sources, data.reports, strict=True):
        report.path = str(source.path)  # the same data may have lain elsewhere when they were written
    bad = next((report for report in data.reports if report.bad), None)
    if bad is not None and not skip_bad_records:  # it was written by a run that skipped them
        raise bad_record(bad.path, bad.listed[0])
    for report in data.reports:
        for level, line in report.lines(max_words):
            logger.log(level, line)
    return data


def _write(
    folder: Path, sources: Sequence[Source], recipe: Recipe, *, skip_bad_records: bool, progress: bool, alone: bool
) -> None:
    """Write the cache aside, then move it to `folder`; `alone`: nobody else writes here."""
    how = {"skip_bad_records": skip_bad_records, "progress": progress}
    reports = [check_source(source, recipe, **how) for source in sources]
    refuse_several_forms(reports)
    host = socket.gethostname()
    if alone:  # of the processes here: some file systems lock for one host only
        for left in folder.parent.glob(f"{folder.name}.{host}-*.tmp"):  # a process was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{folder.name}.{host}-{os.getpid()}.tmp")
    try:
        with _explained(folder.parent):
            aside.mkdir()
            written: list[tuple[int, int]] = []
            with (aside / "tokens.bin").open("wb") as tokens, (aside / "labels.bin").open("wb") as labels:
                for order, (source, report) in enumerate(zip(sources, reports, strict=True)):
                    written += write_source(source, recipe, report, (tokens, labels), order=order, **how)
                _flush(tokens)
                _flush(labels)
            if _key(sources, recipe) != folder.name:
                paths = ", ".join(str(source.path) for source in sources)
                raise ValueError(f"the data, or the day, changed while they were tokenised ({paths}): start again")
            _finish(aside, written, {"reports": list(map(asdict, reports)), "dtype": token_dtype(recipe.tokenizer).str})
            if not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)  # half of one, from a host that lost power
                try:
                    aside.rename(folder)
                except OSError:  # another process may have been faster, without a lock
                    if not is_complete(folder):
                        raise
            sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _finish(aside: Path, written: Sequence[tuple[int, int]], meta: dict[str, Any]) -> None:
    lengths, digests = zip(*written, strict=True)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype("<i8")
    sizes = {"examples": len(lengths), "tokens": int(offsets[-1])}
    for name, content in (
        ("offsets.bin", offsets.tobytes()),
        ("digests.bin", np.array(digests, dtype="<u8").tobytes()),
        (INDEX_NAME, json.dumps(sizes | meta).encode()),
    ):
        with (aside / name).open("wb") as file:
            file.write(content)
            _flush(file)
    sync(aside)


def _key(sources: Sequence[Source], recipe: Recipe) -> str:
    """A digest of all that the cached files depend on."""
    form = recipe.form
    template = form.template if isinstance(form, TemplateForm) else None
    drawn = any(source.ratio < 1 for source in sources)
    parts = {
        "format": _FORMAT,
        "dialog": recipe.dialog,
        "form": None if form is None else [form.recorded(), template],
        "day": date.today().isoformat() if "strftime_now" in (template or "") else None,  # which it then writes
        "ignore": sorted(recipe.ignore),
        "max_words": recipe.max_words,
        "seed": recipe.seed if drawn else None,
        "tokenizer": [[file.name, _digest_of_tokenizer(file)] for file in recipe.tokenizer.files],
        "ends": [recipe.tokenizer.bos_id, recipe.tokenizer.eos_id],  # which a model's config may have said
        "libraries": [importlib.metadata.version(name) for name in ("sentencepiece", "tokenizers", "jinja2")],
        "sources": [
            [
                [_digest(file) for file in data_files(source.path)],
                source.path.suffix.lower(),
                source.ratio,
                None if recipe.dialog else [source.preprocess, source.prompt_type],
            ]
            for source in sources
        ],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def refuse_several_forms(reports: Sequence[SourceReport]) -> None:
    """See that a model is asked in one form alone: ValueError."""
    found = {form["name"]: report.path for report in reports for form in report.forms}
    if len(found) > 1:
        if len(set(found.values())) == 1:
            listed = f"{' and '.join(found)}, in {next(iter(found.values()))}"
        else:
            listed = ", ".join(f"{name} ({path})" for name, path in found.items())
        raise ValueError(f"the records have several prompt forms, {listed}: name one for all with --chat_template")


def _digest_of_tokenizer(path: Path) -> str:
    """Of a GGUF file only what it says of its tokenizer: behind that lie the weights, gigabytes of them."""
    return hashlib.sha256(content_of(path)).hexdigest() if path.suffix == SUFFIX else _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_dir(given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a container's user may have none
        raise ValueError(f"there is no home folder for the data cache: name a folder in ${CACHE_VARIABLE}") from error
    return base / "accessory" / "data"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock file; False where there are no locks: there every process writes its own, and the last one wins."""
    with contextlib.ExitStack() as stack:
        with _explained(path.parent):
            waits = partial(logger.info, "another process is tokenising the same data: waiting for it")
            held = stack.enter_context(locked(path, on_wait=waits, remove=True))
        yield held


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what to do about a folder that cannot be written, or is full."""
    try:
        yield
    except OSError as error:
        fix = f"free space or make it writable, or name another folder in ${CACHE_VARIABLE}"
        raise OSError(error.errno, f"cannot write the data cache in {folder} ({error}): {fix}") from error


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
