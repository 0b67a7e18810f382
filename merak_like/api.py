"""``auto_parallel``: the straight line from a model to an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like import __version__
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Hardware
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.this_machine import this_machine
from merak_like.partitioner.tracer import LossFn
from merak_like.runtime import collect
from merak_like.runtime.batches import LossWeight, rows, signature, split, to_device
from merak_like.runtime.data_parallel import Reducer
from merak_like.runtime.engine import Engine
from merak_like.runtime.groups import make_groups
from merak_like.runtime.initialize import join
from merak_like.runtime.links import DistLinks, NoLinks
from merak_like.runtime.materialize import Initialiser, materialize
from merak_like.runtime.programs import Programs
from merak_like.runtime.tensor_parallel.sharding import sharding
from merak_like.runtime.watch import Watch

Degree = int | str
Save = Callable[[nn.Module, Path, Mapping[str, Tensor]], None]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def auto_parallel(
    model: nn.Module,
    dp: Degree = 1,
    pp: Degree = 1,
    tp: Degree = 1,
    *,
    example: Any,
    loss_fn: LossFn | None = None,
    optimizer: OptimizerFactory | None = None,
    schedule: str = "1f1b",
    chunks: int | None = None,
    recompute: str = "auto",
    micro_batches: int | None = None,
    sequence_parallel: bool = False,
    max_grad_norm: float | None = None,
    loss_weight: LossWeight | None = None,
    weights: str | Path | None = None,
    plan: Plan | None = None,
    hardware: Hardware | str | None = None,
    memory_limit: int | None = None,
    tp_shares: int = 1,
    device: torch.device | str | None = None,
    timeout: float = 600.0,
    seed: int = 0,
) -> Engine:
    """Train an unmodified model over ``dp x pp`` ranks started by torchrun, with the numbers of one process.

    Call it on every rank with the same arguments; without torchrun it is one process, 1 x 1 x 1.

    ``example`` is one whole batch, as ``engine.step`` will get it; it is cut along dimension 0 into
    ``dp * micro_batches`` micro-batches. The model gives its own loss, or ``loss_fn(outputs, batch)`` does. The model
    may be on the meta device: each rank then makes or reads (``weights``) only its own part. ``optimizer`` is called
    with this rank's parameters. ``loss_weight(micro_batch)`` counts the items that a micro-batch's loss is the mean of:
    by default target tokens for Hugging Face language models, else samples. ``schedule``, ``chunks`` (stages per rank,
    for "interleaved") and ``recompute`` ("auto": what memory asks for, "none", "full") are those of ``make_plan``.
    ``tp_shares`` of 2 or more runs each micro-batch in so many parts, the sums over tensor-parallel ranks of one part
    under the compute of another. ``sequence_parallel`` divides activations outside of sharded weights among these ranks
    too, by rows. ``plan`` obeys a plan made before. ``timeout`` in seconds limits every wait for another rank.

    Raises ValueError, with the nearest thing that works, for degrees that do not fit the job, a model that cannot be
    traced or cut, memory that does not suffice, and ranks that do not agree.
    """
    mesh = Mesh(*(_degree(axis, degree) for axis, degree in (("dp", dp), ("pp", pp), ("tp", tp))))
    world = join(mesh, timeout=timeout, device=device)
    if not model.training:
        model.train()
    watch = Watch(world.rank, world.timeout, world.pulse)
    with watch.starting():
        if plan is None and hardware is None:  # one measurement for all, or each rank would plan for itself
            measure = partial(this_machine, device=world.device.type) if world.rank == 0 else None
            hardware = collect.from_first(measure, world, watch)
        if plan is not None and plan.mesh != mesh:
            raise ValueError(
                f"the plan is for {plan.mesh}, asked for {mesh}: make the plan again or change the degrees"
            )
        micro = _micro_batch(example, mesh, plan.micro_batches if plan else micro_batches or 1)
        parts = sharding(model, mesh.tp, loss_fn, tp_shares, sequence_parallel)
        # on the CPU whatever the device, so that a plan does not depend on where it was made
        rough = parts.trace(micro, "cpu")
        graph = parts.graph(rough)
        if plan is None:
            decide = partial(
                _plan, mesh=mesh, samples=rows(example), schedule=schedule, chunks=chunks, recompute=recompute,
                hardware=hardware or "a100-80gb", memory_limit=memory_limit,
            )  # fmt: skip
            plan = decide(graph, micro_batches)
            if signature(chosen := _micro_batch(example, mesh, plan.micro_batches)) != signature(micro):
                # again for the micro-batches it chose: one sample may run fewer ops than many
                micro, rough = chosen, parts.trace(chosen, "cpu")
                compared = [note for note in plan.notes if note.startswith("numbers of micro-batches")]
                plan = decide(parts.graph(rough), plan.micro_batches).with_notes(compared)
        facts = {"plan": plan.digest, "merak_like": __version__, "torch": torch.__version__}
        asked = {"seed": seed, "max_grad_norm": max_grad_norm, "sequence_parallel": sequence_parallel}
        collect.agree(facts | {key: str(value) for key, value in asked.items()}, world, watch)
        if world.device.type != "cpu":
            rough = parts.trace(micro, world.device)
        if plan.starts[-1] != len(rough.graph.ops):
            raise ValueError(
                f"the plan cuts {plan.starts[-1]} ops, but {type(model).__name__} runs {len(rough.graph.ops)} for "
                f"micro-batches of {rows(micro)} samples: make the plan from this model and an example of that size"
            )
        sums = {name: (plan.shared.get(name, ()), parts.partial(name)) for s in plan.stages for name in s.params}
        groups = make_groups(mesh, world, plan.stage_rank, list(sums.values()), parts.spans())
        shards = parts.shards(groups.coord.tp)
        own = [stage for stage in plan.stages if stage.rank == groups.coord.pp]
        initialise, counted, save = _habits(model)
        parameters = materialize(
            model, plan, [s.index for s in own], world.device, seed=seed, initialise=initialise, weights=weights,
            shards=shards,
        )  # fmt: skip
        collect.agree_on_weights({shards.label(name): p for name, p in parameters.items()}, world, watch)
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        holders = collect.holders(plan)
        readers = {name: frozenset(s.index for s in own if name in s.params) for name in trainable}
        pending = Counter[int]()
        return Engine(
            plan=plan,
            model=model,
            parameters=trainable,
            owned=[name for name in trainable if holders[name] == groups.coord.pp],
            programs=Programs(
                model, plan, rough, micro, groups.coord.pp, world.device, parts, parts.prepare(groups, watch), pending
            ),
            links=DistLinks(groups, watch, world.device) if mesh.pp > 1 else NoLinks(),
            reducer=Reducer(
                trainable,
                {name: groups.sums[sums[name]] for name in trainable},
                watch,
                readers,
                pending,
                parts.copies(trainable, groups, watch),
            ),
            optimizer=optimizer(trainable.values()) if optimizer and trainable else None,
            world=world,
            groups=groups,
            watch=watch,
            loss_weight=loss_weight or (counted if loss_fn is None else None) or rows,
            max_grad_norm=max_grad_norm,
            seed=seed,
            save=save,
            shards=shards,
        )


def _degree(axis: str, degree: Degree) -> int:
    if degree == "auto":
        raise ValueError(f"{axis}='auto' is not available yet: give a number")
    if not isinstance(degree, int):
        raise ValueError(f"{axis}={degree!r} is not a degree of parallelism: give a whole number of at least 1")
    return degree


def _micro_batch(example: Any, mesh: Mesh, micro_batches: int) -> Any:
    return to_device(split(example, mesh.dp * micro_batches)[0], torch.device("cpu"))


def _plan(graph: ProxyGraph, micro_batches: int | None, *, mesh: Mesh, samples: int, **choices: Any) -> Plan:
    """Plan for the example's batch, rounded up to whole micro-batches."""
    parts = mesh.dp * (micro_batches or 1)
    return make_plan(
        graph, mesh, batch=-(-samples // parts) * parts, micro_batches=micro_batches, **choices
    )  # fmt: skip


def _habits(model: nn.Module) -> tuple[Initialiser | None, LossWeight | None, Save]:
    """How this model initialises a module, counts its loss (None: not its own way) and is saved."""
    if not hasattr(model, "config") or not hasattr(model, "_init_weights"):
        return None, None, save_safetensors
    from merak_like import hf

    return hf.initialiser(model), hf.loss_weight(model), hf.save_pretrained


def save_safetensors(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors``; a tensor known by several names is written once, under the first."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    first = {id(tensor): name for name, tensor in reversed(list(state.items()))}
    save_file({name: t.contiguous() for name, t in state.items() if first[id(t)] == name}, path / "model.safetensors")
