"""Two passes over the data files: look at every record, then write the examples of the usable ones.

The first finds a bad record before any is written, and counts the usable ones, of which a source's ratio is a share.
It tokenises nothing, which is most of the work; a chat template's rendering, as much again, takes place in both.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from accessory.data.examples import Ids, Recipe
from accessory.data.readers import Record, read_records
from accessory.data.records import OtherShape, UnknownField, digest_of, read_said
from accessory.data.sources import Source
from accessory.errors import counted
from accessory.progress import showing
from accessory.text.chat import Segment
from accessory.text.forms import Form
from accessory.text.tokenizer import Tokenizer

_LISTED = 5  # bad records of a file that are named; the others are counted
_THREADS = 8  # the tokenizer runs outside Python's lock, a quarter of the work does not
_AT_ONCE = 256  # records that are held in memory
_LOOKED_AT = 100  # records behind a bad one, to see whether all of the file are so
_NAMED = 100  # unknown fields of a file that are looked for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usable:
    """A record from which something can be learned, and where it stands: its examples, and the form that it has."""

    place: str
    value: Any
    parts: list[list[Segment]]
    form: Form | None


@dataclass(slots=True)
class SourceReport:
    """What became of one file's records.

    `usable` have an answer that is learned, in the forms `forms` (as meta.json has them); `bad` could not be used, the
    first few of them stand in `listed`; `unanswered` have nothing to learn; the input of `uninput` usable ones is left
    out; `emptied` examples lost all that is learned where max_words cut them. The usable ones that were taken made
    `examples`, with `tokens` in all, `learned` of them; `cut` were shortened.
    """

    path: str
    forms: list[dict[str, Any]] = field(default_factory=list)
    usable: int = 0
    bad: int = 0
    listed: list[str] = field(default_factory=list)
    unanswered: int = 0
    uninput: int = 0
    emptied: int = 0
    examples: int = 0
    cut: int = 0
    tokens: int = 0
    learned: int = 0

    def lines(self, max_words: int) -> Iterator[tuple[int, str]]:
        """What to log, each line with its level."""
        made = f"{counted(self.examples, 'example')}, {counted(self.tokens, 'token')}, {self.learned:,} learned"
        yield logging.INFO, f"{self.path}: {made}"
        if self.bad:
            yield logging.WARNING, f"{self.path}: {self.bad} bad records are left out"
            yield from ((logging.WARNING, f"  {line}") for line in self.listed)
            if self.bad > len(self.listed):
                yield logging.WARNING, f"  and {self.bad - len(self.listed)} more"
        if self.unanswered:
            yield logging.WARNING, f"{self.path}: {self.unanswered} records without an answer to learn are left out"
        if self.uninput:
            yield logging.WARNING, f"{self.path}: the input of {self.uninput} records is left out by their prompt_type"
        if self.emptied:
            where = f"no answer within --max_words {max_words}"
            yield logging.WARNING, f"{self.path}: {self.emptied} examples with {where} are left out"
        if self.cut:
            lost = f"{self.path}: {self.cut} examples are cut at --max_words {max_words}, and lose the end of an answer"
            yield logging.INFO, lost


def check_source(source: Source, recipe: Recipe, *, skip_bad_records: bool, progress: bool) -> SourceReport:
    """Look at every record of the file and count.

    Raises ValueError at a bad record, with file, place and reason, unless `skip_bad_records`; for a file that is
    malformed; and for one in which no record has an answer.
    """
    report = SourceReport(str(source.path))
    records = usable_records(source, recipe, report, skip_bad_records=skip_bad_records)
    with showing(f"checking {source.path.name}", unit="records", shown=progress) as checking:
        for _ in checking.over(records):
            report.usable += 1
    if not report.usable:
        found = f"{report.bad} bad records, {report.unanswered} without an answer"
        found += f"; the first bad one: {report.listed[0]}" if report.bad else ""
        cure = _cure(source, recipe) if report.bad else "correct it"
        raise ValueError(f"the data file {source.path} holds no record to learn from ({found}): {cure}")
    return report


def write_source(
    source: Source,
    recipe: Recipe,
    report: SourceReport,
    files: tuple[BinaryIO, BinaryIO],
    *,
    order: int,
    skip_bad_records: bool,
    progress: bool,
) -> list[tuple[int, int]]:
    """Append the tokens and the labels of the file's examples to `files`; returns of each its tokens and its digest.

    `report` is check_source's, and is completed; `order` is the source's place in the yaml. The values are
    little-endian, of `token_dtype`. Raises ValueError where max_words leaves no example, and for an answer that would
    not come back from its tokens, unless `skip_bad_records`.
    """
    dtype = token_dtype(recipe.tokenizer)
    chosen = _chosen(report.usable, source.ratio, [recipe.seed, order])
    records = usable_records(source, recipe, SourceReport(""), skip_bad_records=True)
    written: list[tuple[int, int]] = []
    what = f"tokenising {source.path.name}"
    with showing(what, report.usable, unit="records", shown=progress) as work:
        for record, examples in _encoded(itertools.compress(work.over(records), chosen), recipe):
            if isinstance(examples, ValueError):
                if not skip_bad_records:
                    raise bad_record(source.path, f"{record.place}: {examples}")
                _note(record.place, examples, report)
                continue
            digest = digest_of(record.value, ignore=recipe.ignore)
            for tokens, labels, cut in examples:
                learned = int(np.count_nonzero(labels))
                if not learned:
                    report.emptied += 1
                    continue
                for file, values in zip(files, (tokens, labels), strict=True):
                    file.write(values.astype(dtype).tobytes())
                written.append((len(tokens), digest))
                report.cut += cut
                report.learned += learned
    report.examples, report.tokens = len(written), sum(length for length, _ in written)
    if not written:
        where = f"the data file {source.path} has an answer within its first {recipe.max_words} tokens"
        raise ValueError(f"no example of {where}: raise --max_words")
    return written


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest of the two types of the cache that holds every id."""
    return np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<i4")


def usable_records(source: Source, recipe: Recipe, report: SourceReport, *, skip_bad_records: bool) -> Iterator[Usable]:
    """The records that have something to learn, in the file's order; `report` counts the others, and gets the forms.

    Raises ValueError at a bad record unless `skip_bad_records`, and at an unknown field in any case, with those of all
    that follows: it would be in most of them.
    """
    records, others = read_records(source.path), False
    for record in records:
        try:
            usable = _read(record, recipe, source)
        except UnknownField as error:
            more = _unknown(itertools.chain([record], records), recipe.ignore.union(error.names))
            where = f"{source.path}, {record.place}: {error.where}{' (or what follows it)' if more else ''}"
            raise ValueError(str(UnknownField(where, [*error.names, *more]))) from None
        except ValueError as error:
            if not skip_bad_records:
                others = others or _any_usable(records, recipe, source)
                raise bad_record(source.path, f"{record.place}: {error}", error, others=others) from None
            _note(record.place, error, report)
            continue
        if not usable.parts:
            report.unanswered += 1
            continue
        if usable.form is not None and (said := usable.form.recorded()) not in report.forms:
            report.forms.append(said)
        report.uninput += recipe.leaves_input_out(record.value, usable.form)
        others = True
        yield usable


def _unknown(records: Iterable[Record], ignore: frozenset[str]) -> list[str]:
    """The names of the records' unknown fields beside those of `ignore`, of a great many the first."""
    names: list[str] = []
    with contextlib.suppress(ValueError):  # the file may be malformed further on
        for record in records:
            while len(names) < _NAMED:
                try:
                    read_said(record.value, ignore=ignore.union(names))
                    break
                except UnknownField as error:
                    names += error.names
                except ValueError:
                    break
    return names


def _read(record: Record, recipe: Recipe, source: Source) -> Usable:
    if record.fault is not None:
        raise ValueError(record.fault)
    parts, form = recipe.read(record.value, source)
    try:
        "".join(segment.text for part in parts for segment in part).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return Usable(record.place, record.value, parts, form)


def bad_record(path: str | Path, said: str, error: ValueError | None = None, *, others: bool = True) -> ValueError:
    """The refusal of a file for one record of it, which leaving out helps where there are others.

    Args:
        said: the record's place and what is wrong with it.
        error: what was raised of it.
        others: whether any other record is usable.
    """
    cure = error.cure if isinstance(error, OtherShape) else "correct it"
    if others:
        cure += ", or pass --skip_bad_records to leave such records out"
    elif not isinstance(error, OtherShape):
        cure += " (no record near it is usable)"
    return ValueError(f"bad record in {path}, {said}; {cure}")


def _any_usable(records: Iterable[Record], recipe: Recipe, source: Source) -> bool:
    """Whether one of the next records has something to learn."""
    with contextlib.suppress(ValueError):  # the file may be malformed further on
        for record in itertools.islice(records, _LOOKED_AT):
            with contextlib.suppress(ValueError):
                if _read(record, recipe, source).parts:
                    return True
    return False


def _cure(source: Source, recipe: Recipe) -> str:
    """What to do about a file without a usable record: what its first bad one asks for."""
    for record in read_records(source.path):
        try:
            _read(record, recipe, source)
        except OtherShape as error:
            return error.cure
        except ValueError:
            break
    return "correct it"


def _note(place: str, error: ValueError, report: SourceReport) -> None:
    report.bad += 1
    if len(report.listed) < _LISTED:
        report.listed.append(f"{place}: {error}")


def _encoded(
    records: Iterable[Usable], recipe: Recipe
) -> Iterator[tuple[Usable, list[tuple[Ids, Ids, bool]] | ValueError]]:
    """The records with their examples, in their order; with the reason where there are none."""

    def encode(record: Usable) -> list[tuple[Ids, Ids, bool]] | ValueError:
        try:
            return [recipe.encode(part) for part in record.parts]
        except ValueError as error:
            return error

    waiting = iter(records)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(waiting, _AT_ONCE)):
            yield from zip(some, pool.map(encode, some), strict=True)


def _chosen(count: int, ratio: float, seed: list[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of `count` records are a share of `ratio`, at least one."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(count)[: max(1, round(ratio * count))]] = True
    return chosen
