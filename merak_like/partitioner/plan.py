"""The plan: every decision about one training job, frozen, printable, diffable, with a digest. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from merak_like.partitioner.basis import Basis
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.sharding import GroupBytes, ShardedBlock

VERSION = 3
"""Version of the JSON; a plan of another version is refused, not guessed at."""

DERIVED = ("digest", "step_seconds", "mfu", "memory_bytes")
"""In the JSON for whoever reads it; they follow from the rest."""
LIVE = ("activations", "boundary", "logits")
"""Kinds of memory that come and go with the micro-batches."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """A value that leaves the stage that makes it, once for each stage that reads it."""

    value: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    source: int
    targets: tuple[int, ...]
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a stage on its rank at the stage's fullest moment."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Kept for the backward, or for what is put off, by all live micro-batches."""
    boundary: int = 0
    """Values received from and sent to other stages, for all live micro-batches."""
    logits: int = 0
    """Of ``activations`` apart: what is kept of and after the last product with a weight matrix, the output layer."""
    workspace: int = 0
    """For a moment: what one op needs, and the gradients of one micro-batch's boundary."""

    @property
    def live(self) -> int:
        """What comes and goes with the micro-batches."""
        return self.activations + self.boundary + self.logits

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the model as people see it (an embedding, an attention, a feed-forward), for tables and pictures."""

    name: str
    type: str
    block: str
    """The repeated module it belongs to, or its own name."""
    stage: int
    first: int
    stop: int
    flops: int
    seconds: float
    """Forward and backward of one micro-batch."""
    param_bytes: int
    activation_bytes: int
    reads: tuple[int, ...]
    """Indices of the units whose values it reads."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One pipeline stage: ops ``start <= i < stop`` of the proxy graph."""

    index: int
    rank: int
    """The pipeline rank that runs it; a rank may run several stages."""
    start: int
    stop: int
    blocks: tuple[str, ...]
    params: tuple[str, ...]
    """First names of the parameters this stage reads."""
    buffers: tuple[str, ...]
    param_count: int
    flops: int
    """Forward flops of one micro-batch."""
    forward_seconds: float
    backward_seconds: float
    """The whole backward, without recompute."""
    weight_seconds: float
    """The part of the backward that can be put off: gradients of weights."""
    recompute_seconds: float
    """The forward of what is recomputed."""
    live_micro_batches: int
    recompute: tuple[str, ...]
    """Names of the units whose activations are not kept but computed again before the backward."""
    memory: StageMemory


@dataclass(frozen=True)
class Plan:
    """Everything that was decided. ``Plan.load`` and ``save`` round-trip exactly; ``digest`` names the content.

    ``micro_batch`` is samples per micro-batch and replica; one step trains ``mesh.dp * micro_batches * micro_batch``
    samples. ``signature`` describes the example the model was traced with.
    """

    model: str
    mesh: Mesh
    schedule: str
    """Name of the schedule."""
    orders: tuple[str, ...]
    """Each rank's computations in order (``F0.0 F1.0 B0.0 ..``); empty where the name alone says them."""
    micro_batches: int
    micro_batch: int
    stages: tuple[StagePlan, ...]
    crossings: tuple[Crossing, ...]
    units: tuple[Unit, ...]
    ties: tuple[tuple[str, ...], ...]
    shared: Mapping[str, tuple[int, ...]]
    """Parameters (first names) that stand on several stages, whose gradients are summed over those stages."""
    hardware: str
    memory_limit: int
    """Bytes a rank may use."""
    rank_activation_bytes: tuple[int, ...]
    """Bytes of all live micro-batches on each pipeline rank at its fullest moment, by simulation."""
    pipeline_seconds: float
    """Simulated seconds from the first forward to the last backward."""
    after: Mapping[str, float]
    """Estimated seconds after that: ``reduction`` over replicas, of ``ties``, the ``optimizer``, the ``host``."""
    bubble: float
    """Idle fraction of ``pipeline_seconds``."""
    zero: int = 0
    """ZeRO level: replicas share the optimizer's state (1), gradients (2), weights (3)."""
    sequence_parallel: bool = False
    """Whether what every tensor-parallel rank would have is divided along the sequence."""
    peak_flops: float = 0.0
    """Floating-point operations per second of one device, in the dtype of most weights."""
    software: str = "torch"
    """Kernels that the costs are for: ``torch``, or ``fused`` with ``flash`` or ``math`` attention."""
    signature: Mapping[str, str] = field(default_factory=dict[str, str])
    notes: tuple[str, ...] = ()
    """Why: what was compared, what binds, what was assumed."""
    sharding: tuple[ShardedBlock, ...] = ()
    """What tensor parallelism does to each distinct block; empty with tp = 1."""
    version: int = VERSION
    basis: Basis | None = field(default=None, compare=False, repr=False)
    """What it was made from, where that is known; not in the digest."""

    @property
    def step_seconds(self) -> float:
        """Estimated seconds of one step."""
        return self.pipeline_seconds + sum(self.after.values())

    @property
    def step_flops(self) -> float:
        """Floating-point operations of one step, a backward taken for two forwards; recompute does not count."""
        return 3.0 * sum(stage.flops for stage in self.stages) * self.micro_batches * self.mesh.dp

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of all devices' peak that ``step_flops`` take (Chowdhery et al. 2022)."""
        able = self.peak_flops * self.mesh.size * self.step_seconds
        return self.step_flops / able if able else 0.0

    @property
    def memory_bytes(self) -> tuple[dict[str, int], ...]:
        """Bytes of each pipeline rank at its fullest moment, by kind, and their ``total``."""
        kinds = [f.name for f in fields(StageMemory)]
        made = [dict.fromkeys(kinds, 0) for _ in range(self.mesh.pp)]
        for stage in self.stages:
            for kind in kinds:
                made[stage.rank][kind] += getattr(stage.memory, kind)
        for rank, live in enumerate(self.rank_activation_bytes):  # its stages need not be fullest together
            apart = sum(made[rank][kind] for kind in LIVE)
            made[rank] |= {kind: made[rank][kind] * live // max(apart, 1) for kind in LIVE}
            made[rank]["total"] = sum(made[rank].values())
        return tuple(made)

    @property
    def starts(self) -> tuple[int, ...]:
        """First op of each stage, and the end: stage s owns ``ops[starts[s]:starts[s + 1]]``."""
        return (*(s.start for s in self.stages), self.stages[-1].stop)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal digests, equal plans."""
        return hashlib.sha256(json.dumps(self._decided(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def _decided(self) -> dict[str, Any]:
        """All fields but the basis, as JSON has them."""
        data = asdict(replace(self, basis=None))
        del data["basis"]
        return data

    def to_json(self, *, indent: int | None = 1) -> str:
        """The plan as JSON, with its digest."""
        said = {name: getattr(self, name) for name in DERIVED}
        basis = self.basis and self.basis.data()
        return json.dumps({**said, **self._decided(), "basis": basis}, indent=indent)

    def save(self, path: str | Path) -> None:
        """Write the JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str, *, edited: bool = False) -> Plan:
        """Read a plan.

        Raises ValueError for another version, a missing or unknown field, or a digest that does not fit the content
        (pass ``edited=True`` to accept a plan edited by hand).
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is not a plan: {error}") from None
        if not isinstance(data, dict) or "version" not in data or "stages" not in data:
            raise ValueError("this is not a plan: a plan is a JSON object with 'version' and 'stages'")
        data = cast(dict[str, Any], data)
        if data["version"] != VERSION:
            raise ValueError(f"plan version {data['version']} cannot be read, only {VERSION}: make the plan again")
        basis = data.pop("basis", None)
        digest, *_ = (data.pop(name, None) for name in DERIVED)
        plan = _build(cls, {**data, "basis": None}, "plan")
        if not edited and digest != plan.digest:
            raise ValueError(
                f"the plan's digest is {plan.digest[:12]} but the file says {str(digest)[:12]}: it was edited or "
                "damaged; load it as edited if you mean it"
            )
        return plan if basis is None else replace(plan, basis=Basis.of_data(basis))

    @classmethod
    def load(cls, path: str | Path, *, edited: bool = False) -> Plan:
        """Read a plan from a file; see ``from_json``."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"), edited=edited)

    @property
    def stage_rank(self) -> tuple[int, ...]:
        """The pipeline rank that runs each stage."""
        return tuple(s.rank for s in self.stages)

    @property
    def rank_bytes(self) -> tuple[int, ...]:
        """Bytes of each pipeline rank at its fullest moment; the stages of a rank need not be fullest together."""
        total = list(self.rank_activation_bytes)
        for stage in self.stages:
            total[stage.rank] += stage.memory.total - stage.memory.live
        return tuple(total)

    def with_notes(self, notes: Sequence[str]) -> Plan:
        """The same plan with more reasons attached."""
        return replace(self, notes=(*self.notes, *notes))


_NESTED: Mapping[tuple[Any, str], Any] = {
    (Plan, "stages"): StagePlan, (Plan, "crossings"): Crossing, (Plan, "units"): Unit, (Plan, "sharding"): ShardedBlock,
    (ShardedBlock, "groups"): GroupBytes,
}  # fmt: skip


def _build(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    """Make a frozen dataclass from JSON data: lists become tuples, nested objects their own types."""
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{where} has unknown fields {unknown}")
    if missing := sorted(known - set(data)):
        raise ValueError(f"{where} lacks the fields {missing}")
    made: dict[str, Any] = {}
    for name, item in data.items():
        if nested := _NESTED.get((kind, name)):
            made[name] = tuple(_build(nested, row, f"{where}.{name}[{i}]") for i, row in enumerate(item))
        elif name == "mesh":
            made[name] = _build(Mesh, item, f"{where}.mesh")
        elif name == "memory":
            made[name] = _build(StageMemory, item, f"{where}.memory")
        else:
            made[name] = _frozen(item)
    return kind(**made)


def _frozen(item: Any) -> Any:
    if isinstance(item, list):
        return tuple(_frozen(x) for x in cast(list[Any], item))
    if isinstance(item, dict):
        return {key: _frozen(value) for key, value in cast(dict[str, Any], item).items()}
    return item
