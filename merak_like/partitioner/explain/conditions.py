"""A plan under other conditions: its own stages simulated there, and planned again from what the plan holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from merak_like.partitioner.explain.again import Again, basis_of, plan_again
from merak_like.partitioner.explain.difference import Difference, difference
from merak_like.partitioner.hardware import Hardware, Link
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.summary import samples


@dataclass(frozen=True)
class Conditions:
    """What shall be otherwise; None stays as it is."""

    dp: int | None = None
    pp: int | None = None
    tp: int | None = None
    batch: int | None = None
    """Samples of a step."""
    micro_batches: int | None = None
    micro_batch: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    recompute: str | None = None
    memory: int | None = None
    """Bytes a rank may use."""
    hardware: Hardware | None = None
    bandwidth: float | None = None
    """Bytes per second of every link."""
    inter_bandwidth: float | None = None
    """Bytes per second of the links between nodes."""
    latency: float | None = None
    """Seconds of every link."""

    @property
    def given(self) -> Mapping[str, Any]:
        """What is otherwise, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {name: value for name, value in named.items() if value is not None}
        return {name: value.name if isinstance(value, Hardware) else value for name, value in found.items()}

    def mesh(self, mesh: Mesh) -> Mesh:
        """The degrees."""
        return Mesh(self.dp or mesh.dp, self.pp or mesh.pp, self.tp or mesh.tp)

    def machine(self, before: Hardware) -> Hardware:
        """The hardware, with its links."""
        machine = self.hardware or before

        def link(old: Link, *rates: float | None) -> Link:
            rate = next((rate for rate in rates if rate is not None), old.bandwidth)
            return Link(rate, old.latency if self.latency is None else self.latency)

        inter = link(machine.inter, self.inter_bandwidth, self.bandwidth)
        changed = replace(machine, intra=link(machine.intra, self.bandwidth), inter=inter)
        return machine if changed == machine else replace(changed, name=f"{machine.name} with other links")


@dataclass(frozen=True)
class WhatIf:
    """The plan's own stages under the conditions, and the plan made for them."""

    conditions: Mapping[str, Any]
    kept_seconds: float | None
    """A step with the plan's own stages; None where they cannot stay."""
    kept_why: str
    """Why they cannot; empty where they can."""
    planned: Plan
    difference: Difference

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "conditions": dict(self.conditions),
            "kept_seconds": self.kept_seconds,
            "kept_why": self.kept_why,
            "planned": self.planned.digest,
            "difference": asdict(self.difference),
        }


def what_if(plan: Plan, conditions: Conditions) -> WhatIf:
    """Plan again under other conditions.

    Raises ValueError where nothing is asked for, the plan does not hold what it was made from, or nothing fits.
    """
    if not conditions.given:
        raise ValueError("nothing was to be otherwise: give --memory, --batch, --hardware, --bandwidth, --pp, ...")
    changes = _changes(plan, conditions)
    made = plan_again(plan, **changes)
    seconds, why = _kept(plan, conditions, made)
    return WhatIf(conditions.given, seconds, why, made, difference(plan, made))


def _changes(plan: Plan, conditions: Conditions) -> dict[str, Any]:
    """The arguments of ``make_plan``. What the user chose before stays chosen, unless it is about the same thing."""
    options = basis_of(plan).options
    mesh, changes = conditions.mesh(plan.mesh), dict[str, Any]()
    hardware = conditions.machine(basis_of(plan).hardware)
    changes["mesh"], changes["hardware"] = mesh, hardware
    changes["batch"] = samples(plan) if conditions.batch is None else conditions.batch
    for name in ("schedule", "recompute"):
        if (value := getattr(conditions, name)) is not None:
            changes[name] = value
    if conditions.schedule is not None or conditions.chunks is not None:
        changes["chunks"] = conditions.chunks
    if conditions.memory is not None:
        changes["memory_limit"] = conditions.memory
    elif conditions.hardware is not None:
        changes["memory_limit"] = None  # what the other hardware can use
    if conditions.micro_batches is not None or conditions.micro_batch is not None:
        changes |= {"micro_batches": conditions.micro_batches, "micro_batch": conditions.micro_batch}
    elif options.get("micro_batches") and (changes["batch"], mesh) != (samples(plan), plan.mesh):
        # a number of micro-batches was right for its batch: what stays is their size, which is what the memory sees
        changes |= {"micro_batches": None, "micro_batch": plan.micro_batch}
    return changes


def _kept(plan: Plan, conditions: Conditions, made: Plan) -> tuple[float | None, str]:
    """The plan's own stages where they are possible: as many ranks, stages and samples of a micro-batch."""
    basis = basis_of(plan)
    if conditions.mesh(plan.mesh).pp != plan.mesh.pp or made.stage_rank != plan.stage_rank:
        return None, "other stages are needed"
    if plan.orders or made.orders:
        return None, "the order was built for the plan's own costs"
    changed = replace(
        plan, mesh=made.mesh, schedule=made.schedule, micro_batches=made.micro_batches, micro_batch=made.micro_batch,
        memory_limit=made.memory_limit,
        basis=basis.remembering(basis.source, **(made.basis or basis).options),
    )  # fmt: skip
    try:
        after = made.step_seconds - Again.of(made).judged.timeline.makespan
        return Again.of(changed).judged.timeline.makespan + after, ""
    except ValueError as error:
        return None, "they do not fit the memory" if "memory" in str(error) else str(error)


def trace_again(plan: Plan, **options: Any) -> str:
    """The command that makes the plan from a new trace, for what cannot be known from the old one."""
    source, mesh = {n: w for n, w in basis_of(plan).source.items() if n != "alternatives"}, plan.mesh
    words = {**source, "dp": mesh.dp, "pp": mesh.pp, "tp": mesh.tp, "batch": samples(plan), "schedule": plan.schedule}
    words |= {"micro-batch": plan.micro_batch, "hardware": plan.hardware, **options}
    model = words.pop("model", "MODEL")
    told = (f"--{name} {f'{value!r}' if ' ' in str(value) else value}" for name, value in words.items())
    return f"merak plan {model} {' '.join(told)}"
