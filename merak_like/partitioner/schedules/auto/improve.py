"""Local search on orders: two neighbours on the path that sets the makespan change places."""

from __future__ import annotations

from random import Random

from merak_like.partitioner.schedules.auto.job import Job, Orders
from merak_like.partitioner.schedules.auto.run import Times, run

_SAME = 1e-9


def improve(job: Job, orders: Orders, *, goal: float, moves: int, random: Random) -> tuple[Orders, float]:
    """Return orders that are not slower, after at most so many moves were tried, or once the goal is reached."""
    current = [list(order) for order in orders]
    times = run(job, current)
    assert times is not None, "the orders that a search starts from can run"
    now = times.makespan
    best, found = [list(order) for order in current], now
    choices = _swaps(job, current, times)
    while moves > 0 and found > goal * (1 + _SAME) and choices:
        rank, at, to = choices.pop(random.randrange(len(choices)))
        moves -= 1
        order = current[rank]
        order.insert(to, order.pop(at))
        moved = run(job, current) if _fits(job, current, rank) else None
        if moved is None or moved.makespan > now * (1 + _SAME):
            order.insert(at, order.pop(to))
            continue
        if moved.makespan < found * (1 - _SAME):
            best, found = [list(each) for each in current], moved.makespan
        now = moved.makespan
        choices = _swaps(job, current, moved)
    return best, found


def _fits(job: Job, orders: Orders, rank: int) -> bool:
    held = 0.0
    for c in orders[rank]:
        if held + job.during[c] > job.limit[rank]:
            return False
        held += job.after[c]
    return True


def _swaps(job: Job, orders: Orders, times: Times) -> list[tuple[int, int, int]]:
    """Return (rank, from, to) of the moves inside each run of actions that follow one another on a critical path.

    To move an action of a run behind its end or before its start is all that can shorten the path.
    """
    place: dict[tuple[int, int], int] = {}
    turns: list[list[int]] = []
    for order in orders:
        seen: dict[int, int] = {}
        mine: list[int] = []
        for at, c in enumerate(order):
            turn = seen.get(c, 0)
            seen[c] = turn + 1
            place[c, turn] = at
            mine.append(turn)
        turns.append(mine)
    lasts = ((times.ends[order[-1]][-1], rank) for rank, order in enumerate(orders) if order)
    rank = max(lasts)[1]
    at = len(orders[rank]) - 1
    moves: set[tuple[int, int, int]] = set()
    stop = at
    while True:
        c, turn = orders[rank][at], turns[rank][at]
        start = times.ends[c][turn] - job.seconds[c]
        if at and times.ends[orders[rank][at - 1]][turns[rank][at - 1]] >= start - _SAME * times.makespan:
            at -= 1
            continue
        _run_moves(orders[rank], rank, at, stop, moves)
        late = [n for n in job.needs[c] if times.ends[n.of][turn] + n.delay >= start - _SAME * times.makespan]
        if not late:
            return sorted(moves)
        rank = job.ranks[late[0].of]
        at = stop = place[late[0].of, turn]


def _run_moves(order: list[int], rank: int, start: int, stop: int, moves: set[tuple[int, int, int]]) -> None:
    for at in range(start, stop):
        if order[at] != order[at + 1]:
            moves.add((rank, at, at + 1))
            moves.add((rank, at, stop))
            moves.add((rank, at + 1, start))
