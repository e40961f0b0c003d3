"""The records of a data file, one by one: .json (a list), .jsonl, .csv (comma or tab) and .parquet.

A folder that datasets' save_to_disk wrote is read as such a file is; of one with splits the split train.

No file is held in memory as a whole. A record that cannot be read is handed on with its fault, so that the
caller decides whether it ends the run; a file after whose fault nothing can be read raises.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.data.json_list import json_list

_LFS_POINTER = b"version https://git-lfs"
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # which make a folder one of datasets
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow file that was written to its end
_ROWS = 256  # of a table that are held in memory


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `place` says where it stands ("line 3"), `value` is what was read unless `fault` says why not."""

    place: str
    value: Any
    fault: str | None = None


def check_data_file(path: Path) -> None:
    """Raise ValueError for a source that cannot be one, without reading it whole; FileNotFoundError if absent."""
    files = data_files(path)
    if path.is_file() and path.suffix.lower() not in READERS:
        raise ValueError(f"the data file {path} is of an unknown kind: take one of {', '.join(READERS)}")
    for file in files:
        _check_bytes(file, end=_STREAM_END if path.is_dir() else b"")
    if (path.is_dir() or path.suffix.lower() == ".parquet") and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"reading {path} needs pyarrow: pip install 'accessory[parquet]'")


def data_files(path: Path) -> list[Path]:
    """The files that the source `path` consists of, in the order of their records: itself, or a saved folder's.

    Raises ValueError for a folder that datasets did not save, and FileNotFoundError where a file is absent.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"no data file {path}: check the path")
    if not path.is_dir():
        raise ValueError(f"the data file {path} is a pipe or a device: write the data to a file")
    if (path / _SPLITS).is_file():
        splits = _listed(path / _SPLITS, "splits")
        if "train" not in splits and len(splits) != 1:
            found = ", ".join(splits) or "none"
            raise ValueError(f"the data folder {path} has no split train, but {found}: name the folder of a split")
        path = path / ("train" if "train" in splits else splits[0])
    state = path / _STATE
    if not state.is_file():
        raise ValueError(f"the data file {path} is a folder: name the file in it, or a folder that datasets saved")
    if _listed(state, "_indices_files") or _listed(state, "_indices_data_files"):
        raise ValueError(f"{state} lists _indices_files, of an old datasets: load it with datasets and save it anew")
    # Without their folders, which may have been absolute where they were written.
    files = [path / Path(name).name for name in _listed(state, "_data_files")]
    if not files:
        raise ValueError(f"the data folder {path} is empty: {_STATE} lists no data files")
    absent = next((file for file in files if not file.is_file()), None)
    if absent is not None:
        raise FileNotFoundError(f"{state} lists {absent.name}, which is absent: copy the folder again")
    return files


def read_records(path: Path) -> Iterator[Record]:
    """The records of the file, whose suffix says its kind. ValueError where the file itself is malformed."""
    check_data_file(path)
    return _read_saved(path) if path.is_dir() else READERS[path.suffix.lower()](path)


def _check_bytes(file: Path, *, end: bytes) -> None:
    with file.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
        stream.seek(max(0, file.stat().st_size - len(end)))
        whole = stream.read(len(end)) == end
    if not head:
        raise ValueError(f"the data file {file} is empty: copy or download it again")
    if head == _LFS_POINTER:
        raise ValueError(f"the data file {file} is a Git LFS pointer: run `git lfs pull` in its folder")
    if not whole:  # pyarrow would take a file that ends between two batches for whole
        raise ValueError(f"the data file {file} is cut off: copy its folder again")


def _listed(file: Path, name: str) -> list[str]:
    """The names of splits or files under `name` in a .json file of a saved folder; empty where there are none."""
    try:
        content = json.loads(file.read_bytes())
        return [str(entry["filename"] if isinstance(entry, dict) else entry) for entry in content.get(name) or []]
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"{file} is not what datasets writes: copy the folder again") from error


def _read_json(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
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
                yield Record(
                    place, None, f"it is not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
                )
            except (ValueError, RecursionError) as error:  # a number too long for Python, or too deep a nesting
                yield Record(place, None, f"its JSON cannot be read ({error})")


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's own limit is 128 KiB, less than long answers
    with path.open(encoding="utf-8-sig", newline="") as file:
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
                if len(names) == 1 and ";" in names[0]:
                    raise ValueError(f"{path}, {place}: its columns lie between semicolons: write commas or tabs")
            elif len(row) != len(names):
                yield Record(place, None, f"it has {len(row)} fields, the header has {len(names)}")
            else:
                yield Record(place, dict(zip(names, row, strict=True)))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    with _explained(path, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
        _refuse_twins(path, file.schema_arrow.names)
        numbers = itertools.count(1)
        for batch in file.iter_batches(batch_size=_ROWS, use_threads=False):
            for value, fault in _rows(batch):
                yield Record(f"record {next(numbers)}", value, fault)


def _read_saved(folder: Path) -> Iterator[Record]:
    import pyarrow.ipc

    numbers = itertools.count(1)
    for path in data_files(folder):
        with _explained(path, "Arrow"), pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            _refuse_twins(path, stream.schema.names)
            for batch in stream:
                for begin in range(0, batch.num_rows, _ROWS):  # datasets writes 1000 and more together
                    for value, fault in _rows(batch.slice(begin, _ROWS)):
                        yield Record(f"record {next(numbers)}", value, fault)


@contextlib.contextmanager
def _explained(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the data file {path} is not a whole {kind} file: download it again ({reason})") from error


def _rows(batch: Any) -> Iterator[tuple[Any, str | None]]:
    """The rows of a pyarrow batch, each with its fault: one that Python cannot hold does not spoil the others."""
    try:
        rows, fault = batch.to_pylist(), None
        if "arrow.json" in str(batch.schema.types):
            rows = [{field.name: _decoded(row[field.name], field.type) for field in batch.schema} for row in rows]
    # Bytes that are no UTF-8; a date beyond the year 9999, or with nanoseconds; an unknown time zone.
    except (ValueError, OverflowError, LookupError) as error:
        rows, fault = [None], f"it cannot be read ({' '.join(str(error).split())})"
    if fault is None or batch.num_rows == 1:
        yield from ((row, fault) for row in rows)
    else:  # one after another takes ten times as long
        for row in range(batch.num_rows):
            yield from _rows(batch.slice(row, 1))


def _decoded(value: Any, kind: Any) -> Any:
    """A value of the pyarrow type `kind`, and what datasets wrote in it as JSON, since its types differ by record."""
    if getattr(kind, "extension_name", None) == "arrow.json":
        return value if value is None else json.loads(value)
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_decoded(element, kind.value_type) for element in value]
    if isinstance(value, dict):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    return value


def _refuse_twins(path: Path, names: Sequence[str]) -> None:
    twin = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twin is not None:  # a record would hold the last of the two
        raise ValueError(f"the data file {path} has two columns {twin!r}: rename or remove one")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"the data file {path} is not UTF-8 text ({error.reason}): convert it")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
