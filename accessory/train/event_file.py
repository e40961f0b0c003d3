"""What TensorBoard reads: an event file, to which a run adds its numbers and pictures."""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from accessory.train.appended_file import AppendedFile


class EventFile:
    """A new event file, in whose folder those of the run's earlier starts may lie.

    torch.utils.tensorboard's writer does the same in a thread of its own, one event for each number; on a full disk
    that thread dies with a traceback, and nothing is written any more.

    Args:
        first_step: steps taken before; readers drop what earlier files hold of later ones.
    """

    patient = True

    def __init__(self, folder: Path, *, first_step: int) -> None:
        # Readers look for "tfevents" and take a folder's files in the order of their names.
        file = AppendedFile(folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}")
        self._records = RecordWriter(file)
        self._put(Event(file_version="brain.Event:2"))
        self._put(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of a step, by tag.

        Raises:
            OSError: the file takes no more; what was added still waits.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._put(Event(step=step, summary=Summary(value=values)))
        self._records.flush()

    def add_picture(self, step: int, tag: str, png: bytes) -> None:
        """A PNG as it is; raises as `add`."""
        # After the signature and the head of the first chunk a PNG has its width and height.
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._put(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)])))
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
