"""Ctrl-C and SIGTERM as an exception, raised only where the run's state is complete."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARENT_POLL_S = 1.0


class Interrupted(Exception):
    """The process was asked to stop; `exit_code` is the shell's 128 + signal number."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.exit_code = 128 + signum
        self.saved = ""
        """What was saved, and how to go on from it."""

    def __str__(self) -> str:
        name = f"stopped by {signal.Signals(self.args[0]).name}"
        return f"{name}: {self.saved}" if self.saved else name


class StopSignal:
    """While it is open, a signal is only recorded; `check` raises it as Interrupted.

    torchrun passes Ctrl-C on as SIGINT and SIGTERM, so only the first signal counts. A process
    whose torchrun is gone stops as with SIGTERM: nothing else would ever end it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._signum: int | None = None
        self._raises = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._mark) for s in self.SIGNALS}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self._watch, args=[os.getppid()], daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @property
    def signum(self) -> int:
        """The first signal received; 0: none."""
        return self._signum or 0

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal raises Interrupted wherever it comes: in a wait, before there is any state."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def _watch(self, parent: int) -> None:
        """Wait until another process is this one's parent: its own has ended."""
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        self._mark(signal.SIGTERM, None)

    def _mark(self, signum: int, _frame) -> None:
        self._signum = self._signum or signum
        if self._raises:
            self.check()
