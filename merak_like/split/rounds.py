"""Who meets for an update of shared weights: a seat for each, a wait for the others, one end for all.

seat ──► its step runs ──► give ──► all have given: the update ──► leave ──► all have left: what ends a round
                             └── some are missing for long: they are named; or it goes on without them, from the start
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from merak_like.split.common import Part
from merak_like.split.groups import GroupText, Place, after, expected
from merak_like.split.pooled import mean
from merak_like.split.row import Row


class Seat(NamedTuple):
    """A step that is to go side by side with others."""

    exchange: Any
    told: Mapping[str, Any]
    """What the other ranks are told of it."""
    kind: Any
    """Steps of one kind can."""


class Busy(RuntimeError):
    """Not now: the message says who is waited for. Nothing was changed, and the step can be done again."""


@dataclass
class Meeting:
    """Those who make one update together."""

    who: tuple[str, ...]
    seated: set[str] = field(default_factory=set)
    given: dict[str, Part] = field(default_factory=dict)
    at_cut: dict[int, dict[str, Mapping[str, Tensor]]] = field(default_factory=dict)
    """Gradients at the cut that some bring before those of the weights are there, by micro-batch and member."""
    means: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    lined: dict[str, Seat] = field(default_factory=dict)
    """Steps that are to go side by side, by member."""
    row: Row | None = None
    """Once all are there."""
    here: set[str] = field(default_factory=set)
    """Who waits for the others."""
    left: set[str] = field(default_factory=set)
    applied: bool = False
    over: bool = False
    failed: str = ""
    """Why it came to nothing."""
    since: float = 0.0
    """When somebody began to wait in it."""


class Rounds:
    """One group's meetings, one after the other."""

    def __init__(
        self, name: str, text: GroupText, apply: Callable[[tuple[Part, ...], Place], None],
        end: Callable[[Place, Place], None], note: Callable[..., None], stopping: Callable[[], bool],
        place: Callable[[Place], Place] = lambda at: at,
    ) -> None:  # fmt: skip
        """``apply`` changes the weights; ``end`` is called when all have left, with the places before and after.
        ``place`` may change where the group then is.
        """
        self.name, self.text = name, text
        self.at = Place()
        self.away: set[str] = set()
        self.broken: BaseException | None = None
        """What happened between an update and its round's end: the group goes on from its checkpoint only."""
        self.change = threading.Condition(threading.RLock())
        self.looking = 0
        """Evaluations under way: they end before weights are changed."""
        self._apply, self._end, self._note, self._stopping, self._place = apply, end, note, stopping, place
        self.meeting = self._next()

    def _next(self) -> Meeting:
        return Meeting(expected(self.text, self.at, self.away))

    @contextmanager
    def seat(self, member: str, there: Callable[[], bool] = lambda: True) -> Iterator[Meeting]:
        """Be in a meeting inside; returns when its round has ended. Raises Busy naming who is missing.

        ``there`` says whether the member still is: who waits for its turn and is gone need not.
        """
        with self.change:
            if member in self.away:
                self.away.discard(member)
                self._note("back", group=self.name, member=member)
                if not self.meeting.seated:
                    self.meeting = self._next()
                self.change.notify_all()
            if self.at.pending:
                raise Busy(f"group {self.name} waits for the edges' layers of round {self.at.round}, to average them")
            self.wait(lambda: self._may(member), member, there=there)
            meeting = self.meeting
            meeting.seated.add(member)
        try:
            yield meeting
        except BaseException as error:
            with self.change:
                if meeting.applied:
                    self.broken = self.broken or error
                meeting.given.pop(member, None)
                meeting.seated.discard(member)
                self.change.notify_all()
            raise
        with self.change:
            meeting.left.add(member)
            if meeting.left == set(meeting.who):
                meeting.over = True
                self.move(self._place(after(self.text, self.at, meeting.who)))
            else:
                self.change.wait_for(lambda: meeting.over or self.broken is not None, self.text.wait)
            if self.broken is not None:
                raise Busy(f"group {self.name} is out of step until its host is started again: {self.broken}")

    def move(self, now: Place) -> None:
        """Something has ended, and the group is at the next place."""
        before, self.at = self.at, now
        try:
            self._end(before, now)
        except BaseException as error:
            self.broken = error
            raise
        finally:
            self.meeting = self._next()
            self.change.notify_all()

    def _may(self, member: str) -> bool:
        meeting = self.meeting
        return self.broken is None and member in meeting.who and member not in meeting.seated and not meeting.applied

    def give(self, meeting: Meeting, member: str, part: Part) -> None:
        """Bring a part; returns when the weights are changed. Raises Busy where that cannot be."""
        with self.change:
            self.hold(meeting)
            meeting.given[member] = part
            if set(meeting.given) == set(meeting.who):
                if not self.change.wait_for(lambda: not self.looking, self.text.wait):
                    raise Busy(f"group {self.name} waits for an evaluation to end")
                self.hold(meeting)
                self._apply(tuple(meeting.given[name] for name in meeting.who), self.at)
                meeting.applied = True
                self.change.notify_all()
                return
            try:
                self.wait(lambda: meeting.applied, member, meeting)
            except BaseException:
                if not meeting.applied:
                    meeting.given.pop(member, None)
                raise

    def line_up(
        self, meeting: Meeting, member: str, seat: Seat, make: Callable[[Meeting], Row], there: Callable[[], bool]
    ) -> Row:
        """Come with a step that goes side by side with the others'; returns when ``make`` has made the row of all.

        Raises Busy where somebody stays away, ValueError for steps that cannot go so.
        """
        with self.change:
            self.hold(meeting)
            meeting.lined[member] = seat
            try:
                if set(meeting.lined) == set(meeting.who):
                    meeting.row = make(meeting)
                    self.change.notify_all()
                self.wait(lambda: meeting.row is not None, member, meeting, there)
            except BaseException as error:
                meeting.lined.pop(member, None)
                if isinstance(error, ValueError):
                    self.fail(str(error))
                raise
            assert meeting.row is not None
            return meeting.row

    def pool(
        self, meeting: Meeting, member: str, who: tuple[str, ...], micro_batch: int, values: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The mean of what these members bring for a micro-batch. Raises Busy where somebody stays away."""
        with self.change:
            brought = meeting.at_cut.setdefault(micro_batch, {})
            brought[member] = values
            if set(brought) == set(who) and micro_batch not in meeting.means:
                try:
                    meeting.means[micro_batch] = mean([brought[name] for name in who])
                except ValueError as error:
                    self.fail(str(error))
                    raise
            self.change.notify_all()
            self.wait(lambda: micro_batch in meeting.means, member, meeting)
            return meeting.means[micro_batch]

    def wait(
        self, ready: Callable[[], bool], member: str, meeting: Meeting | None = None,
        there: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """Wait until something is so, or say who is missing."""
        end = time.monotonic() + self.text.wait
        if meeting is not None:
            meeting.here.add(member)
        try:
            self._wait(ready, member, meeting, there, end)
        finally:
            if meeting is not None:
                meeting.here.discard(member)

    def _wait(
        self, ready: Callable[[], bool], member: str, meeting: Meeting | None, there: Callable[[], bool], end: float
    ) -> None:  # fmt: skip
        while not ready():
            now = self.meeting if meeting is None else meeting
            self.hold(now)
            if not there():
                raise Busy(f"{member} is gone")
            now.since = now.since or time.monotonic()
            late = [n for n in now.who if n not in now.given and n not in now.here and n != member]
            passed = time.monotonic() - now.since > self.text.wait
            if passed and self.text.lost == "skip" and late and now is self.meeting and not now.applied:
                self._without(late)
                continue
            if time.monotonic() > end and self.text.lost == "wait":
                raise Busy(
                    f"group {self.name} waits for {', '.join(late) or 'its round to end'} (update {self.at.updates}, "
                    f"after {self.text.wait:.0f} s)"
                )
            self.change.wait(min(0.5, self.text.wait))

    def hold(self, meeting: Meeting) -> None:
        """Raises Busy where a meeting is no more."""
        if self.broken is not None:
            raise Busy(f"group {self.name} is out of step until its host is started again: {self.broken}")
        if meeting.failed:
            raise Busy(meeting.failed)
        if self._stopping() and not meeting.applied:
            raise Busy("the host is about to stop")

    @contextmanager
    def look(self) -> Iterator[None]:
        """The weights stay as they are inside."""
        with self.change:
            self.looking += 1
        try:
            yield
        finally:
            with self.change:
                self.looking -= 1
                self.change.notify_all()

    def _without(self, late: list[str]) -> None:
        self.away |= set(late)
        self._note("skipped", group=self.name, members=late, update=self.at.updates)
        self.fail(f"group {self.name} goes on without {', '.join(late)}: do this step again")

    def fail(self, why: str) -> None:
        """Begin the present update anew; who is in it is told why."""
        with self.change:
            self.meeting.failed = why
            self.meeting = self._next()
            self.change.notify_all()

    def go_to(self, at: Place) -> None:
        """Be at another place."""
        with self.change:
            self.at, self.broken = at, None
            self.fail(f"group {self.name} went back to update {at.updates}")
