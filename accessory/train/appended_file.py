"""A file that grows while a run goes on, and whose disk may be full for a while."""

from io import FileIO
from pathlib import Path


class AppendedFile:
    """Appends without losing or tearing anything: what could not be written waits, and goes first the next time.

    It is a raw binary file for `write` and `flush`; nothing is opened before the first flush.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = bytearray()
        self._file: FileIO | None = None

    def write(self, data: bytes) -> None:
        """Put data in line for the next flush."""
        self._waiting += data

    def flush(self) -> None:
        """Hand everything that waits to the system.

        Raises:
            OSError: the file cannot be opened or takes no more; what it did not take still waits.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self.path, "a")
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def close(self) -> None:
        """Close the file; what still waits is lost."""
        if self._file is not None:
            self._file.close()
