"""What an engine measured: when each action of a step ran and how much of it was waiting. A JSON file beside its plan.

    rank 1  ..wwww[  F0.1  ].[ SEND ]wwww[    B0.1    ]......aaaaaa|
            .  other    w  waited    [ ]  at work      a  after the pipeline: reduction, norm, optimizer
            0               start..end of each record                tail

Seconds count from the beginning of the step, on a clock of each rank's own that was set there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, cast

from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.partitioner.simulator import Entry, Timeline

VERSION = 1
"""Version of the JSON; a profile of another version is refused."""
SLACK = 1e-6
"""Seconds by which one record may begin before the last has ended: clocks of devices tick in half microseconds."""


class Record(NamedTuple):
    """One action from ``start`` to ``end``, the first ``waited`` of which it was blocked on another rank.

    A transfer's record is the call that starts it; what it carries may travel on.
    """

    action: Action
    start: float
    end: float
    waited: float


@dataclass(frozen=True)
class Shares:
    """Where the seconds of a rank's step went. They sum up to its tail."""

    forward: float
    recompute: float
    """In R; a B that recomputes is backward as a whole."""
    backward: float
    weight: float
    transfer: float
    """In the calls that start transfers."""
    wait: float
    """Blocked on another rank."""
    other: float
    """Between two records, and before the first."""
    after: float
    """From the last record to the end of the step: reduction, norm, optimizer."""

    @property
    def computing(self) -> float:
        """Forward, recompute, backward and weight."""
        return self.forward + self.recompute + self.backward + self.weight


@dataclass(frozen=True)
class Step:
    """One step: records[rank] in program order, tails[rank] where the rank's step ended. To be drawn as a Timeline."""

    records: tuple[tuple[Record, ...], ...]
    tails: tuple[float, ...]

    @classmethod
    def planned(cls, timeline: Timeline) -> Step:
        """A simulated step as if it had been measured: a rank that idles before a computation waits for its input.

        Transfers leave no record, since the simulator's take none of a rank's time.
        """
        ranks: list[tuple[Record, ...]] = []
        for entries in timeline.entries:
            now, records = 0.0, list[Record]()
            for action, start, end in entries:
                if action.peer < 0:
                    records.append(Record(action, now, end, start - now))
                    now = end
            ranks.append(tuple(records))
        return cls(tuple(ranks), tuple(max((r.end for r in records), default=0.0) for records in ranks))

    def only(self, ranks: Sequence[int]) -> Step:
        """The step of some ranks, in that order."""
        return Step(tuple(self.records[rank] for rank in ranks), tuple(self.tails[rank] for rank in ranks))

    @property
    def entries(self) -> tuple[tuple[Entry, ...], ...]:
        """When each action of each rank was at work, its wait left out."""
        return tuple(
            tuple(Entry(r.action, min(r.start + r.waited, r.end), r.end) for r in records) for records in self.records
        )

    @property
    def makespan(self) -> float:
        """Seconds until the last record of any rank has ended; reduction and optimizer come after it."""
        return max((record.end for record in chain(*self.records)), default=0.0)

    @property
    def seconds(self) -> float:
        """Seconds until the last rank's step has ended."""
        return max(self.tails, default=0.0)

    @property
    def rank_bubble(self) -> tuple[float, ...]:
        """Fraction of the makespan that each rank computes nothing."""
        makespan = self.makespan or 1.0
        return tuple(1 - each.computing / makespan for each in shares(self))

    @property
    def bubble(self) -> float:
        """The mean of that over ranks."""
        return sum(self.rank_bubble) / len(self.rank_bubble) if self.rank_bubble else 0.0


@dataclass(frozen=True)
class Recorded:
    """Measured steps: steps[step][rank] are a rank's records in program order, tails[step][rank] where its step ended.

    Ranks are those of the job, in the mesh's order. ``plan`` is the digest of the plan they carried out.
    """

    plan: str
    steps: tuple[tuple[tuple[Record, ...], ...], ...]
    tails: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        """Raises ValueError where ranks are missing or times run backwards."""
        shapes = [len(step) for step in self.steps]
        if not shapes or not shapes[0] or {*shapes} != {shapes[0]} or shapes != [len(tails) for tails in self.tails]:
            raise ValueError(
                f"a profile needs a step, and the same ranks in each: got steps of {shapes} ranks "
                f"and tails of {[len(tails) for tails in self.tails]}"
            )
        for at, (step, tails) in enumerate(zip(self.steps, self.tails, strict=True)):
            for rank, (records, tail) in enumerate(zip(step, tails, strict=True)):
                _check(records, tail, f"step {at}, rank {rank}")

    def step(self, index: int) -> Step:
        """One of the steps."""
        return Step(self.steps[index], self.tails[index])

    @property
    def median(self) -> int:
        """The step whose makespan is the middle one; of an even number, the faster of both."""
        order = sorted(range(len(self.steps)), key=lambda index: self.step(index).makespan)
        return order[(len(order) - 1) // 2]

    def to_json(self) -> str:
        """The profile as JSON, an action written as in a plan's orders."""
        steps = [[[[str(action), *times] for action, *times in rank] for rank in step] for step in self.steps]
        return json.dumps({"version": VERSION, "plan": self.plan, "steps": steps, "tails": self.tails})

    def save(self, path: str | Path) -> None:
        """Write the JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> Recorded:
        """Read a profile. Raises ValueError for what is none, is of another version, or was damaged."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is not a profile: {error}") from None
        if not isinstance(data, dict) or "version" not in data or "tails" not in data:
            raise ValueError("this is not a profile: a profile is a JSON object with 'version', 'steps' and 'tails'")
        data = cast(dict[str, Any], data)
        if data["version"] != VERSION:
            raise ValueError(f"profile version {data['version']} cannot be read, only {VERSION}: measure again")
        if odd := sorted({"version", "plan", "steps", "tails"} ^ set(data)):
            raise ValueError(
                f"a profile has version, plan, steps and tails: missing or unknown here is {', '.join(odd)}"
            )
        if not isinstance(data["plan"], str):
            raise ValueError(f"a profile's plan is a digest, not {data['plan']!r}")
        return cls(
            data["plan"],
            _rows(data["steps"], "steps", lambda step, at: _rows(step, at, lambda rank, at: _rows(rank, at, _record))),
            _rows(data["tails"], "tails", lambda step, at: _rows(step, at, _seconds)),
        )

    @classmethod
    def load(cls, path: str | Path) -> Recorded:
        """Read a profile from a file. Raises ValueError with the file's name; see ``from_json``."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{path}: this is not a profile: it is not text") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def shares(step: Step) -> tuple[Shares, ...]:
    """Where each rank's seconds went."""
    return tuple(_shares(records, tail) for records, tail in zip(step.records, step.tails, strict=True))


_COMPUTING: Mapping[Kind, str] = {Kind.F: "forward", Kind.R: "recompute", Kind.B: "backward", Kind.W: "weight"}


def _shares(records: Sequence[Record], tail: float) -> Shares:
    spent = dict.fromkeys((*_COMPUTING.values(), "transfer", "wait"), 0.0)
    for action, start, end, waited in records:
        spent["wait"] += waited
        spent[_COMPUTING.get(action.kind, "transfer")] += end - start - waited
    last = records[-1].end if records else 0.0
    return Shares(**spent, other=last - sum(spent.values()), after=tail - last)


def _check(records: Sequence[Record], tail: float, where: str) -> None:
    now = 0.0
    for record in records:
        action, start, end, waited = record
        if not (isfinite(end) and now - SLACK <= start <= end and 0 <= waited <= end - start + SLACK):
            raise ValueError(
                f"{where}: {action} from {start} to {end} s, {waited} s of it waiting, "
                f"cannot follow what ended at {now} s: the profile is damaged"
            )
        now = end
    if not (isfinite(tail) and tail >= now - SLACK):
        raise ValueError(f"{where}: the step ends at {tail} s, before its last action at {now} s")


def _rows(data: Any, where: str, read: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ValueError(f"{where} must be a list, not {type(data).__name__}: the profile is damaged")
    return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(cast(list[Any], data)))


def _record(data: Any, where: str) -> Record:
    if not isinstance(data, list) or len(cast(list[Any], data)) != 4 or not isinstance(data[0], str):
        raise ValueError(f'{where} is {data!r}, but a record is ["F0.0", start, end, waited]')
    word, *times = cast(list[Any], data)
    try:
        action = Action.parse(word)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    start, end, waited = (_seconds(each, where) for each in times)
    return Record(action, start, end, waited)


def _seconds(data: Any, where: str) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise ValueError(f"{where}: {data!r} is no number of seconds")
    return float(data)
