"""When the actions of given orders end: the rules of clock.py, on numbers, for a search that asks often."""

from __future__ import annotations

from typing import NamedTuple

from merak_like.partitioner.schedules.auto.job import Job, Orders


class Times(NamedTuple):
    """Seconds at which each turn of each class ends."""

    ends: list[list[float]]
    makespan: float


def run(job: Job, orders: Orders) -> Times | None:
    """Return the times, or None where ranks wait for one another for ever."""
    needs, seconds = job.needs, job.seconds
    ends: list[list[float]] = [[] for _ in job.kinds]
    waiting: list[list[int]] = [[] for _ in job.kinds]
    now, at, left = [0.0] * len(orders), [0] * len(orders), len(orders)
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        order, t, i = orders[rank], now[rank], at[rank]
        size = len(order)
        while i < size:
            c = order[i]
            mine = ends[c]
            turn = len(mine)
            for of, delay in needs[c]:
                theirs = ends[of]
                if len(theirs) <= turn:
                    waiting[of].append(rank)
                    break
                if theirs[turn] + delay > t:
                    t = theirs[turn] + delay
            else:
                t += seconds[c]
                mine.append(t)
                i += 1
                if waiting[c]:
                    ready += waiting[c]
                    waiting[c].clear()
                continue
            break
        else:
            left -= 1
        now[rank], at[rank] = t, i
    return None if left else Times(ends, max(now))
