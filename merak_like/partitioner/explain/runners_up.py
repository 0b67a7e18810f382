"""Why other degrees lost: those that the plan carries, or else the same world shared out otherwise, cut again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, cast

from merak_like.partitioner.batches import divisors
from merak_like.partitioner.explain.again import Again, plan_again
from merak_like.partitioner.explain.losses import CAUSES, Losses, losses_of
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan

MOST = 4
"""Other degrees that are looked at, the nearest first."""
LOST = {
    "work": "each rank computes more", "bubble": "more waiting", "imbalance": "stages are less even",
    "recompute": "more is computed again", "transfers": "links take longer",
    "outside": "the optimizer and the sum of gradients take longer",
}  # fmt: skip


@dataclass(frozen=True)
class RunnerUp:
    """Other degrees and what they would take."""

    dp: int
    pp: int
    tp: int
    micro_batches: int
    step_seconds: float | None
    """None where nothing was found that fits."""
    why: str


def runners_up(plan: Plan, again: Again | None) -> tuple[RunnerUp, ...]:
    """The plan's own list where it has one."""
    basis = getattr(plan, "basis", None)
    held = basis.source.get("alternatives", ()) if basis is not None else ()
    carried = [_read(item) for item in (*(getattr(plan, "alternatives", ()) or ()), *held)]
    known = tuple(item for item in carried if item is not None and (item.dp, item.pp, item.tp) != _degrees(plan.mesh))
    if known or again is None:
        return known
    mesh = plan.mesh
    world = mesh.dp * mesh.pp
    near = sorted((pp for pp in divisors(world) if pp != mesh.pp), key=lambda pp: max(pp / mesh.pp, mesh.pp / pp))
    found = [_tried(plan, Mesh(world // pp, pp, mesh.tp)) for pp in near[:MOST]]
    return tuple(sorted(found, key=lambda one: one.step_seconds or float("inf")))


def _degrees(mesh: Mesh) -> tuple[int, int, int]:
    return mesh.dp, mesh.pp, mesh.tp


def _tried(plan: Plan, mesh: Mesh) -> RunnerUp:
    """Micro-batches of the plan's size where that divides, else of the nearest."""
    batch = plan.mesh.dp * plan.micro_batches * plan.micro_batch
    if batch % mesh.dp:
        return RunnerUp(*_degrees(mesh), 0, None, f"{batch} samples cannot be shared evenly by {mesh.dp} replicas")
    each = batch // mesh.dp
    m = min(divisors(each), key=lambda n: (abs(each / n - plan.micro_batch), n))
    try:
        made = plan_again(plan, mesh=mesh, micro_batches=m, micro_batch=None, thorough=False)
    except ValueError as error:
        short = "too little memory" if "fits the memory" in str(error) else str(error)
        return RunnerUp(*_degrees(mesh), m, None, short)
    losses, own = losses_of(made), losses_of(plan)
    if losses.step >= own.step:
        return RunnerUp(*_degrees(mesh), m, losses.step, _compared(own, losses))
    told = "faster by this estimate: its cut was searched quickly, make the plan to be sure"
    return RunnerUp(*_degrees(mesh), m, losses.step, told)


def _compared(own: Losses, other: Losses) -> str:
    """What takes most of the time that it is slower."""
    more = {name: getattr(other, name) - getattr(own, name) for name in CAUSES}
    worst = max(more, key=lambda name: more[name])
    return f"{LOST[worst]} (+{more[worst] / own.step:.1%} of the step)"


def _read(item: Any) -> RunnerUp | None:
    """One of a plan's alternatives, however it writes them: degrees and seconds are what matters."""
    data: Any = asdict(item) if is_dataclass(item) and not isinstance(item, type) else item
    if not isinstance(data, Mapping):
        return None
    data = cast(Mapping[str, Any], data)
    mesh = data.get("mesh", data)
    seconds = data.get("step_seconds")
    try:
        degrees = (int(mesh["dp"]), int(mesh["pp"]), int(mesh.get("tp", 1)))
    except (KeyError, TypeError, ValueError):
        return None
    told = next((str(data[key]) for key in ("why", "reason", "binds", "note") if data.get(key)), "")
    return RunnerUp(*degrees, int(data.get("micro_batches") or 0), None if seconds is None else float(seconds), told)
