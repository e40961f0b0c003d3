"""A run's folders on disk: what is left when their publishing or removal is cut short."""

import logging
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from accessory.files import write_json
from accessory.train.shelf import Shelf


class KilledError(BaseException):
    """Stands for a kill -9: nothing is tidied up."""


def put(shelf: Shelf, name: str, *, keep_last: int | None = None) -> Path:
    aside, final = shelf.aside(name)
    (aside / "data").write_text(name)
    write_json(aside / Shelf.INDEX, {"files": {"data": len(name)}})
    shelf.publish(aside, final, keep_last=keep_last)
    return final


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("removed", [0, 1])
def test_a_removal_that_is_cut_short_is_taken_up_again(
    removed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, removals = Shelf(tmp_path), 0

    def cut_short(path: Path, **settings: Any) -> None:
        nonlocal removals
        removals += 1
        if removals > removed:
            (path / "data").unlink()  # its index is still there
            raise KilledError

    first, second = put(shelf, "step-1"), put(shelf, "step-2")
    with mock.patch.object(shutil, "rmtree", cut_short), pytest.raises(KilledError):
        put(shelf, "step-3", keep_last=1)
    assert not first.exists()
    assert not second.exists()
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    with caplog.at_level(logging.WARNING, "accessory"):
        assert shelf.latest() == tmp_path / "step-3"
    assert "was cut short, or its removal" in caplog.text
    put(shelf, "step-4", keep_last=2)
    assert names(tmp_path) == ["latest", "step-3", "step-4"]


def test_a_kill_before_latest_moves_leaves_the_state_before(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    first = put(shelf, "step-1")
    with mock.patch("accessory.train.shelf.replacing", side_effect=KilledError), pytest.raises(KilledError):
        put(shelf, "step-2")
    assert shelf.latest() == first
    # The same steps are taken again.
    assert put(shelf, "step-2") == tmp_path / "step-2.1"
    assert shelf.latest() == tmp_path / "step-2.1"


def test_what_begins_is_begun_until_something_is_published(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert not shelf.is_begun
    shelf.begin()
    shelf.begin()
    assert shelf.is_begun
    assert shelf.latest() is None
    with mock.patch("accessory.train.shelf.replacing", side_effect=KilledError), pytest.raises(KilledError):
        put(shelf, "step-1")
    assert shelf.is_begun
    put(shelf, "step-2")
    assert not shelf.is_begun
    assert names(tmp_path) == ["latest", "step-1", "step-2"]
