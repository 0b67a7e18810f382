"""One side of a cut model as an engine: its own weights, its stages, and stages that stand for the other side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.habits import save_safetensors
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan, StageMemory, StagePlan
from merak_like.partitioner.tracer import LossFn, trace
from merak_like.runtime import collect
from merak_like.runtime.batches import LossWeight, rows, split, to_device
from merak_like.runtime.data_parallel import Gradients, Reducer
from merak_like.runtime.engine import Engine
from merak_like.runtime.finite import Guard
from merak_like.runtime.initialising import Initialiser
from merak_like.runtime.initialize import World
from merak_like.runtime.links import DistLinks, Links
from merak_like.runtime.materialize import fill
from merak_like.runtime.methods.method import Method, Place
from merak_like.runtime.optimizer import OptimizerFactory, Slot, Update
from merak_like.runtime.tensor_parallel.sharding import Proof, Sharding, sharding
from merak_like.runtime.tensor_parallel.shards import WHOLE, Shards
from merak_like.runtime.watch import Watch
from merak_like.split.adapters import adapt
from merak_like.split.binarised import binarise
from merak_like.split.contrasted import PROJECTOR, Contrasted, Hears, projector
from merak_like.split.crew import Crew
from merak_like.split.cut import Cut
from merak_like.split.elsewhere import Arrives
from merak_like.split.enduring import Together
from merak_like.split.exchange import Exchange
from merak_like.split.halves import halve
from merak_like.split.joined import Pool
from merak_like.split.messages import Task
from merak_like.split.narrow import narrow
from merak_like.split.order import Side, dealt, orders
from merak_like.split.programs import HalfPrograms
from merak_like.split.screen import Screen, Screened

Learn = Callable[[Sequence[Slot], Callable[[str, Tensor], Iterable[Tensor]]], Update]
"""From what is learnt, and which parts of a gradient this rank counts, to the end of a step."""


@dataclass(frozen=True)
class Source:
    """A model both sides know: how it is built, where its weights are, and its loss if it has none of its own."""

    build: Callable[[], nn.Module]
    """Makes the model anew, best on the meta device."""
    weights: str | Path | None = None
    """A safetensors file or a folder of them; each side reads its own tensors alone. None: as initialised."""
    loss_fn: LossFn | None = None
    fisher: str | Path | None = None
    """A file of the Fisher information of the layer that a cut changes (see ``fisher``); both sides need the same."""
    loss_weight: LossWeight | None = None
    """Items that a micro-batch's loss is the mean of; None: target tokens where the model says so, else samples."""


@dataclass(frozen=True)
class Made:
    """A side, built."""

    engine: Engine
    model: nn.Module
    programs: HalfPrograms
    own: tuple[str, ...]
    """First names of the parameters and buffers of this side, as far as this rank has them."""
    trained: tuple[str, ...]
    """Those that its optimizer has, in its order."""
    probe: tuple[float, ...]
    weigh: LossWeight
    """Items that a micro-batch's loss is the mean of."""
    shards: Shards = WHOLE
    """Which part of each weight this rank has."""
    update: Update | None = None
    """What ends a step."""
    counting: tuple[str, ...] = ()
    """The buffers that a step changes, such as running means."""

    @property
    def fixed(self) -> set[str]:
        """The model's other buffers."""
        return {name for name, _ in self.model.named_buffers()} - set(self.counting)


def build_half(
    side: Side, source: Source, task: Task, example: Any, exchange: Exchange, *, links: Links,
    optimizer: OptimizerFactory | None, device: torch.device, crew: Crew | None = None,
    shared: Mapping[str, nn.Parameter] | None = None, learn: Learn | None = None,
    pool: Pool | None = None, screen: Screen | None = None, methods: Sequence[Method] = (),
) -> Made:  # fmt: skip
    """Build one side of a task.

    ``example`` is a batch as steps will see it. ``crew`` are the ranks of a host; each builds its part. ``shared`` are
    parameters, by first names, that this half has in common with others; ``learn`` makes another end of a step than an
    optimizer's; ``pool`` lets micro-batches of several halves go through at once; ``screen`` is what an edge does to
    what it sends; ``methods`` follow the gradients of each step.

    Raises ValueError for a model that cannot be cut so, and for weights that are not there.
    """
    cut = Cut.parse(task.cut)
    crew = crew or Crew(World(0, 1, device, timedelta(seconds=600)))
    world, at = crew.world, crew.coord
    model = source.build()
    model.train()
    micro = to_device(split(example, task.micro_batches)[0], torch.device("cpu"))
    share = 1 / task.micro_batches
    probe = narrow(model, micro, cut, source, task, side)
    if task.frozen_edge:
        freeze_head(model, micro, cut, source)
    if task.binary_edge:
        binarise(model, head_of(model, micro, cut, source))
    if side == "host" and task.lora is not None:
        first = HalfPrograms(side, model, cut, exchange, torch.device("cpu"), source.loss_fn).place(micro).halves
        adapt(model, first, task.lora, seed=task.seed, device=device)
    leave, compare = screen and partial(Screened, screen=screen, share=share, seed=task.seed), None
    if task.local is not None and cut.back is not None:
        raise ValueError(f"local learning needs a cut without a tail, whose loss the host computes; found {cut}")
    if task.local is not None and side == "edge":
        if screen or task.frozen_edge:
            raise ValueError("local learning trains the edge's head on what it sends as it is: no screen, not frozen")
        first = HalfPrograms(side, model, cut, exchange, torch.device("cpu"), source.loss_fn).place(micro).halves
        compare = projector(first.sent, task.local, task.seed).to(device)
        leave = partial(Contrasted, text=task.local, share=share, compare=compare)
    watch = Watch(world.rank, world.timeout, world.pulse)
    parts = _parts(model, micro, source, crew, watch)
    programs = HalfPrograms(
        side, model, cut, exchange, device, source.loss_fn, mesh=crew.mesh, at=at, parts=parts, pool=pool,
        leave=leave, arrive=Arrives if task.local is None else Hears,
    )  # fmt: skip
    placed = programs.place(micro)
    own = [stage for stage in placed.holds if programs.stage_rank[stage] == at.pp]
    keep = tuple(dict.fromkeys(name for stage in own for name in placed.holds[stage]))
    graph = placed.halves.trace.graph
    shards = parts.shards(at.tp)
    every = {p.name for p in graph.parameters if not p.buffer}
    sums = {name: ((), parts.partial(name)) for names in placed.holds.values() for name in names if name in every}
    groups = crew.groups([((), ()), *sums.values()], parts.spans())  # before anything that may fail on one rank alone
    initialise, counted = _habits(model)
    fill(
        model, [name for name in keep if name not in (shared or {})], graph.ties, device, seed=task.seed,
        initialise=initialise, weights=source.weights, given=False, shards=shards,
    )  # fmt: skip
    if shared is not None:
        _adopt(model, shared, {alias: names[0] for names in graph.ties for alias in names})
    if compare is not None:
        model.add_module(PROJECTOR, compare)
        keep = (*keep, *(f"{PROJECTOR}.{name}" for name, _ in compare.named_parameters()))
    parameters = {name: p for name, p in model.named_parameters() if name in keep}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if crew.mesh.tp > 1:
        programs.prepare = parts.prepare(groups, watch)
    programs.at(micro)
    plan = _plan(
        side, cut, task, crew.mesh, programs.stage_rank, placed.holds, every, graph.ties, rows(micro), type(model)
    )
    readers = {name: frozenset(s for s in own if name in placed.holds[s]) for name in trainable}
    slots = [Slot(name, p, tuple(p.shape), counted=not at.dp) for name, p in trainable.items()]
    learner = optimizer(trainable.values()) if optimizer and trainable else None
    weigh = source.loss_weight or (counted if source.loss_fn is None else None) or rows
    reducer: Gradients = Reducer(
        trainable, {name: groups.sums.get(sums.get(name, ((), ()))) for name in trainable}, watch, readers,
        copies=parts.copies(slots, groups, watch),
    )  # fmt: skip
    for method in methods:
        if type(method).piece is not Method.piece or type(method).traced is not Method.traced:
            raise ValueError(f"{type(method).__name__} changes how code runs, which a half does in its own way")
        place = Place(model, trainable, frozenset(), None, learner, world, watch, lambda: engine.steps)
        reducer = method.gradients(reducer, place)
    if not world.alone:
        links = Together(DistLinks(groups, watch, device), crew, exchange, reducer)
    update = (
        learn(slots, shards.answers)
        if learn
        else Update(slots, learner, max_grad_norm=task.max_grad_norm, guard=Brief(), answers=shards.answers)
    )
    engine = Engine(
        plan=plan, model=model, parameters=trainable, programs=programs,  # type: ignore[arg-type]
        links=links, reducer=reducer,
        update=update,
        prepare=lambda batch: batch,
        world=world, groups=replace(groups, made=()), watch=watch,
        loss_weight=weigh, mine=dealt(task.micro_batches, at.dp, crew.mesh.dp), shards=shards,
        seed=task.seed if side == "edge" else ~task.seed, save=save_safetensors,
    )  # fmt: skip
    changed = {name for op in graph.ops for name in op.mutates}
    kept = tuple(name for name in keep if name in changed)
    return Made(engine, model, programs, keep, tuple(trainable), probe, weigh, shards, update, kept)


def _parts(model: nn.Module, micro: Any, source: Source, crew: Crew, watch: Watch) -> Sharding:
    """How the model lies over tensor-parallel ranks, as the first rank has proven it."""
    parts = sharding(model, crew.mesh.tp, source.loss_fn)
    if crew.mesh.tp == 1:
        return parts
    rough = parts.trace(micro, "cpu")

    def prove() -> tuple[Proof | None, str]:
        try:
            return parts.prove(rough, micro), ""
        except Exception as error:  # all ranks are told of it, and raise
            return None, f"{type(error).__name__}: {error}"

    proof, wrong = collect.from_first(prove if crew.world.rank == 0 else None, crew.world, watch)
    if proof is None:
        raise ValueError(wrong)
    parts.believe(proof)
    parts.graph(rough)  # it decides how weights lie
    return parts


class Brief(Guard):
    """Does not run the forward again to see where a number came up: the other side has said its part once."""

    def passes(self, loss: float, norm: float, step: int, blame: Callable[[], str]) -> bool:
        """As the guard, without blame."""
        return super().passes(loss, norm, step, lambda: "in this half's own layers or gradients")


def _adopt(model: nn.Module, shared: Mapping[str, nn.Parameter], first: Mapping[str, str]) -> None:
    """Let the model's parameters be these numbers, not copies of them; each model has gradients of its own."""
    made: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            name = f"{path}.{key}" if path else key
            name = first.get(name, name)
            if parameter is None or name not in shared:
                continue
            if name not in made:
                made[name] = nn.Parameter(shared[name].detach(), requires_grad=parameter.requires_grad)
            module._parameters[key] = made[name]


def _habits(model: nn.Module) -> tuple[Initialiser | None, LossWeight | None]:
    if not hasattr(model, "config") or not hasattr(model, "_init_weights"):
        return None, None
    from merak_like import hf

    return hf.initialiser(model), hf.loss_weight(model)


def head_of(model: nn.Module, micro: Any, cut: Cut, source: Source) -> set[str]:
    """First names of the parameters that the edge's head reads and its tail does not."""
    halves = halve(trace(model, micro, source.loss_fn), cut)
    return set(halves.params(0)) - (set(halves.params(2)) if halves.tailed else set())


def freeze_head(model: nn.Module, micro: Any, cut: Cut, source: Source) -> None:
    """The edge's head is not trained; its tail is."""
    halves = halve(trace(model, micro, source.loss_fn), cut)
    tail = set(halves.params(2)) if halves.tailed else set[str]()
    first = halves.trace.graph.canonical
    for name, parameter in model.named_parameters():
        if first[name] in halves.params(0) and first[name] not in tail:
            parameter.requires_grad_(False)
    shared = sorted(set(halves.params(0)) & tail & {n for n, p in model.named_parameters() if p.requires_grad})
    if shared:
        raise ValueError(f"frozen_edge: {shared[0]} belongs to the edge's head and to its tail, which is trained")


def _plan(
    side: Side, cut: Cut, task: Task, mesh: Mesh, stage_rank: tuple[int, ...], holds: Mapping[int, tuple[str, ...]],
    parameters: set[str], ties: tuple[tuple[str, ...], ...], micro_batch: int, kind: type[nn.Module],
) -> Plan:  # fmt: skip
    """The plan an engine of this side obeys: which stages there are, in which order they run, what they hold."""
    stages = tuple(
        StagePlan(
            index=i, rank=rank, start=i, stop=i + 1, blocks=(),
            params=tuple(n for n in holds.get(i, ()) if n in parameters),
            buffers=tuple(n for n in holds.get(i, ()) if n not in parameters), param_count=0, flops=0,
            forward_seconds=0.0, backward_seconds=0.0, weight_seconds=0.0, recompute_seconds=0.0,
            live_micro_batches=task.window, recompute=(), memory=StageMemory(),
        )
        for i, rank in enumerate(stage_rank)
    )  # fmt: skip
    return Plan(
        model=kind.__name__, mesh=mesh, schedule="split",
        orders=orders(side, cut, task.micro_batches, task.window, mesh.pp, mesh.dp),
        micro_batches=task.micro_batches // mesh.dp,
        micro_batch=micro_batch, stages=stages, crossings=(), units=(), ties=ties, shared={}, hardware="",
        memory_limit=0, rank_activation_bytes=(0,) * mesh.pp, pipeline_seconds=0.0, after={}, bubble=0.0,
    )  # fmt: skip
