"""The records of a data file, one by one: .json (a list), .jsonl, .csv (comma or tab) and .parquet.

No file is held in memory as a whole. A record that cannot be read is handed on with its fault, so that the
caller decides whether it ends the run; a file after whose fault nothing can be read raises.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from accessory.data.json_list import json_list

_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `place` says where it stands ("line 3"), `value` is what was read unless `fault` says why not."""

    place: str
    value: Any
    fault: str | None = None


def check_data_file(path: Path) -> None:
    """Raise ValueError for a data file that cannot be one, without reading it whole; FileNotFoundError if absent."""
    if not path.is_file():
        if path.is_dir():
            raise ValueError(f"the data file {path} is a folder: name the file in it")
        if path.exists():
            raise ValueError(f"the data file {path} is a pipe or a device: write the data to a file")
        raise FileNotFoundError(f"no data file {path}: check the path")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"the data file {path} is of an unknown kind: take one of {', '.join(READERS)}")
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if not head:
        raise ValueError(f"the data file {path} is empty: copy or download it again")
    if head == _LFS_POINTER:
        raise ValueError(f"the data file {path} is a Git LFS pointer: run `git lfs pull` in its folder")
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"reading {path} needs pyarrow: pip install 'accessory[parquet]'")


def read_records(path: Path) -> Iterator[Record]:
    """The records of the file, whose suffix says its kind. ValueError where the file itself is malformed."""
    check_data_file(path)
    return READERS[path.suffix.lower()](path)


def _read_json(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        for number, value in enumerate(json_list(file, path), start=1):
            yield Record(f"record {number}", value)


def _read_jsonl(path: Path) -> Iterator[Record]:
    # In bytes: another line separator than "\n" may stand in a string, and a line that is not UTF-8 is one fault.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield Record(place, json.loads(text))
            except UnicodeDecodeError as error:
                yield Record(place, None, f"it is not UTF-8 ({error.reason} at byte {error.start})")
            except json.JSONDecodeError as error:
                yield Record(place, None, f"it is not valid JSON ({error.msg} at column {error.colno})")
            except (ValueError, RecursionError) as error:  # a number too long for Python, or too deep a nesting
                yield Record(place, None, f"its JSON cannot be read ({error})")


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's own limit is 128 KiB, less than long answers
    with _open_text(path) as file:
        try:
            header = file.readline()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
        file.seek(0)
        rows = csv.reader(file, delimiter="\t" if "\t" in header else ",", strict=True)
        names: list[str] = []
        while True:
            place = f"line {rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # what quoting it broke cannot be known: stop
                raise ValueError(f"{path}, {place}: not valid CSV ({error})") from error
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error) from error
            if not row:
                continue
            if not names:
                names = row
                _refuse_twins(path, names)
            elif len(row) != len(names):
                yield Record(place, None, f"it has {len(row)} fields, the header has {len(names)}")
            else:
                yield Record(place, dict(zip(names, row, strict=True)))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_twins(path, file.schema_arrow.names)
            numbers = itertools.count(1)
            for batch in file.iter_batches(batch_size=256, use_threads=False):
                for value, fault in _rows(batch):
                    yield Record(f"record {next(numbers)}", value, fault)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the data file {path} is not a whole parquet file: download it again ({reason})") from error


def _rows(batch: Any) -> Iterator[tuple[Any, str | None]]:
    """The rows of a pyarrow batch, each with its fault: one that Python cannot hold does not spoil the others."""
    try:
        rows, fault = batch.to_pylist(), None
    # Bytes that are no UTF-8; a date beyond the year 9999, or with nanoseconds; an unknown time zone.
    except (ValueError, OverflowError, LookupError) as error:
        rows, fault = [None], f"it cannot be read ({' '.join(str(error).split())})"
    if fault is None or batch.num_rows == 1:
        yield from ((row, fault) for row in rows)
    else:  # one after another takes ten times as long
        for row in range(batch.num_rows):
            yield from _rows(batch.slice(row, 1))


def _refuse_twins(path: Path, names: Sequence[str]) -> None:
    twin = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twin is not None:  # a record would hold the last of the two
        raise ValueError(f"the data file {path} has two columns {twin!r}: rename or remove one")


def _open_text(path: Path) -> IO[str]:
    return path.open(encoding="utf-8-sig", newline="")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"the data file {path} is not UTF-8 text ({error.reason}): convert it")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
