"""Steps of several sessions at once on a host of several ranks: side by side, an action of each in turn.

    ann  F0.0      F0.1      SEND F0.1      ...      every step is a thread, and one of them is at work at a time;
    bob      F0.0      F0.1          SEND F0.1       on every rank they take turns in the same order

So what one rank sends next is what the other expects next, as it is with one step alone, and no step waits for an edge
whose answer hangs on another step of the row.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from merak_like.partitioner.schedules.action import Action
from merak_like.runtime.recording import Do
from merak_like.runtime.watch import PeerError


class Row:
    """On one rank, the steps that go side by side."""

    def __init__(self, count: int, breaks: Callable[[BaseException], bool], limit: float) -> None:
        """``breaks`` says of an error whether the ranks are out of step with it: then no other step goes on.

        ``limit`` in seconds is for one action; whatever an action waits for has a limit of its own, which is less.
        """
        self._line, self._breaks, self._limit = deque(range(count)), breaks, limit
        self._open = False
        self._broken: BaseException | None = None
        self._change = threading.Condition()

    def begin(self) -> None:
        """From now on there are turns."""
        with self._change:
            self._open = True
            self._change.notify_all()

    def fail(self, error: BaseException) -> None:
        """No step of the row goes on."""
        with self._change:
            self._broken = self._broken or error
            self._change.notify_all()

    @contextmanager
    def at(self, place: int, engine: Any) -> Iterator[None]:
        """The step at this place in the row is inside; after each of its engine's actions the others have a turn."""
        try:
            self._await(place)
            with engine.doing(partial(self._around, place)):
                yield
        except BaseException as error:
            if self._breaks(error):
                self.fail(error)
            raise
        finally:
            with self._change:
                self._line.remove(place)
                self._change.notify_all()

    def over(self) -> None:
        """Wait until no step is inside. Raises PeerError where one does not end."""
        with self._change:
            self._until(lambda: not self._line, "the row's end")

    def _around(self, place: int, do: Do) -> Do:
        def followed(one: Callable[[Action], object]) -> Callable[[Action], object]:
            def done(action: Action) -> object:
                made = one(action)
                with self._change:
                    self._line.rotate(-1)
                    self._change.notify_all()
                self._await(place)
                return made

            return done

        return {kind: followed(one) for kind, one in do.items()}

    def _await(self, place: int) -> None:
        with self._change:
            self._until(
                lambda: self._broken is not None or (self._open and self._line[0] == place), f"the turn of step {place}"
            )
            if self._broken is not None:
                raise PeerError(f"a step beside this one broke the row: {self._broken}") from self._broken

    def _until(self, so: Callable[[], bool], what: str) -> None:
        """Wait as long as something happens."""
        while not so():
            if not self._change.wait(self._limit):
                first = f"step {self._line[0]} is in one action" if self._open else "the row was not begun"
                raise PeerError(f"{what} did not come: {first} for {self._limit:.0f} s")
