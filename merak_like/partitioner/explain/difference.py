"""What differs between two plans, and how much each difference matters by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

from merak_like.partitioner.explain.again import Again
from merak_like.partitioner.explain.losses import CAUSES, Losses, losses_of
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.summary import MEMORY_KINDS, samples, tight_rank
from merak_like.partitioner.report.text import bytes_text, percent_text, ranges, seconds_text

SAME = 1e-9


@dataclass(frozen=True)
class Differs:
    """One thing that differs, in words; ``alone`` is the step of the first plan if only this were as in the second."""

    what: str
    first: str
    second: str
    alone: float | None = None


@dataclass(frozen=True)
class Difference:
    """All that differs."""

    plans: tuple[str, str]
    models: tuple[str, str]
    step_seconds: tuple[float, float]
    samples_per_second: tuple[float, float]
    rank_bytes: tuple[int, int]
    """Of the fullest rank."""
    decided: tuple[Differs, ...]
    """What was asked or decided otherwise."""
    losses: tuple[Losses, Losses]
    """Where the seconds of both steps go."""
    memory: tuple[tuple[str, int, int], ...]
    """Bytes by kind on the fullest rank of each."""

    @property
    def same(self) -> bool:
        """Whether they decide the same."""
        return self.plans[0] == self.plans[1]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def difference(first: Plan, second: Plan) -> Difference:
    """Compare two plans of the same model, or of different ones."""
    plans = first, second
    return Difference(
        plans=(first.digest, second.digest),
        models=(first.model, second.model),
        step_seconds=(first.step_seconds, second.step_seconds),
        samples_per_second=(_rate(first), _rate(second)),
        rank_bytes=(max(first.rank_bytes), max(second.rank_bytes)),
        decided=tuple(_decided(first, second)),
        losses=(losses_of(first), losses_of(second)),
        memory=tuple((kind, *(_held(plan, kind) for plan in plans)) for kind in MEMORY_KINDS),  # pyright: ignore
    )


def _rate(plan: Plan) -> float:
    return samples(plan) / plan.step_seconds if plan.step_seconds else 0.0


def _held(plan: Plan, kind: str) -> int:
    rank = tight_rank(plan)
    return sum(getattr(stage.memory, kind) for stage in plan.stages if stage.rank == rank)


def _decided(first: Plan, second: Plan) -> Iterator[Differs]:
    """What was asked, then what was decided."""
    alone = _Alone(first, second)
    told = (
        ("model", first.model, second.model, None),
        ("traced with", _traced(first), _traced(second), None),
        ("hardware", first.hardware, second.hardware, alone.hardware),
        ("degrees", str(first.mesh), str(second.mesh), None),
        ("batch", f"{samples(first)} samples", f"{samples(second)} samples", None),
        ("micro-batches", _micro(first), _micro(second), alone.micro_batches),
        ("schedule", _schedule(first), _schedule(second), alone.schedule),
        ("memory limit", bytes_text(first.memory_limit), bytes_text(second.memory_limit), alone.memory),
        ("order", *_orders(first, second), None),
    )
    for what, one, other, ask in told:
        if one != other:
            yield Differs(what, one, other, ask() if ask else None)
    if cuts := _cuts(first, second):
        yield Differs(*cuts, alone.cuts())
    for stage, (a, b) in enumerate(zip_longest(first.stages, second.stages)):
        if a is not None and b is not None and a.recompute != b.recompute:
            yield Differs(f"recompute, stage {stage}", _again(a.recompute), _again(b.recompute))


def _traced(plan: Plan) -> str:
    return ", ".join(f"{name} {about}" for name, about in plan.signature.items()) or "unknown"


def _micro(plan: Plan) -> str:
    return f"{plan.micro_batches} of {plan.micro_batch}"


def _schedule(plan: Plan) -> str:
    each = len(plan.stages) // plan.mesh.pp
    return plan.schedule + (f", {each} stages per rank" if each > 1 else "")


def _orders(first: Plan, second: Plan) -> tuple[str, str]:
    differ = first.schedule == second.schedule and first.orders != second.orders
    return ("built for its stages", "built for its stages, otherwise") if differ else ("", "")


def _again(units: Sequence[str]) -> str:
    return ", ".join(ranges(units)) or "nothing"


def _cuts(first: Plan, second: Plan) -> tuple[str, str, str] | None:
    """The borders that are elsewhere, each by the unit after it."""
    if first.model != second.model or first.starts == second.starts:
        return None
    if len(first.stages) != len(second.stages):
        return "cuts", f"{len(first.stages)} stages", f"{len(second.stages)} stages"
    moved = [
        (_beginning(first, a.index), _beginning(second, b.index), a.index - 1)
        for a, b in zip(first.stages, second.stages, strict=True)
        if a.start != b.start
    ]
    told = [", ".join(f"{i}|{i + 1} before {name}" for name, i in rows) for rows in (
        [(one, i) for one, _, i in moved], [(other, i) for _, other, i in moved])]  # fmt: skip
    return ("cuts", told[0], told[1]) if moved else None


def _beginning(plan: Plan, stage: int) -> str:
    start = plan.stages[stage].start
    return next((u.name for u in plan.units if u.first <= start < u.stop), f"op {start}")


class _Alone:
    """The first plan with one choice of the second."""

    def __init__(self, first: Plan, second: Plan) -> None:
        self.first, self.second = first, second

    def _step(self, **changes: Any) -> float | None:
        """Seconds of the first plan's stages where that can be simulated."""
        if self.first.basis is None or "auto" in self.first.schedule:
            return None
        try:
            changed = Again.of(replace(self.first, **changes))
            judged = changed.judged
        except ValueError:
            return None
        outside = self.first.step_seconds - Again.of(self.first).judged.timeline.makespan
        return judged.timeline.makespan + outside

    def hardware(self) -> float | None:
        if self.first.basis is None or self.second.basis is None:
            return None
        basis = self.first.basis.remembering(self.first.basis.source, hardware=self.second.basis.hardware)
        return self._step(basis=basis)

    def micro_batches(self) -> float | None:
        if samples(self.first) != samples(self.second) or self.first.mesh.dp != self.second.mesh.dp:
            return None
        return self._step(micro_batches=self.second.micro_batches, micro_batch=self.second.micro_batch)

    def schedule(self) -> float | None:
        same = self.first.stage_rank == self.second.stage_rank and not self.second.orders
        return self._step(schedule=self.second.schedule) if same else None

    def memory(self) -> float | None:
        return self._step(memory_limit=self.second.memory_limit)

    def cuts(self) -> float | None:
        if len(self.first.stages) != len(self.second.stages) or self.first.starts[-1] != self.second.starts[-1]:
            return None
        moved = zip(self.first.stages, self.second.stages, strict=True)
        return self._step(stages=tuple(replace(a, start=b.start, stop=b.stop) for a, b in moved))


def because(found: Difference) -> Iterator[str]:
    """Why the second step takes longer or shorter, the largest cause first."""
    before, after = found.step_seconds
    if abs(after - before) <= SAME * before:
        return
    changes = [(getattr(found.losses[1], cause) - getattr(found.losses[0], cause), cause) for cause in CAUSES]
    for change, cause in sorted(changes, key=lambda one: -abs(one[0])):
        if abs(change) > 0.001 * max(before, after):
            sign = "+" if change > 0 else "-"
            yield f"{cause} {sign}{seconds_text(abs(change))} ({sign}{percent_text(abs(change) / before)})"
