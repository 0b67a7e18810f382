"""From a question on the command line to a plan: trace, then plan one layout, or search all that are possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from merak_like.cli.models import FromConfig, Source
from merak_like.partitioner.degrees import Ranked, choose
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.layouts import Wanted
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.schedules.action import known
from merak_like.partitioner.sharding import ShardedBlock
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import STATES, StateBytes

if TYPE_CHECKING:
    from merak_like.cli.models import Loaded
    from merak_like.partitioner.coding import Coding

STEP = 4
"""Samples of a step for each pipeline rank, when nobody says."""
ROOM = 2**60
"""Bytes: no limit."""


@dataclass(frozen=True)
class Question:
    """What is asked for; None leaves it to the planner."""

    source: Source
    hardware: Hardware
    world: int | None = None
    dp: int | None = None
    pp: int | None = None
    tp: int | None = None
    batch: int | None = None
    micro_batches: int | None = None
    micro_batch: int | None = None
    schedule: str | None = None
    chunks: int | None = None
    recompute: str | None = None
    zero: int | None = None
    sequence_parallel: bool | None = None
    kernels: str = "torch"
    attention: str = "flash"
    optimizer: str | None = None
    memory_limit: int | None = None
    codec: str | None = None

    def __post_init__(self) -> None:
        if self.recompute is not None:
            known(self.recompute, "recompute", ("auto", "none", "selective", "full", "blocks"))

    @property
    def mesh(self) -> Mesh | None:
        """The mesh, if nothing of it is left open."""
        if self.dp and self.pp and self.tp:
            return Mesh(self.dp, self.pp, self.tp)
        return None

    @property
    def software(self) -> Software:
        """What runs on the devices."""
        return Software(self.kernels, self.attention, self.scores_again)

    @property
    def scores_again(self) -> bool:
        """Whether attention scores are computed again; flash attention never keeps them."""
        return self.recompute == "selective" and not (self.kernels == "fused" and self.attention == "flash")

    @property
    def again(self) -> str:
        """What is computed again, in the planner's words: fused trainers do it a block at a time."""
        named = self.recompute or "auto"
        return {"selective": "none", "full": "blocks" if self.kernels == "fused" else "full"}.get(named, named)

    @property
    def states(self) -> StateBytes:
        """What the optimizer keeps."""
        name = self.optimizer or ("adamw-megatron" if self.kernels == "fused" else "adamw")
        return STATES[known(name, "optimizer", STATES)]

    def coding(self, loaded: Loaded) -> Coding | None:
        """What transfers between stages shrink to. Raises ValueError for a codec that pipelines cannot use."""
        if self.codec is None:
            return None
        from merak_like.runtime.coded_links import coding_of, link_codec

        return coding_of(link_codec(self.codec, self.pp), loaded.model)

    @property
    def decided(self) -> bool:
        """Whether nothing is left that could be chosen so that it fits the memory."""
        sized = self.micro_batch or self.micro_batches
        return self.mesh is not None and bool(sized) and self.recompute not in (None, "auto")

    @cached_property
    def loaded_source(self) -> Source:
        """The model's source; where the config names no dtype, in that which fused trainers use on the device."""
        source, fused = self.source, self.kernels == "fused"
        if isinstance(source, FromConfig) and source.dtype is None and fused and not source.says_dtype:
            return replace(source, dtype="bfloat16" if "bfloat16" in self.hardware.peak_flops else "float16")
        return source


def decide(asked: Question) -> tuple[Plan, Sequence[Ranked]]:
    """The plan, and the layouts it was chosen from where any were compared.

    Raises ValueError for what cannot be.
    """
    mesh = asked.mesh
    if mesh is not None and asked.world not in (None, mesh.size):
        raise ValueError(
            f"{mesh} is {mesh.size} devices, but --world is {asked.world}: leave one of the degrees out, or use "
            f"--world {mesh.size}"
        )
    if mesh is not None and mesh.tp == 1 and asked.kernels == "torch":
        return _as_written(asked, mesh), ()
    if mesh is None:
        return _searched(asked, *_sources(asked, 1))
    batch = STEP * mesh.dp * mesh.pp if asked.batch is None else asked.batch
    size = asked.micro_batch or (batch // mesh.dp // asked.micro_batches if asked.micro_batches else 1)
    made = _planned(asked, mesh, batch, size)
    if made.micro_batch == size or not isinstance(asked.source, FromConfig):
        return made, ()
    again = _planned(replace(asked, micro_batch=made.micro_batch), mesh, batch, made.micro_batch)
    return again.with_notes([note for note in made.notes if note.startswith("numbers of micro-batches")]), ()


def remembering(made: Plan, asked: Question, ranked: Sequence[Ranked]) -> Plan:
    """The plan with what was asked for, the words that named the model, and the layouts it was chosen from."""
    if made.basis is None:
        return made
    source = dict(asked.loaded_source.words)
    if ranked:
        source["alternatives"] = [
            {
                **asdict(row.layout.mesh), "micro_batches": row.layout.micro_batches, "step_seconds": row.step_seconds,
                "why": _lost(row, made),
            }
            for row in ranked[1:]
        ]  # fmt: skip
    basis = made.basis.remembering(source, micro_batches=asked.micro_batches, micro_batch=asked.micro_batch)
    return replace(made, basis=basis)


def _lost(row: Ranked, made: Plan) -> str:
    layout = row.layout
    told = f"{layout.schedule}, micro-batches of {layout.micro_batch}, recompute {layout.recompute}, ZeRO {layout.zero}"
    if row.plan is None:
        return f"{told}: estimated only"
    after, own = sum(row.plan.after.values()), sum(made.after.values())
    worst = max(
        ("waits more", row.plan.bubble - made.bubble), ("takes longer after the pipeline", after - own),
        ("computes slower", row.plan.pipeline_seconds - made.pipeline_seconds), key=lambda one: one[1],
    )  # fmt: skip
    return f"{told}: {worst[0]}"


def _planned(asked: Question, mesh: Mesh, batch: int, samples: int) -> Plan:
    """One mesh, traced with so many samples."""
    loaded, sources = _sources(asked, max(samples, 1))
    shown = asked.decided and asked.memory_limit is None
    made = make_plan(
        sources.base(mesh.tp), mesh, hardware=asked.hardware, batch=batch, micro_batches=asked.micro_batches,
        micro_batch=asked.micro_batch, schedule=asked.schedule or "1f1b", chunks=asked.chunks, recompute=asked.again,
        memory_limit=ROOM if shown else asked.memory_limit, states=asked.states, zero=asked.zero or 0,
        sequence_parallel=bool(asked.sequence_parallel), sources=sources, software=asked.software,
        sharding=_sharding(loaded, mesh.tp), signature=_signature(loaded.example), coding=asked.coding(loaded),
    )  # fmt: skip
    return _with_room(replace(made, memory_limit=asked.hardware.memory_limit)) if shown else made


def _with_room(made: Plan) -> Plan:
    """A plan of which everything was given: it is shown although it may not fit, and says so."""
    notes = tuple(note for note in made.notes if f"{ROOM / 1e9:.3g} GB" not in note)
    fullest = max(made.rank_bytes)
    over = f", {(fullest - made.memory_limit) / 1e9:.1f} GB more than fits" if fullest > made.memory_limit else ""
    told = f"the fullest rank takes {fullest / 1e9:.3g} of {made.memory_limit / 1e9:.3g} GB{over}"
    return replace(made, notes=(*notes, told))


def _searched(asked: Question, loaded: Loaded, sources: Sources) -> tuple[Plan, Sequence[Ranked]]:
    if asked.world is None:
        raise ValueError("give --world, the number of devices to choose for, or all of --dp, --pp and --tp")
    wanted = Wanted(
        asked.world, asked.batch or STEP * asked.world, asked.dp, asked.pp, asked.tp, asked.micro_batch,
        asked.micro_batches, asked.schedule, asked.chunks,
        None if asked.recompute in (None, "auto") else "selective" if asked.scores_again else asked.again,
        asked.zero, asked.sequence_parallel, asked.memory_limit, coding=asked.coding(loaded),
    )  # fmt: skip
    software = replace(asked.software, selective=False)
    ranked = choose(sources, wanted, asked.hardware, software, states=asked.states)
    plan = ranked[0].plan
    assert plan is not None, "the first one is planned"
    proven = _sharding(loaded, plan.mesh.tp)
    return replace(plan, sharding=proven, signature=_signature(loaded.example)), ranked


def _sharding(loaded: Loaded, tp: int) -> tuple[ShardedBlock, ...]:
    """How the model lies on so many ranks, proven block by block."""
    from merak_like.partitioner.tensor_parallel.describe import sharded

    return sharded(loaded.model, loaded.example, loaded.loss_fn, tp)[1] if tp > 1 else ()


def _sources(asked: Question, samples: int) -> tuple[Loaded, Sources]:
    loaded = asked.loaded_source.load(samples)
    return loaded, Sources.of(loaded.model, loaded.example, loaded.loss_fn)


def _as_written(asked: Question, mesh: Mesh) -> Plan:
    """Plan the model's own calls. One that can be traced at any size is traced again at the size chosen."""
    source, batch = asked.loaded_source, STEP * mesh.dp * mesh.pp if asked.batch is None else asked.batch
    size = asked.micro_batch or (batch // mesh.dp // asked.micro_batches if asked.micro_batches else 1)

    def plan(samples: int, micro_batches: int | None, micro_batch: int | None) -> Plan:
        from merak_like.partitioner.tracer import trace

        loaded = source.load(max(samples, 1))
        return make_plan(
            trace(loaded.model, loaded.example, loaded.loss_fn).graph, mesh, hardware=asked.hardware, batch=batch,
            micro_batches=micro_batches, micro_batch=micro_batch, schedule=asked.schedule or "1f1b",
            chunks=asked.chunks, recompute=asked.again, memory_limit=asked.memory_limit, states=asked.states,
            zero=asked.zero or 0, sequence_parallel=bool(asked.sequence_parallel), software=asked.software,
            signature=_signature(loaded.example), coding=asked.coding(loaded),
        )  # fmt: skip

    made = plan(size, asked.micro_batches, asked.micro_batch)
    if made.micro_batch == size or not isinstance(source, FromConfig):
        return made
    again = plan(made.micro_batch, made.micro_batches, None)
    return again.with_notes([note for note in made.notes if note.startswith("numbers of micro-batches")])


def _signature(example: Any) -> dict[str, str]:
    """The tensors of an example by name."""
    items = (
        example.items()
        if isinstance(example, dict)
        else enumerate(example if isinstance(example, tuple) else (example,))
    )
    return {
        str(name): f"{str(item.dtype).removeprefix('torch.')}{list(item.shape)}"
        for name, item in items
        if hasattr(item, "dtype")
    }
