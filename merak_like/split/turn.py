"""One device, many sessions: whose turn it is to compute, first come first served.

A session holds the turn while it computes and gives it up while it waits for its edge. torch's random state is the
process's, so each takes its own along when it gives up the turn and brings it back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from merak_like.runtime import rng


class Turn:
    """A fair lock that can be given up for a while."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited: deque[float] = deque(maxlen=10_000)
        """Seconds of the last waits for a turn."""
        self.turns, self.seconds = 0, 0.0
        """All turns there were, and the seconds that they were waited for."""
        self._mine = threading.local()
        self._line: deque[object] = deque()
        self._change = threading.Condition()

    @property
    def queued(self) -> float:
        """Seconds that this thread has waited for its turns, in all."""
        return getattr(self._mine, "seconds", 0.0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Compute inside."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let others compute inside; only where the turn is held."""
        mine = rng.state(self.device)
        self._leave()
        try:
            yield
        finally:
            self._enter()
            rng.resume(mine, self.device)

    def _enter(self) -> None:
        me, began = object(), time.monotonic()
        with self._change:
            self._line.append(me)
            self._change.wait_for(lambda: self._line[0] is me)
            took = time.monotonic() - began
            self.turns, self.seconds = self.turns + 1, self.seconds + took
        self.waited.append(took)
        self._mine.seconds = self.queued + took

    def _leave(self) -> None:
        with self._change:
            self._line.popleft()
            self._change.notify_all()
