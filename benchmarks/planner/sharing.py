"""How long a step's pipeline takes where several ranks share a core, which no device does.

Ranks that compute at once get equal parts of the cores (processor sharing, as Linux's scheduler gives them over more
than a few milliseconds); a rank that waits needs none. With a core for each rank it is the simulator's makespan, but
that a transfer here neither waits for its channel nor for its receive.
"""

from __future__ import annotations

from merak_like.partitioner.schedules.action import Action, Edges, Kind, Schedule
from merak_like.partitioner.simulator import Costs, simulate


def makespan(schedule: Schedule, costs: Costs, edges: Edges, *, alike: int, cores: int) -> float:
    """Seconds of a compute-only schedule each of whose ranks stands for ``alike`` processes on ``cores`` cores."""
    work = {e.action: e.end - e.start for rank in simulate(schedule, costs, edges).entries for e in rank}
    ended = dict[Action, float]()
    at, left = [0] * schedule.ranks, dict[int, float]()
    now = 0.0
    while len(ended) < len(work):
        arrivals = list[float]()
        for rank, order in enumerate(schedule.orders):
            if rank not in left and at[rank] < len(order):
                action = order[at[rank]]
                ready = _ready(action, schedule, costs, edges, ended)
                if ready is not None and ready <= now + 1e-12:
                    left[rank] = work[action]
                elif ready is not None:
                    arrivals.append(ready - now)
        speed = min(1.0, cores / max(len(left) * alike, 1))
        passed = min([*arrivals, *(seconds / speed for seconds in left.values())])
        now += passed
        for rank in list(left):
            left[rank] -= passed * speed
            if left[rank] <= 1e-12:
                del left[rank]
                ended[schedule.orders[rank][at[rank]]] = now
                at[rank] += 1
    return now


def _ready(action: Action, schedule: Schedule, costs: Costs, edges: Edges, ended: dict[Action, float]) -> float | None:
    """When what an action needs of other stages is there; None while something has not ended."""
    stage, rank = action.stage, schedule.stage_rank
    if action.kind is Kind.F:
        needs = [(s, (s, t)) for s, t in edges if t == stage]
    elif action.kind is Kind.B:
        needs = [(t, (s, t)) for s, t in edges if s == stage]
    else:
        return 0.0
    ready = 0.0
    for other, edge in needs:
        end = ended.get(action._replace(stage=other))
        if end is None:
            return None
        ready = max(ready, end + (costs.transfer.get(edge, 0.0) if rank[other] != rank[stage] else 0.0))
    return ready
