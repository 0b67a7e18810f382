"""Every wait of a rank: what for, on whom, for how long. No wait is endless and none is nameless."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from merak_like.runtime.pulse import GAVE_UP, INTERVAL, PATIENCE, Pulse

ACTION = "look at that rank's output and machine, then start the job again from its last checkpoint"


class PeerError(RuntimeError):
    """Another rank died, hung or said something else than expected; the message names it and the action."""


class Watch:
    """Waits with a limit, and says what it waits for when a wait gets long."""

    def __init__(
        self, rank: int, limit: timedelta, pulse: Pulse | None = None, *, report: Callable[[str], None] | None = None
    ) -> None:
        self.rank = rank
        self.limit = limit
        self.report_after = min(30.0, limit.total_seconds() / 2)
        self._report = report or (lambda line: print(line, file=sys.stderr, flush=True))
        self._pulse = pulse
        self.waited = 0.0
        """Seconds spent waiting in all."""
        self.now: tuple[tuple[object, ...], float] | None = None
        """What is waited for, in words, and since when."""
        self._noted = False
        self._blame: str | None = None
        self._looked = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="merak-watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that the interpreter's end catches inside the store's C++ aborts it

    def wait(self, work: Any, *what: object) -> None:
        """Wait for one transfer or collective; ``what`` are words, and things that are put into words if need be.

        Raises PeerError, naming this rank, the peer and the action, when the peer is gone or the limit has passed.
        """
        with Waiting(self, what):
            if (work.wait() if work_is_queued(work) else work.wait(self.limit)) is False:
                raise RuntimeError(f"timed out after {self.limit.total_seconds():.0f} s")

    def waiting(self, *what: object) -> Waiting:
        """Mark a wait, so that the watch can tell of it. What fails inside is a PeerError."""
        return Waiting(self, what)

    def failed(self, what: Iterable[object], error: RuntimeError) -> PeerError:
        """What a wait ends with, once it is known who is to blame."""
        why = self._who() or _reason(error)
        return PeerError(f"rank {self.rank} gave up waiting for {_words(what)}: {why}; {ACTION}")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Let the other ranks know what this one failed with."""
        if self._noted:
            self._note("")
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            self._note(f"{type(error).__name__}: {error}".splitlines()[0][:300])
            raise

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Around the building of an engine: without one there is nothing to watch."""
        try:
            with self.telling():
                yield
        except BaseException:
            self.close()
            raise

    def _note(self, why: str) -> None:
        self._noted = bool(why)
        if self._pulse is not None:
            with suppress(RuntimeError):  # the store goes with its host
                self._pulse.note(why)

    def _who(self) -> str:
        """Who is to blame, found by the watch's thread on every rank at the same time; empty if nobody knows."""
        if self._pulse is None:
            return ""
        with suppress(RuntimeError):
            self._pulse.alarm()
            self._pulse.note(GAVE_UP)
        self._looked.wait(PATIENCE + 4 * INTERVAL)
        return self._blame or ""

    def _look(self) -> None:
        told: tuple[tuple[object, ...], float] | None = None
        while not self._closed.wait(min(INTERVAL, self.report_after / 4)):
            self._feel()
            now = self.now
            if now is None or now is told or time.monotonic() - now[1] < self.report_after:
                continue
            told = now
            self._report(
                f"[merak] rank {self.rank} has been waiting {time.monotonic() - now[1]:.0f} s for {_words(now[0])}; "
                f"it will give up after {self.limit.total_seconds():.0f} s"
            )

    def _feel(self) -> None:
        """Give a sign of life, and find out whose is missing when a rank has lost another."""
        if self._pulse is None or self._looked.is_set():
            return
        try:
            self._pulse.beat()
            if self._pulse.alarmed():
                self._blame = self._pulse.look()
                self._linger()
                self._looked.set()
        except RuntimeError:
            self._blame = self._blame or "the job's store is gone, and rank 0 or its agent with it"
            self._looked.set()

    def _linger(self) -> None:
        """The host of the store leaves last: the others still read there."""
        if self.rank == 0:
            time.sleep(2 * INTERVAL)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed.is_set()

    def close(self) -> None:
        """Stop watching."""
        atexit.unregister(self.close)
        self._closed.set()
        self._thread.join(timeout=5)


class Waiting:
    """One wait. A class and no generator: there are several for each micro-batch."""

    __slots__ = ("_began", "_watch", "_what")

    def __init__(self, watch: Watch, what: tuple[object, ...]) -> None:
        self._watch, self._what = watch, what

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._watch.now = self._what, self._began

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        watch = self._watch
        try:
            if isinstance(error, RuntimeError):
                raise watch.failed(self._what, error) from None
        finally:
            watch.now = None
            watch.waited += time.monotonic() - self._began


def _words(what: Iterable[object]) -> str:
    return " ".join(map(str, what))


def work_is_queued(work: Any) -> bool:
    """Whether waiting only orders a device's stream (NCCL), whose own watchdog limits it."""
    return "NCCL" in type(work).__name__.upper()


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if any(words in text.lower() for words in ("closed by peer", "connection reset", "broken pipe")):
        return f"the peer is gone ({text[-120:]})"
    if any(words in text.lower() for words in ("timed out", "timeout")):
        return f"nothing came in time ({text[-120:]})"
    return text[-200:]
