"""What TensorBoard gets, written at once: its own writer's thread prints tracebacks of errors."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Scalars:
    """A TensorBoard event file, on disk after every step.

    Args:
        folder: gets the file.
        step: TensorBoard hides what earlier files there hold at or after it.

    Raises:
        OSError: it cannot be written; so do `add` and `close`.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = RecordWriter(open(folder / name, "ab"))
        session = SessionLog(status=SessionLog.START)
        for event in (Event(file_version="brain.Event:2"), Event(step=step, session_log=session)):
            self._write(event)
        self._file.flush()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write a step's values by their tags."""
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        )
        self._write(self._event(step=step, summary=summary))
        self._file.flush()

    def picture(self, step: int, tag: str, png: bytes) -> None:
        """Write a picture of a step."""
        image = self._summary.Image(encoded_image_string=png)
        self._write(
            self._event(step=step, summary=self._summary(value=[{"tag": tag, "image": image}]))
        )
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
