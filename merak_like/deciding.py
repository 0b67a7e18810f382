"""From what a call asks for to its plan: how the model is divided, recorded and cut.

``auto_parallel`` decides so on every rank; a dry run does in one process, without ranks and without a weight.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from merak_like.choosing import best_layout, form_of, level_of
from merak_like.partitioner.executable import ENGINE
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.keeping import Ways, blocks, by_stage, chosen
from merak_like.partitioner.layouts import Wanted
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.this_machine import this_machine
from merak_like.partitioner.tracer import LossFn, Trace
from merak_like.runtime import four_bit
from merak_like.runtime.batches import rows, signature, split, to_device
from merak_like.runtime.coded_links import coding_of, link_codec
from merak_like.runtime.fully_sharded import Whole
from merak_like.runtime.methods.by_blocks import AUTO, ByBlocks
from merak_like.runtime.methods.method import Job, Method, Methods
from merak_like.runtime.precision import Precision, precision_of
from merak_like.runtime.spreading import Spreading, spreading_of
from merak_like.runtime.tensor_parallel.sharding import Proof, Sharding, sharding


def micro_batch(example: Any, mesh: Mesh, micro_batches: int) -> Any:
    """The first of a batch's, on the CPU."""
    return to_device(split(example, mesh.dp * micro_batches)[0], torch.device("cpu"))


def divided(
    model: nn.Module, loss_fn: LossFn | None, mesh: Mesh, spread: Spreading, *, recompute: str, tp_shares: int,
    sequence_parallel: bool, fuse: bool,
) -> tuple[Sharding, str]:  # fmt: skip
    """How a model lies over the ranks of a stage, and what is then computed again."""
    four_bit.refuse(model, mesh.tp, spread.zero)
    if spread.weights and mesh.dp > 1:
        return Whole(model, loss_fn), "none" if recompute == "auto" else recompute
    return sharding(model, mesh.tp, loss_fn, tp_shares, sequence_parallel, fuse), recompute


def cut(
    parts: Sharding, rough: Trace, micro: Any, example: Any, mesh: Mesh, micro_batches: int | None, proof: Proof,
    methods: Sequence[Method] = (), **choices: Any,
) -> tuple[Plan, Trace, Any]:  # fmt: skip
    """The plan for a batch like the example, and the micro-batch of it with its trace. ``choices`` are ``make_plan``'s.

    It is made again where it chooses another number of micro-batches: one sample may run fewer ops than many.
    """
    decide = partial(_plan, mesh=mesh, samples=rows(example), sharding=proof.sharding, **choices)
    plan = decide(parts.graph(rough), micro_batches)
    if signature(chosen := micro_batch(example, mesh, plan.micro_batches)) != signature(micro):
        micro, rough = chosen, parts.trace(chosen, "cpu")
        compared = [note for note in plan.notes if note.startswith("numbers of micro-batches")]
        plan = decide(parts.graph(rough), plan.micro_batches).with_notes(compared)
    notes = [method.note for method in methods if method.note]
    return (plan.with_notes(notes) if notes else plan), rough, micro


def settled(
    methods: Sequence[Method], model: nn.Module, loss_fn: LossFn | None, example: Any, mesh: Mesh,
    micro_batches: int | None, spread: Spreading, precise: Precision, *, on_cpu: bool, schedule: str, fuse: bool,
    **choices: Any,
) -> tuple[tuple[Method, ...], tuple[str, ...]]:  # fmt: skip
    """The methods, those that leave their blocks open with the blocks that are best, or left out where there are none;
    and that as sentences for the plan.

    On a CPU nothing goes from one memory to another. Raises ValueError as ``Methods`` does.
    """
    job = Job(schedule, mesh.tp, 1, spread.zero, precise.compute is not None)
    ways = [method for method in methods if isinstance(method, ByBlocks) and method.blocks == AUTO]
    rest = tuple(method for method in methods if method not in ways)
    if ways:
        Methods(methods, job)
    told = [f"{type(way).__name__}('auto') takes no block: on a CPU both memories are one"
            for way in ways if on_cpu and way.between_memories]  # fmt: skip
    ways = [way for way in ways if not (on_cpu and way.between_memories)]
    ways.sort(key=lambda way: not way.between_memories)
    if not ways:
        return rest, tuple(told)
    parts = Methods(rest, job).around(sharding(model, 1, loss_fn, fuse=fuse), model)
    rough = parts.trace(micro_batch(example, mesh, micro_batches or 1), "cpu")
    everywhere = [call.path for call in blocks(rough.graph)]
    decide = partial(
        _plan, micro_batches=micro_batches, mesh=mesh, samples=rows(example), schedule=schedule, zero=spread.zero,
        states=precise.states(elsewhere=spread.offload), thorough=False, **choices,
    )  # fmt: skip

    def plan(kept: Sequence[Collection[str]]) -> Plan | None:
        graph = rough.graph
        for way, paths in zip(ways, kept, strict=True):
            graph = way.planned(graph, tuple(sorted(paths)))
        try:
            return decide(graph)
        except ValueError:
            return None

    def seconds(kept: Ways) -> float:
        made = plan(kept)
        return made.step_seconds if made is not None else float("inf")

    nothing: list[Collection[str]] = [()] * len(ways)
    first = plan(nothing) or plan([everywhere, *nothing[1:]])
    if first is None:
        return rest, tuple(told)  # nothing helps: the plan will say what is missing
    kept = chosen(by_stage(rough.graph, first.starts), len(ways), seconds)
    found = [way.of(sorted(some, key=everywhere.index)) for way, some in zip(ways, kept, strict=True) if some]
    told += [
        f"{type(way).__name__}('auto') takes no block: nothing is gained by it"
        for way, some in zip(ways, kept, strict=True)
        if not some
    ]
    return (*rest, *found), tuple(told)


def alone(
    model: nn.Module, mesh: Mesh, example: Any, *, loss_fn: LossFn | None = None, schedule: str = "1f1b",
    chunks: int | None = None, recompute: str = "auto", micro_batches: int | None = None,
    sequence_parallel: bool | str = False, tp_shares: int = 1, fuse: bool = True, zero: int | str = 0,
    zero_backend: str | None = None, precision: str | Precision | None = None, methods: Sequence[Method] = (),
    hardware: Any = None, memory_limit: int | None = None, codec: str | None = None,
) -> Plan:  # fmt: skip
    """The plan that ``auto_parallel`` makes with these arguments and an optimizer, decided in this process."""
    precise, device = precision_of(precision), hardware or this_machine()
    level, form = level_of(zero, zero_backend, True), form_of(sequence_parallel)
    wire = link_codec(codec, mesh.pp)
    if not model.training:
        model.train()
    with precise.applied(model):
        example, coding = precise.inputs(example), coding_of(wire, model)
        if level is None or form is None:
            wanted = Wanted(
                mesh.size, rows(example), mesh.dp, mesh.pp, mesh.tp, micro_batches=micro_batches, schedule=schedule,
                chunks=chunks, recompute=None if recompute == "auto" else recompute, zero=level,
                sequence_parallel=form, memory_limit=memory_limit, executable=ENGINE, coding=coding,
            )  # fmt: skip
            layout = best_layout(model, example, loss_fn, wanted, device, precise.states())
            micro_batches, recompute = layout.micro_batches, layout.recompute
            level, form = layout.zero, layout.sequence_parallel
        spread = spreading_of(level, zero_backend, mesh)
        methods, told = settled(
            methods, model, loss_fn, example, mesh, micro_batches, spread, precise, schedule=schedule, chunks=chunks,
            recompute=recompute, hardware=device, memory_limit=memory_limit, fuse=fuse,
            coding=coding, on_cpu=(device if isinstance(device, str) else device.name).startswith("cpu"),
        )  # fmt: skip
        job = Job(schedule, mesh.tp, tp_shares, spread.zero, precise.compute is not None)
        parts, recompute = divided(
            model, loss_fn, mesh, spread, recompute=recompute, tp_shares=tp_shares, sequence_parallel=form, fuse=fuse
        )
        parts = Methods(methods, job).around(parts, model)
        micro = micro_batch(example, mesh, micro_batches or 1)
        rough = parts.trace(micro, "cpu")
        proof = parts.prove(rough, micro)
        parts.believe(proof)
        return cut(
            parts, rough, micro, example, mesh, micro_batches, proof, methods, schedule=schedule, chunks=chunks,
            recompute=recompute, hardware=device, memory_limit=memory_limit, zero=spread.zero,
            sequence_parallel=form, states=precise.states(elsewhere=spread.offload), coding=coding,
        )[0].with_notes(told)  # fmt: skip


def _plan(graph: ProxyGraph, micro_batches: int | None, *, mesh: Mesh, samples: int, **choices: Any) -> Plan:
    """Plan for the example's batch, rounded up to whole micro-batches."""
    parts = mesh.dp * (micro_batches or 1)
    return make_plan(graph, mesh, batch=-(-samples // parts) * parts, micro_batches=micro_batches, **choices)
