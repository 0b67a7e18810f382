"""Refuse a schedule that would hang, use a value too early or swap micro-batches, and show where it goes wrong."""

from __future__ import annotations

from collections import defaultdict
from itertools import zip_longest

from merak_like.partitioner.schedules.action import (
    COMPUTE,
    RECEIVE_OF,
    USER_OF,
    Action,
    Edges,
    Kind,
    Schedule,
    chain,
    check_edges,
)
from merak_like.partitioner.schedules.clock import deadlock, run_unit_clock
from merak_like.partitioner.schedules.grid import marked

#: Action -> (rank, place in that rank's order).
_Places = dict[Action, tuple[int, int]]

#: (earlier, later) kinds of one micro-batch on one stage.
_IN_ORDER = ((Kind.F, Kind.R), (Kind.F, Kind.B), (Kind.R, Kind.B), (Kind.B, Kind.W))


def validate(schedule: Schedule, edges: Edges | None = None) -> tuple[int, ...]:
    """Return the peak number of live micro-batches per stage, or raise a ValueError that shows the wrong cell.

    Edges default to the plain chain. A schedule without any transfer is checked as compute-only.
    """
    edges = chain(schedule.stages) if edges is None else edges
    check_edges(edges, schedule.stages)
    places = _places(schedule)
    _check_computations(schedule, places)
    if schedule.has_transfers:
        _check_transfers(schedule, edges, places)
        _check_channels(schedule, places)
    clock = run_unit_clock(schedule, edges)
    if clock.waits:
        wait, story = deadlock(schedule, clock.waits)
        raise _error(schedule, wait.rank, wait.at, story)
    return schedule.peak_live()


def _error(schedule: Schedule, rank: int, at: int, what: str) -> ValueError:
    return ValueError(f"{what}\n{marked(schedule, rank, at)}")


def _places(schedule: Schedule) -> _Places:
    """Return where each action is; each must be on its stage's rank, within bounds, and there once."""
    stages, micro_batches, rank_of = schedule.stages, schedule.micro_batches, schedule.stage_rank
    places: _Places = {}
    for rank, order in enumerate(schedule.orders):
        for at, action in enumerate(order):
            if not (0 <= action.stage < stages and action.peer < stages and 0 <= action.micro_batch < micro_batches):
                what = f"{action} is out of range: there are {stages} stages and {micro_batches} micro-batches"
            elif (action.peer < 0) != (action.kind in COMPUTE):
                what = f"{action}: transfers, and only they, name a peer"
            elif rank_of[action.stage] != rank:
                what = f"{action} is on rank {rank}, but stage {action.stage} runs on rank {rank_of[action.stage]}"
            elif action in places:
                what = f"{action} is there twice"
            else:
                places[action] = rank, at
                continue
            raise _error(schedule, rank, at, what)
    return places


def _check_computations(schedule: Schedule, places: _Places) -> None:
    """Every F and B exactly once; per micro-batch and stage in the order F, R, B, W."""
    for stage, rank in enumerate(schedule.stage_rank):
        for i in range(schedule.micro_batches):
            for kind in (Kind.F, Kind.B):
                if Action(kind, i, stage) not in places:
                    end = len(schedule.orders[rank])
                    raise _error(schedule, rank, end, f"{Action(kind, i, stage)} is missing on rank {rank}")
            for earlier, later in _IN_ORDER:
                first, then = Action(earlier, i, stage), Action(later, i, stage)
                if then in places and first in places and places[then] < places[first]:
                    raise _error(schedule, *places[then], f"{then} runs before {first}, which it needs")


def _check_transfers(schedule: Schedule, edges: Edges, places: _Places) -> None:
    """Both ends of each transfer are there, after the value is made and before it is used; and no other transfers."""
    rank_of = schedule.stage_rank
    expected: set[Action] = set()
    for source, target in sorted(edges):
        if rank_of[source] == rank_of[target]:
            continue
        for i in range(schedule.micro_batches):
            for send in (Action(Kind.SEND_F, i, source, target), Action(Kind.SEND_B, i, target, source)):
                user_kind = USER_OF[RECEIVE_OF[send.kind]]
                maker, user = Action(user_kind, i, send.stage), Action(user_kind, i, send.peer)
                if send not in places:
                    what = f"{send} is missing: {maker} makes a value that nobody sends"
                    raise _error(schedule, *places[maker], what)
                if places[send] < places[maker]:
                    raise _error(schedule, *places[send], f"{send} runs before {maker}, which makes the value")
                if send.match not in places:
                    what = f"{send.match} is missing: {user} uses a value that nobody receives"
                    raise _error(schedule, *places[user], what)
                if places[send.match] > places[user]:
                    raise _error(schedule, *places[user], f"{user} uses a value before {send.match} receives it")
                expected |= {send, send.match}
    for action, (rank, at) in places.items():
        if action.peer >= 0 and action not in expected:
            source, target = sorted((action.stage, action.peer))
            what = f"{action} transfers a value that nobody uses: {source} -> {target} is no edge between two ranks"
            raise _error(schedule, rank, at, what)


def _check_channels(schedule: Schedule, places: _Places) -> None:
    """From one rank to another, the k-th send and the k-th receive are the same transfer."""
    rank_of = schedule.stage_rank
    sends: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    receives: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, order in enumerate(schedule.orders):
        for action in order:
            if action.kind in RECEIVE_OF:
                sends[rank, rank_of[action.peer]].append(action)
            elif action.kind in USER_OF:
                receives[rank_of[action.peer], rank].append(action)
    for channel in sorted(sends):
        for turn, (send, receive) in enumerate(zip_longest(sends[channel], receives[channel])):
            if send.match != receive:
                source, target = channel
                what = (
                    f"transfer {turn} from rank {source} to rank {target} is sent as {send} but received as {receive}: "
                    f"a channel has no tags, so values would be swapped silently"
                )
                raise _error(schedule, *places[receive], what)
