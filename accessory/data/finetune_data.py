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
    """The examples of a cache folder: `data[i]` is (tokens, labels), two arrays of equal length.

    The arrays are views of the files (uint16 or int32), so the processes of a host share one copy in memory,
    and an example costs nothing until it is looked at. A label is 0 where the token is not learned. Attributes:
    `lengths`, the tokens of each example; `reports`, what became of each source's records; `prompt_form`, what
    meta.json says of the form that they have, None where all is raw text.

    Raises ValueError for a folder that is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise ValueError(f"{folder} is not a whole data cache: delete it, and it is made again")
        self.reports = [SourceReport(**report) for report in meta["reports"]]
        self.prompt_form = _prompt_form(self.reports)
        self._offsets: NDArray[np.int64] = np.fromfile(self.folder / "offsets.bin", dtype="<i8")
        self._tokens = np.memmap(self.folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        self._labels = np.memmap(self.folder / "labels.bin", dtype=meta["dtype"], mode="r")
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index = int(index) % len(self)
        span = slice(self._offsets[index], self._offsets[index + 1])
        return self._tokens[span], self._labels[span]

    def __reduce__(self) -> tuple[type[FinetuneData], tuple[Path]]:
        return FinetuneData, (self.folder.absolute(),)  # a pickled memmap would carry all of its data

    def __repr__(self) -> str:
        return f"FinetuneData({str(self.folder)!r}, examples={len(self)})"


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
        }
        whole = all((folder / name).stat().st_size == size for name, size in expected.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if whole else None
