"""A plan's problem once more: other cuts judged exactly as the planner judged them, other choices searched again.

The one place that knows how the planner states a problem; what explains a plan asks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from merak_like.partitioner.assemble import Setting
from merak_like.partitioner.basis import Basis
from merak_like.partitioner.job import STAND_IN
from merak_like.partitioner.judge import Judge, Judged
from merak_like.partitioner.ordering import arrange, in_order
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import recomputing, schedule_of
from merak_like.partitioner.planner import Asked, ask, make_plan, stages_per_rank
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.search import Found, quick
from merak_like.partitioner.traffic import Traffic

KEPT = ("recompute", "states", "zero", "sequence_parallel", "coding")
"""Options of ``make_plan`` that a plan itself does not say."""


def basis_of(plan: Plan) -> Basis:
    """What a plan was made from. Raises ValueError where the file does not say."""
    if plan.basis is None:
        raise ValueError(
            "the plan does not hold what it was made from: make it again with `merak plan`, or `make_plan` and `save`"
        )
    return plan.basis


def plan_again(plan: Plan, **changes: Any) -> Plan:
    """The plan for the same graph with some arguments of ``make_plan`` changed."""
    basis = basis_of(plan)
    options = {"signature": plan.signature, **basis.options, **changes}
    software = options.pop("software", None)  # the graph is that of one rank, and of that software's kernels
    if options["mesh"].tp != plan.mesh.tp:
        raise ValueError(
            f"tp = {options['mesh'].tp}: the plan holds what one of tp = {plan.mesh.tp} ranks runs; plan the model "
            f"again with `merak plan {basis.source.get('model', 'MODEL')} --tp {options['mesh'].tp}`"
        )
    made = make_plan(basis.graph, **options)
    source = {name: word for name, word in basis.source.items() if name != "alternatives"}
    kept = {} if software is None else {"software": software}
    return made if made.basis is None else replace(made, basis=made.basis.remembering(source, **kept))


@dataclass(frozen=True)
class Again:
    """The problem whose answer a plan is. Partitions are tuples of segment starts, with the end."""

    plan: Plan
    asked: Asked
    setting: Setting
    problem: Problem
    starts: tuple[int, ...]
    """The plan's."""

    @classmethod
    def of(cls, plan: Plan) -> Again:
        """State it again. Raises ValueError where the plan does not hold what it was made from."""
        basis = basis_of(plan)
        options = {n: o for n, o in basis.options.items() if n in KEPT}
        asked = ask(
            basis.graph, plan.mesh, hardware=basis.hardware, schedule=plan.schedule,
            batch=plan.mesh.dp * plan.micro_batches * plan.micro_batch, memory_limit=plan.memory_limit,
            chunks=basis.options.get("chunks") if plan.schedule == "interleaved" else None, **options,
        )  # fmt: skip
        software = basis.options.get("software")
        asked = asked if software is None else replace(asked, software=software)
        setting = asked.setting(plan.micro_batches)
        problem = _cut_at(setting.problem, basis, plan.starts, setting.scale)
        place = {position: index for index, position in enumerate(problem.positions.tolist())}
        return cls(plan, asked, setting, problem, tuple(place[start] for start in plan.starts))

    @cached_property
    def _judge(self) -> Judge:
        return Judge(self.problem)

    def judge(self, starts: Sequence[int]) -> Judged | None:
        """A partition under the plan's schedule; None if it does not fit the memory.

        Orders that were built for the plan's own stages stay: other stages are judged by what stands in for them.
        """
        judged = self._judge(starts)
        if judged is None or self.plan.schedule not in STAND_IN or tuple(starts) != self.starts:
            return judged
        again = [stage for stage, units in enumerate(judged.recompute) if units]
        return judged.ordered(recomputing(schedule_of(self.plan), again))

    @cached_property
    def judged(self) -> Judged:
        """The plan itself. Raises ValueError where it does not fit its memory, as after an edit."""
        judged = self.judge(self.starts)
        if judged is None:
            raise ValueError("the plan's stages do not fit its memory limit: make the plan again")
        return judged

    @cached_property
    def stand_in(self) -> Judged:
        """The plan's stages under the schedule that other cuts are judged by."""
        return self._judge(self.starts) or self.judged

    def bound(self, border: int, positions: Sequence[int]) -> list[float]:
        """Seconds that no step is shorter than with this border (1 is the first) at each of some segments."""
        starts, k = self.starts, self.problem.job.stages - 1 - border
        at = np.array(positions, np.int64)
        before = self.problem.bound(k + 1, np.full(len(at), starts[border - 1], np.int64), at)
        after = self.problem.bound(k, at, np.full(len(at), starts[border + 1], np.int64))
        return np.maximum(before, after).tolist()

    def same_stages(self, **job: Any) -> Judged | None:
        """The plan's own stages with other choices of the job: ``schedule``, ``recompute``, ``memory_limit``."""
        if "schedule" in job:
            job["chunks"] = stages_per_rank(job["schedule"], None)
        problem = replace(self.problem, job=replace(self.problem.job, **job))
        judged = Judge(problem)(self.starts) if problem.job.stages == len(self.starts) - 1 else None
        if judged is None or problem.job.schedule not in STAND_IN:
            return judged
        return in_order(problem, Found(self.starts, judged, proven=False, simulated=1, bound=0.0))[0]

    def other_stages(self, *, micro_batches: int | None = None, **asked: Any) -> Judged | None:
        """Stages cut anew, quickly, for other arguments of the planner; None if nothing is found that fits."""
        if "schedule" in asked:
            asked["chunks"] = stages_per_rank(asked["schedule"], None)
        changed = replace(self.asked, **asked).setting(micro_batches or self.plan.micro_batches).problem
        arranged = arrange(changed, quick)
        return arranged and arranged.judged


def _cut_at(problem: Problem, basis: Basis, starts: Sequence[int], scale: float) -> Problem:
    """The problem with these ops among its positions: a plan edited by hand may be cut where the planner would not."""
    positions = np.union1d(problem.positions, np.array(starts, np.int64)).astype(np.int64)
    if len(positions) == len(problem.positions):
        return problem
    return replace(problem, positions=positions, traffic=Traffic(basis.graph, positions, scale=scale))
