"""Two passes over the data files: look at every record, then write the examples of the usable ones.

The first finds a bad record within seconds to minutes, where tokenising takes many times that, and counts the
usable records, of which a source's ratio is a share.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from accessory.data.alpaca import alpaca_text
from accessory.data.dialogue import dialogue_text
from accessory.data.examples import Ids, TrainingText, encode_example
from accessory.data.readers import read_records
from accessory.data.sources import Source
from accessory.text.tokenizer import Tokenizer

_LISTED = 5  # bad records of a file that are named; the others are counted
_THREADS = 8  # the tokenizer runs outside Python's lock, a quarter of the work does not
_AT_ONCE = 256  # texts that are held in memory
_SAID_EVERY = 10.0  # seconds between lines of progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How records become examples: `dialog` says which kind they are, `max_words` the most tokens of one."""

    tokenizer: Tokenizer
    dialog: bool
    max_words: int
    seed: int = 0


@dataclass(slots=True)
class SourceReport:
    """What became of one file's records.

    `usable` have a text with an answer; `bad` could not be used, the first few of them stand in `listed`;
    `unanswered` say nothing in any answer; `emptied` lost all that is learned where max_words cut them. Of the
    usable ones `examples` were taken, with `tokens` in all, `learned` of them; `cut` were shortened.
    """

    path: str
    usable: int = 0
    bad: int = 0
    listed: list[str] = field(default_factory=list)
    unanswered: int = 0
    emptied: int = 0
    examples: int = 0
    cut: int = 0
    tokens: int = 0
    learned: int = 0

    def lines(self, max_words: int) -> Iterator[tuple[int, str]]:
        """What to log, each line with its level."""
        yield logging.INFO, f"{self.path}: {self.examples} examples, {self.tokens} tokens, {self.learned} learned"
        if self.bad:
            yield logging.WARNING, f"{self.path}: {self.bad} bad records are left out"
            yield from ((logging.WARNING, f"  {line}") for line in self.listed)
            if self.bad > len(self.listed):
                yield logging.WARNING, f"  and {self.bad - len(self.listed)} more"
        if self.unanswered:
            yield logging.WARNING, f"{self.path}: {self.unanswered} records without an answer are left out"
        if self.emptied:
            where = f"no answer within --max_words {max_words}"
            yield logging.WARNING, f"{self.path}: {self.emptied} examples with {where} are left out"
        if self.cut:
            yield logging.INFO, f"{self.path}: {self.cut} examples are cut at --max_words {max_words}"


def check_source(source: Source, recipe: Recipe, *, skip_bad_records: bool, progress: bool) -> SourceReport:
    """Look at every record of the file and count.

    Raises ValueError at a bad record, with file, place and reason, unless `skip_bad_records`; for a file that is
    malformed; and for one in which no record has an answer.
    """
    report = SourceReport(str(source.path))
    for _ in _bar(_usable_texts(source, recipe, report, skip_bad_records), f"checking {source.path.name}", progress):
        report.usable += 1
    if not report.usable:
        found = f"{report.bad} bad records, {report.unanswered} without an answer"
        if report.bad:
            found += f"; the first bad one: {report.listed[0]}"
        raise ValueError(f"the data file {source.path} holds no record to learn from ({found}): correct it")
    return report


def write_source(
    source: Source,
    recipe: Recipe,
    report: SourceReport,
    files: tuple[BinaryIO, BinaryIO],
    *,
    order: int,
    progress: bool,
) -> list[int]:
    """Append the tokens and the labels of the file's examples to `files`; returns the examples' lengths in tokens.

    `report` is check_source's, and is completed; `order` is the source's place in the yaml. The values are
    little-endian, of `token_dtype`. Raises ValueError where max_words leaves no example.
    """
    dtype = token_dtype(recipe.tokenizer)
    chosen = _chosen(report.usable, source.ratio, [recipe.seed, order])
    texts = _usable_texts(source, recipe, SourceReport(""), skip_bad_records=True)
    lengths: list[int] = []
    bar = _bar(texts, f"tokenising {source.path.name}", progress, total=report.usable)
    for tokens, labels, cut in _encoded(itertools.compress(bar, chosen), recipe):
        learned = int(np.count_nonzero(labels))
        if not learned:
            report.emptied += 1
            continue
        for file, values in zip(files, (tokens, labels), strict=True):
            file.write(values.astype(dtype).tobytes())
        lengths.append(len(tokens))
        report.cut += cut
        report.learned += learned
    report.examples, report.tokens = len(lengths), sum(lengths)
    if not lengths:
        raise ValueError(
            f"no example of the data file {source.path} has an answer within its first {recipe.max_words} tokens: "
            "raise --max_words"
        )
    return lengths


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest of the two types of the cache that holds every id."""
    return np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<i4")


def as_json(reports: Sequence[SourceReport]) -> list[dict[str, Any]]:
    """The reports as they are kept beside the data."""
    return [asdict(report) for report in reports]


def _usable_texts(
    source: Source, recipe: Recipe, report: SourceReport, skip_bad_records: bool
) -> Iterator[TrainingText]:
    """The texts of the records that have an answer, in the file's order; `report` counts the others."""
    for record in read_records(source.path):
        reason = record.fault
        text = None
        if reason is None:
            try:
                if isinstance(record.value, dict) and record.value.get("image"):
                    raise ValueError("it has an image, and only text can be trained on")
                if recipe.dialog:
                    text = dialogue_text(record.value)
                else:
                    text = alpaca_text(record.value, prompt_type=source.prompt_type, preprocess=source.preprocess)
                text.text.encode()
            except UnicodeEncodeError:
                reason = "it holds a lone surrogate, which is no character"
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            if not skip_bad_records:
                fix = "correct it, or pass --skip_bad_records to leave such records out"
                raise ValueError(f"bad record in {source.path}, {record.place}: {reason}; {fix}")
            report.bad += 1
            if len(report.listed) < _LISTED:
                report.listed.append(f"{record.place}: {reason}")
        elif text is None or not text.answered:
            report.unanswered += 1
        else:
            yield text


def _encoded(texts: Iterable[TrainingText], recipe: Recipe) -> Iterator[tuple[Ids, Ids, bool]]:
    """The texts' examples, in their order."""
    encode = functools.partial(encode_example, tokenizer=recipe.tokenizer, max_words=recipe.max_words)
    waiting = iter(texts)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(waiting, _AT_ONCE)):
            yield from pool.map(encode, some)


def _chosen(count: int, ratio: float, seed: list[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of `count` records are a share of `ratio`, at least one."""
    chosen = np.zeros(count, dtype=bool)
    wanted = max(1, round(ratio * count))
    chosen[np.random.default_rng(seed).permutation(count)[:wanted]] = True
    return chosen


def _bar(texts: Iterator[TrainingText], name: str, progress: bool, total: int | None = None) -> Iterator[TrainingText]:
    """The texts, with a bar on a terminal and now and then a line elsewhere."""
    if not progress:
        return texts
    if sys.stderr.isatty():
        return iter(tqdm(texts, desc=name, unit=" records", total=total, leave=False))
    return _said(texts, name, total)


def _said(texts: Iterator[TrainingText], name: str, total: int | None) -> Iterator[TrainingText]:
    said = time.monotonic()
    for number, text in enumerate(texts, 1):
        yield text
        if (now := time.monotonic()) - said >= _SAID_EVERY:
            logger.info("%s: %s records", name, f"{number:,}" if total is None else f"{number:,} of {total:,}")
            said = now
