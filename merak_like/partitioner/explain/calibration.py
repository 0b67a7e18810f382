"""Constants of the hardware corrected by what an engine measured, so that the next plan's seconds are nearer the truth.

What is fitted are the constants that say how fast a device is beside its data sheet: the share of the peak that
matmuls reach, the memory's bandwidth, the seconds of a launch, how much longer than its estimate a backward takes, and,
from profiles over tensor-parallel ranks, what a sum over them costs beside its bytes. The error is that of the
logarithm of each stage's forward and backward (least squares, Gauss-Newton); a constant that the profiles say nothing
of stays where it was.

What stands in the profiles is read: the host's seconds for a micro-batch (between actions) and for a message (in the
calls that start transfers), and the bandwidth at which the optimizer steps, from what follows a step's last action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, log
from statistics import fmean, median
from typing import Any

import numpy as np

from merak_like.partitioner.after import stepped_bytes
from merak_like.partitioner.cost import op_costs
from merak_like.partitioner.explain.again import Again, basis_of
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.recorded import Recorded, Shares, shares
from merak_like.partitioner.schedules.action import Kind

FITTED = ("efficiency", "memory_bandwidth", "launch_seconds", "backward_factor")
SUMS = ("collective_seconds",)
"""Fitted where a profile has sums over tensor-parallel ranks."""
READ = ("micro_batch_seconds", "message_seconds", "state_bandwidth")
HOLD = 0.03
"""How much a constant is held where it was: a factor of e away counts as an error of 3 % of one stage."""
ROUNDS = 25
MOST = 3.0
"""In one round a constant moves by no more than this factor."""


@dataclass(frozen=True)
class Compared:
    """Seconds of one micro-batch's action on one stage, or of a step: before, measured, and with the new constants."""

    plan: str
    what: str
    before: float
    measured: float
    after: float


@dataclass(frozen=True)
class Calibration:
    """The corrected hardware, and how well it fits."""

    hardware: Hardware
    changed: Mapping[str, tuple[float, float]]
    """Each constant that was fitted or read, before and after."""
    rows: tuple[Compared, ...]

    @property
    def error(self) -> tuple[float, float]:
        """Mean of the relative errors before and after."""
        return _error([(r.before, r.measured) for r in self.rows]), _error([(r.after, r.measured) for r in self.rows])

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"error": self.error, **asdict(self)}


def calibrate(pairs: Sequence[tuple[Plan, Recorded]]) -> Calibration:
    """Fit the hardware of some plans to what was measured of them.

    Raises ValueError where a profile is not of its plan, a plan does not hold what it was made from, or the plans are
    for different hardware.
    """
    if not pairs:
        raise ValueError("nothing was measured: give a plan and its profile")
    for plan, recorded in pairs:
        if recorded.plan != plan.digest:
            raise ValueError(
                f"the profile is of plan {recorded.plan[:12]}, but this plan is {plan.digest[:12]}: give the plan that "
                "was run"
            )
    machine = basis_of(pairs[0][0]).hardware
    for plan, _ in pairs[1:]:
        if basis_of(plan).hardware != machine:
            raise ValueError(f"the plans are for {machine.name} and {plan.hardware}: calibrate one machine at a time")
    jobs = [_Job(plan, recorded) for plan, recorded in pairs]
    names = FITTED + SUMS * any(plan.mesh.tp > 1 for plan, _ in pairs)
    fitted = replace(_fit(machine, jobs, names), **_read(pairs))
    rows = tuple(row for job in jobs for row in job.compared(machine, fitted))
    changed = {name: (getattr(machine, name), getattr(fitted, name)) for name in (*names, *READ)}
    return Calibration(fitted, changed, rows)


class _Job:
    """A plan and what was measured of its stages."""

    def __init__(self, plan: Plan, recorded: Recorded) -> None:
        self.plan, self.recorded = plan, recorded
        self.again = Again.of(plan)
        self.measured = _stage_seconds(plan, recorded)

    def predicted(self, machine: Hardware) -> dict[tuple[str, int], float]:
        """Seconds of each stage's forward and backward on a machine."""
        costs = op_costs(self.again.asked.of_rank, machine, scale=self.again.setting.scale)
        found: dict[tuple[str, int], float] = {}
        for stage in self.plan.stages:
            spent = costs[stage.start : stage.stop]
            found["forward", stage.index] = sum(c.forward_seconds for c in spent)
            found["backward", stage.index] = sum(c.backward_seconds for c in spent)
        return found

    def rows(self, machine: Hardware) -> list[tuple[float, float]]:
        """(predicted, measured) of every stage and kind that was measured."""
        predicted = self.predicted(machine)
        return [(predicted[key], seconds) for key, seconds in self.measured.items() if predicted[key] > 0]

    def compared(self, before: Hardware, after: Hardware) -> list[Compared]:
        """Before, measured and after: stages, then the pipeline."""
        plan, name = self.plan, self.plan.digest[:12]
        old, new = self.predicted(before), self.predicted(after)
        made = [
            Compared(name, f"{kind} of stage {stage}", old[kind, stage], seconds, new[kind, stage])
            for (kind, stage), seconds in self.measured.items()
        ]
        basis = basis_of(plan)
        changed = replace(plan, basis=basis.remembering(basis.source, hardware=after))
        step = self.recorded.step(self.recorded.median)
        steps = self.again.judged.timeline.makespan, Again.of(changed).judged.timeline.makespan
        return [*made, Compared(name, "the pipeline", steps[0], step.makespan, steps[1])]


def _stage_seconds(plan: Plan, recorded: Recorded) -> dict[tuple[str, int], float]:
    """Median seconds at work over ranks, steps and micro-batches; a stage's backward is B and W, without its recompute.

    With one stage, what is waited for are sums over tensor-parallel ranks: they belong to the work. The first step is
    left out where there are others: it allocates and warms up.
    """
    seen: dict[tuple[Kind, int], list[float]] = {}
    alone = plan.mesh.pp == 1
    for step in recorded.steps[1:] or recorded.steps:
        for records in step:
            for action, start, end, waited in records:
                if action.peer < 0:
                    seconds = end - start - waited * (not alone)
                    seen.setdefault((action.kind, action.stage), []).append(max(seconds, 0.0))
    middle = {key: median(times) for key, times in seen.items()}
    found: dict[tuple[str, int], float] = {}
    for stage in plan.stages:
        at = stage.index
        forward = middle.get((Kind.F, at), 0.0)
        again = 0.0
        if stage.recompute and (Kind.R, at) not in middle and stage.forward_seconds:  # it is inside the B
            again = forward * stage.recompute_seconds / stage.forward_seconds
        backward = middle.get((Kind.B, at), 0.0) + middle.get((Kind.W, at), 0.0) - again
        found |= {key: s for key, s in ((("forward", at), forward), (("backward", at), backward)) if s > 0}
    return found


def _read(pairs: Sequence[tuple[Plan, Recorded]]) -> dict[str, float]:
    """What stands in the profiles: the median over ranks and steps. What none of them has, or tells apart, is left out.

    What follows the last action is the optimizer's where no sum over replicas or tied stages is in it.
    """
    seen = {name: list[float]() for name in READ}
    for plan, recorded in pairs:
        alone = plan.mesh.dp == 1 and not plan.after.get("ties")
        for index in range(min(1, len(recorded.steps) - 1), len(recorded.steps)):
            step = recorded.step(index)
            for rank, (share, records) in enumerate(zip(shares(step), step.records, strict=True)):
                seen["micro_batch_seconds"].append(share.other / plan.micro_batches)
                calls = [record.end - record.start for record in records if record.action.peer >= 0]
                seen["message_seconds"] += [fmean(calls)] if calls else []
                own = [s.memory for s in plan.stages if s.rank == plan.mesh.coord(rank).pp]
                if alone and share.after > 0:
                    stepped = sum(stepped_bytes(plan.mesh, held, plan.zero) for held in own)
                    seen["state_bandwidth"].append(stepped / share.after)
    return {name: median(found) for name, found in seen.items() if found and median(found) > 0}


def _fit(machine: Hardware, jobs: Sequence[_Job], names: Sequence[str]) -> Hardware:
    begin = [getattr(machine, name) or machine.intra.latency for name in names]  # what was 0 is of that order
    start = np.array([log(max(each, 1e-12)) for each in begin])

    def at(point: np.ndarray) -> Hardware:
        return replace(machine, **{name: exp(value) for name, value in zip(names, point.tolist(), strict=True)})

    def errors(point: np.ndarray) -> np.ndarray:
        made = at(point)
        wrong = [log(predicted / measured) for job in jobs for predicted, measured in job.rows(made)]
        return np.array([*wrong, *(HOLD * (point - start))])

    point, now = start.copy(), errors(start)
    for _ in range(ROUNDS):
        slopes = np.stack([(errors(point + nudge) - now) / 1e-4 for nudge in 1e-4 * np.eye(len(names))], axis=1)
        move = np.clip(np.linalg.lstsq(slopes, -now, rcond=None)[0], -log(MOST), log(MOST))
        while np.abs(move).max() > 1e-6:
            tried = errors(point + move)
            if (tried**2).sum() < (now**2).sum():
                point, now = point + move, tried
                break
            move = move / 2
        else:
            break
    named = f"{machine.name.removesuffix(' calibrated')} calibrated"
    told = f"{machine.source}; {', '.join(names)} fitted to {len(now) - len(names)} measured times of stages"
    return replace(at(point), name=named, source=told.lstrip("; "))


def _error(rows: Sequence[tuple[float, float]]) -> float:
    return sum(abs(a / b - 1) for a, b in rows if b) / max(len(rows), 1)


def outside(recorded: Recorded) -> Shares:
    """The shares of the rank whose step ended last, in the median step: what comes after the pipeline is ``after``."""
    step = recorded.step(recorded.median)
    return max(shares(step), key=lambda one: one.after)
