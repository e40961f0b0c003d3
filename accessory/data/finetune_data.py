"""Tokenised examples in memory-mapped files, as cache.py writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accessory.data.tokenise import SourceReport

INDEX_NAME = "meta.json"


class FinetuneData:
    """The examples of a cache folder, or the `chosen` of them: `data[i]` is (tokens, labels), two arrays of one length.

    The arrays are views of the files (uint16 or int32), so the processes of a host share one copy in memory,
    and an example costs nothing until it is looked at. A label is 0 where the token is not learned. Attributes:
    `lengths`, the tokens of each example; `digests`, of the record that each is of (records.py); `reports`, what
    became of each source's records; `prompt_form`, what meta.json says of the form that they have, None where all is
    raw text.

    Raises ValueError for a folder that is not whole.
    """

    def __init__(self, folder: str | Path, chosen: NDArray[np.int64] | None = None) -> None:
        self.folder, self._chosen = Path(folder), chosen
        meta = _read_meta(self.folder)
        if meta is None:
            raise ValueError(f"{folder} is not a whole data cache: delete it, and it is made again")
        self.reports = [SourceReport(**report) for report in meta["reports"]]
        self.prompt_form = _prompt_form(self.reports)
        offsets: NDArray[np.int64] = np.fromfile(self.folder / "offsets.bin", dtype="<i8")
        self._tokens = np.memmap(self.folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        self._labels = np.memmap(self.folder / "labels.bin", dtype=meta["dtype"], mode="r")
        digests: NDArray[np.uint64] = np.fromfile(self.folder / "digests.bin", dtype="<u8")
        self._rows = np.arange(len(digests)) if chosen is None else chosen
        self._begins = offsets[self._rows]
        self.lengths: NDArray[np.int64] = offsets[self._rows + 1] - self._begins
        self.digests = digests[self._rows]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index = int(index) % len(self)
        span = slice(self._begins[index], self._begins[index] + self.lengths[index])
        return self._tokens[span], self._labels[span]

    def __reduce__(self) -> tuple[type[FinetuneData], tuple[Path, NDArray[np.int64] | None]]:
        return FinetuneData, (self.folder.absolute(), self._chosen)  # a pickled memmap would carry all of its data

    def __repr__(self) -> str:
        return f"FinetuneData({str(self.folder)!r}, examples={len(self)})"

    def held_back(self, ratio: float) -> tuple[FinetuneData, FinetuneData]:
        """The examples to learn from, and the share `ratio` of the records (0 to 1) that is held back.

        A record's digest alone decides, so that it is the same in every run, order and split, and equal records are
        on one side. Either part may be empty.
        """
        back = self.digests < np.uint64(min(int(ratio * 2.0**64), 2**64 - 1))
        return FinetuneData(self.folder, self._rows[~back]), FinetuneData(self.folder, self._rows[back])

    def digests_in(self, other: FinetuneData) -> NDArray[np.int64]:
        """The examples whose record is one of the other's too."""
        return np.flatnonzero(np.isin(self.digests, other.digests))

    def place(self, index: int) -> str:
        """Where an example is from: "example 3 of data.json", counted from 1 among those of its file."""
        row = int(self._rows[index])
        for report in self.reports:
            if row < report.examples:
                return f"example {row + 1} of {report.path}"
            row -= report.examples
        raise AssertionError("the reports count all examples")


def _prompt_form(reports: Sequence[SourceReport]) -> dict[str, Any] | None:
    forms = [form for report in reports for form in report.forms]
    if not forms or "prompt_types" not in forms[0]:
        return forms[0] if forms else None
    types = dict.fromkeys(name for form in forms for name in form["prompt_types"])
    return {**forms[0], "prompt_types": sorted(types, key=lambda name: name != "alpaca")}


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a whole cache. One that was cut off by a crash does not."""
    return _read_meta(folder) is not None


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of meta.json, if the files beside it have the sizes that it tells."""
    try:
        meta = json.loads((folder / INDEX_NAME).read_bytes())
        width = np.dtype(meta["dtype"]).itemsize
        expected = {
            "tokens.bin": width * meta["tokens"],
            "labels.bin": width * meta["tokens"],
            "offsets.bin": 8 * (meta["examples"] + 1),
            "digests.bin": 8 * meta["examples"],
        }
        whole = all((folder / name).stat().st_size == size for name, size in expected.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if whole else None
