"""Which units of a stage are computed again: as few seconds as the memory of their rank allows.

A unit that is computed again keeps, instead of what it saves, what enters it; units next to each other are run again as
one, so that only what enters the first of them is kept. What is read further on than by the next unit, or comes from
the batch, counts as soon as anything is computed again; of a stage that is all computed again only the batch is left.

The ways worth having are a *front*: fewer bytes only for more seconds. It is built unit by unit (a knapsack, Kellerer
et al. 2004, over two states: was the unit before it kept or not). Equal units give equal sums, so that the front of a
model of few kinds of units is short, and the choice exact; a front of more than ``FRONT`` ways is thinned out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merak_like.partitioner.balance import Floats, Ints
from merak_like.partitioner.held import Held

FRONT = 2000
"""Most ways of one stage that are looked at."""
COMBINED = 200_000
"""Most ways of some stages of one rank that are looked at together."""
SAME = 1e-12


@dataclass(frozen=True)
class Front:
    """Ways to run a stage, by rising bytes and falling seconds."""

    kept: Ints
    """Bytes that a live micro-batch keeps until it is computed again, received and sent values excluded."""
    seconds: Floats
    """Of what is computed again."""
    units: Sequence[tuple[int, ...]]
    """What is computed again: units by their place in the stage."""


def front(seconds: Sequence[float], saved: Sequence[int], near: Sequence[int], far: int, batch: int) -> Front:
    """All ways worth having for units with these forward seconds; see ``memory.MemoryModel.kept_by`` for the bytes.

    ``batch`` are the bytes of the batch that the stage reads.
    """
    count, whole = len(seconds), int(sum(saved))
    # The points of each level: bytes, seconds, units run again; origin: twice the point of the level before, plus its
    # state.
    nothing = np.zeros(0, np.int64)
    points = [(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64)), (nothing, np.zeros(0), nothing)]
    origins: list[tuple[Ints, Ints]] = []
    for unit in range(count):
        (kept_bytes, kept_seconds, kept_many), (run_bytes, run_seconds, run_many) = points
        origin = np.concatenate([2 * np.arange(len(kept_bytes)), 2 * np.arange(len(run_bytes)) + 1])
        spent, many = np.concatenate([kept_seconds, run_seconds]), np.concatenate([kept_many, run_many])
        keep = _pareto(np.concatenate([kept_bytes, run_bytes]) + saved[unit], spent)
        again = _pareto(np.concatenate([kept_bytes + near[unit], run_bytes]), spent + seconds[unit])
        points = [(*keep[:2], many[keep[2]]), (*again[:2], many[again[2]] + 1)]
        origins.append((origin[keep[2]], origin[again[2]]))
    ways: list[tuple[int, float, int]] = []
    for state, (ends_bytes, ends_seconds, many) in enumerate(points):
        worth = np.flatnonzero((many > 0) & (many < count) & (ends_bytes + far < whole))
        all_bytes, ends = (ends_bytes[worth] + far).tolist(), (2 * worth + state).tolist()
        ways += zip(all_bytes, ends_seconds[worth].tolist(), ends, strict=True)
    ways += [(whole, 0.0, _NONE), (min(whole, batch), float(sum(seconds)), _ALL)]
    found = _pareto(np.array([way[0] for way in ways]), np.array([way[1] for way in ways]))
    chosen: list[int] = found[2].tolist()
    return Front(found[0], found[1], _Units(origins, [ways[n][2] for n in chosen]))


_NONE, _ALL = -2, -1


class _Units(Sequence[tuple[int, ...]]):
    """The units computed again on the way to each of these points: few of them are ever asked for."""

    def __init__(self, origins: Sequence[tuple[Ints, Ints]], ends: Sequence[int]) -> None:
        self._origins, self._ends = origins, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, way: Any) -> Any:
        if isinstance(way, slice):
            return tuple(self[n] for n in range(*way.indices(len(self))))
        end, count = self._ends[int(way)], len(self._origins)
        return () if end == _NONE else tuple(range(count)) if end == _ALL else _units(self._origins, end)


def _pareto(nbytes: Ints, seconds: Floats) -> tuple[Ints, Floats, Ints]:
    """The points that no other has no more bytes and no more seconds than, by bytes; and which these are."""
    order = np.lexsort((seconds, nbytes))
    nbytes, seconds = nbytes[order], seconds[order]
    least = np.minimum.accumulate(np.concatenate([[np.inf], seconds]))[:-1]
    better = _thinned(np.flatnonzero(seconds < least - SAME * np.abs(seconds)), FRONT)
    return nbytes[better], seconds[better], order[better]


def _thinned(points: Ints, most: int) -> Ints:
    """No more points than that, spread evenly, both ends among them."""
    return points if len(points) <= most else points[np.linspace(0, len(points) - 1, most).round().astype(np.int64)]


def _units(origins: Sequence[tuple[Ints, Ints]], end: int) -> tuple[int, ...]:
    """The units computed again on the way to a point."""
    found: list[int] = []
    for unit in range(len(origins) - 1, -1, -1):
        point, state = divmod(end, 2)
        if state:
            found.append(unit)
        end = int(origins[unit][state][point])
    return tuple(reversed(found))


@dataclass(frozen=True, slots=True)
class Live:
    """Bytes of one live micro-batch on a stage."""

    boundary: int
    """Received and sent."""
    full: int
    """Everything, these included."""
    waits: int
    """Between its B and its W."""


def peak(held: Held, live: Sequence[Live], kept: Sequence[int]) -> int:
    """Bytes of live micro-batches on a rank at its fullest, where each of its stages keeps so much of one."""
    full, waits = np.array([s.full for s in live]), np.array([s.waits for s in live])
    return int((held.kept @ np.array(kept) + held.full @ full + held.waits @ waits).max(initial=0))


def choose(held: Held, live: Sequence[Live], fronts: Sequence[Front], room: int) -> tuple[int, ...] | None:
    """For each stage of a rank the way that is taken, so that the fewest seconds are computed again within ``room``.

    None if no way fits. Exact for one stage, and while there are no more than ``COMBINED`` ways to combine.
    """
    if all(len(ahead.kept) == 1 for ahead in fronts):
        only = [stage.boundary + int(ahead.kept[0]) for stage, ahead in zip(live, fronts, strict=True)]
        return (0,) * len(only) if peak(held, live, only) <= room else None
    taken = held.full @ np.array([s.full for s in live]) + held.waits @ np.array([s.waits for s in live])
    least = [held.kept[:, n] * (s.boundary + int(f.kept[0])) for n, (s, f) in enumerate(zip(live, fronts, strict=True))]
    # Ways to run the stages so far, one a row: bytes at each moment, seconds, and the way of each stage.
    used, seconds, ways = taken[None, :], np.zeros(1), np.zeros((1, 0), np.int64)
    for n, (stage, ahead) in enumerate(zip(live, fronts, strict=True)):
        left = room - sum(least[n + 1 :], np.zeros(len(taken), np.int64))
        more = (stage.boundary + ahead.kept)[:, None] * held.kept[:, n]
        total = (used[:, None, :] + more[None, :, :]).reshape(-1, len(taken))
        spent = (seconds[:, None] + ahead.seconds[None, :]).reshape(-1)
        fits = np.flatnonzero((total <= left).all(axis=1))
        if n + 1 < len(fronts):
            fits = _thinned(fits[np.argsort(spent[fits], kind="stable")], COMBINED // len(fronts[n + 1].kept))
        before, way = np.divmod(fits, len(ahead.kept))
        used, seconds = total[fits], spent[fits]
        ways = np.hstack([ways[before], way[:, None]])
    return tuple(ways[int(seconds.argmin())].tolist()) if len(seconds) else None
