"""Where the seconds of a step go: each cause is what the simulated step loses when it is switched off, in turn.

    work        all computing of a rank, if it were shared out evenly and nobody ever waited
    bubble      the schedule's own waiting, with equal stages and links that take no time
    imbalance   that the stages are not equal
    recompute   that memory does not suffice to keep everything
    transfers   that links take time
    outside     what the plan counts beside the pipeline

They add up to the step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from merak_like.partitioner.explain.again import Again
from merak_like.partitioner.judge import Judged
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import costs_of, edges_of, schedule_of
from merak_like.partitioner.schedules.action import Edges, Schedule
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.simulator import Costs, StageCosts, Timeline, simulate


@dataclass(frozen=True)
class Losses:
    """Seconds of each cause."""

    work: float
    bubble: float
    imbalance: float
    recompute: float
    transfers: float
    outside: float = 0.0

    @property
    def step(self) -> float:
        """All of them."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def largest(self) -> str:
        """The cause that costs most beside the work itself."""
        return max((f.name for f in fields(self)[1:]), key=lambda name: getattr(self, name))


def losses_of(plan: Plan) -> Losses:
    """Where the seconds of a plan go, as the planner played it where the plan holds what it was made from."""
    if plan.basis is None:
        return Played.of_plan(plan).losses
    judged = Again.of(plan).judged
    return Played.of_judged(judged, plan.step_seconds - judged.timeline.makespan).losses


CAUSES: tuple[str, ...] = tuple(f.name for f in fields(Losses))


@dataclass(frozen=True)
class Played:
    """A step that was simulated."""

    schedule: Schedule
    """With its transfers."""
    costs: Costs
    edges: Edges
    timeline: Timeline
    step: float
    """What the plan says; more than the makespan where it counts what comes after the pipeline."""

    @classmethod
    def of_plan(cls, plan: Plan) -> Played:
        """From what the plan itself says of its stages."""
        costs, edges = costs_of(plan), edges_of(plan)
        full = add_transfers(schedule_of(plan), edges)
        return cls(full, costs, edges, simulate(full, costs, edges), plan.step_seconds)

    @classmethod
    def of_judged(cls, judged: Judged, outside: float = 0.0) -> Played:
        """As the planner played it."""
        full = add_transfers(judged.schedule, judged.edges)
        timeline = simulate(full, judged.costs, judged.edges)
        return cls(full, judged.costs, judged.edges, timeline, timeline.makespan + outside)

    @property
    def losses(self) -> Losses:
        """Where the seconds go."""
        stages, m, ranks = self.costs.stages, self.schedule.micro_batches, self.schedule.ranks
        kept = tuple(replace(stage, recompute=0.0) for stage in stages)
        count = len(stages)
        mean = StageCosts(
            sum(s.forward for s in stages) / count, sum(s.backward for s in stages) / count,
            weight=sum(s.weight for s in stages) / count,
        )  # fmt: skip
        even = self._seconds(Costs((mean,) * len(stages)))
        uneven = self._seconds(Costs(kept))
        again = self._seconds(Costs(stages))
        work = sum(s.forward + s.backward + s.weight for s in stages) * m / ranks
        makespan = self.timeline.makespan
        return Losses(work, even - work, uneven - even, again - uneven, makespan - again, self.step - makespan)

    def _seconds(self, costs: Costs) -> float:
        return simulate(self.schedule, costs, self.edges).makespan
