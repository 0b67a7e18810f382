"""Good manners: a polite request to end is noted, and acted upon by all ranks together; a thread lets others pass."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any


class Signals:
    """Counts the signals that this process was sent, instead of dying of them."""

    def __init__(self) -> None:
        self.seen = 0
        self._before: dict[int, Any] = {}

    def listen(self, *signals: int) -> None:
        """Count these from now on; in the main thread only."""
        for number in signals:
            before = signal.signal(number, self._note)
            other = getattr(before, "__self__", None)
            if isinstance(other, Signals):  # which may end before this one does: go back to what was before both
                before = other._before.get(number, signal.SIG_DFL)
            self._before.setdefault(number, before)

    def _note(self, number: int, frame: Any) -> None:
        self.seen += 1

    def close(self) -> None:
        """Leave signals to whoever had them."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they kill."""


def polite(signals: Signals | None = None) -> Signals:
    """Listens to those from now on, in the main thread; in another one to none, since Python has them there only."""
    signals = signals or Signals()
    if threading.current_thread() is threading.main_thread():
        signals.listen(*SIGNALS)
    return signals


LATER = 10
"""Of 19 steps down in the scheduler's priority."""


def give_way() -> None:
    """Let other threads have the processor before this one, to its end: writing shall not slow training down.

    On Linux, where a thread has a priority of its own; elsewhere nothing.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # one that has still less than that may not get more
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LATER)
