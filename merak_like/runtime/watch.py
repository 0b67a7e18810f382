"""Every wait of a rank: what for, on whom, for how long. No wait is endless and none is nameless."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any


class PeerError(RuntimeError):
    """Another rank died, hung or said something else than expected; the message names it and the action."""


class Watch:
    """Waits with a limit, and says what it waits for when a wait gets long."""

    def __init__(self, rank: int, limit: timedelta, *, report: Callable[[str], None] | None = None) -> None:
        self.rank = rank
        self.limit = limit
        self.report_after = min(30.0, limit.total_seconds() / 2)
        self._report = report or (lambda line: print(line, file=sys.stderr, flush=True))
        self._now: tuple[str, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="merak-watch", daemon=True)
        self._thread.start()

    def wait(self, work: Any, what: str, peer: str) -> None:
        """Wait for one transfer or collective.

        Raises PeerError, naming this rank, the peer and the action, when the peer is gone or the limit has passed.
        """
        with self.waiting(f"{what} {peer}"):
            try:
                done = work.wait() if work_is_queued(work) else work.wait(self.limit)
            except RuntimeError as error:
                raise PeerError(f"rank {self.rank} gave up waiting for {what} {peer}: {_reason(error)}") from error
        if done is False:
            raise PeerError(f"rank {self.rank} gave up waiting for {what} {peer}: nothing for {self.limit}")

    @contextmanager
    def waiting(self, what: str) -> Any:
        """Mark a wait, so that the watch can tell of it."""
        self._now = (what, time.monotonic())
        try:
            yield
        finally:
            self._now = None

    def _look(self) -> None:
        told: tuple[str, float] | None = None
        while not self._closed.wait(min(1.0, self.report_after / 4)):
            now = self._now
            if now is None or now is told or time.monotonic() - now[1] < self.report_after:
                continue
            told = now
            self._report(
                f"[merak] rank {self.rank} has been waiting {time.monotonic() - now[1]:.0f} s for {now[0]}; it will "
                f"give up after {self.limit.total_seconds():.0f} s"
            )

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed.is_set()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join(timeout=5)


def work_is_queued(work: Any) -> bool:
    """Whether waiting only orders a device's stream (NCCL), whose own watchdog limits it."""
    return "NCCL" in type(work).__name__.upper()


def _reason(error: Exception) -> str:
    text = str(error)
    if "closed by peer" in text.lower() or "connection reset" in text.lower() or "broken pipe" in text.lower():
        return f"the peer is gone ({text.splitlines()[0][-120:]})"
    if "timed out" in text.lower() or "timeout" in text.lower():
        return f"nothing came in time ({text.splitlines()[0][-120:]})"
    return text.splitlines()[0][-200:] if text else type(error).__name__
