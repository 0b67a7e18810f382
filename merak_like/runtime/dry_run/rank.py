"""One rank of a dry run: the engine built as for a job, one step of it, and what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like._compat import FakeTensorMode, fake_like, fake_parameter, tree_map
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import coding_in, schedule_of
from merak_like.partitioner.schedules.action import Kind
from merak_like.partitioner.tracer import LossFn, Trace
from merak_like.partitioner.tracer.fakes import fake_model
from merak_like.runtime.batches import rows, split
from merak_like.runtime.data_parallel import Reducer
from merak_like.runtime.dry_run import echo
from merak_like.runtime.dry_run.coded import CodedShapes
from merak_like.runtime.dry_run.stages import OnePrograms, Real, ShapeLinks
from merak_like.runtime.engine import Engine
from merak_like.runtime.finite import Guard
from merak_like.runtime.groups import Groups, make_groups
from merak_like.runtime.initialize import World
from merak_like.runtime.links import Links, NoLinks
from merak_like.runtime.optimizer import Slot, Update
from merak_like.runtime.programs import Programs
from merak_like.runtime.tensor_parallel.sharding import sharding
from merak_like.runtime.tensor_parallel.shards import Shards
from merak_like.runtime.watch import Watch

CPU = torch.device("cpu")
"""What the tensors without data claim to be on."""
LIMIT = timedelta(seconds=60)


@dataclass(frozen=True)
class Did:
    """What a rank did: the groups it made, in order, and its calls."""

    rank: int
    groups: tuple[tuple[int, ...], ...]
    events: tuple[echo.Event, ...]


class Cast:
    """A plan, its model and its trace: what all ranks share. Use as a context: the model is as before afterwards."""

    def __init__(self, plan: Plan, model: nn.Module, example: Any, loss_fn: LossFn | None = None) -> None:
        """``example`` is one micro-batch.

        Raises ValueError where the plan is not one of this model and micro-batch.
        """
        self.plan, self.model, self.example, self.loss_fn = plan, model, example, loss_fn
        self.micro: Any = split(example, max(rows(example) // plan.micro_batch, 1))[0]
        for fuse in (True, False):  # a plan does not say: its ops do
            self.parts = sharding(model, plan.mesh.tp, loss_fn, sequence_parallel=plan.sequence_parallel, fuse=fuse)
            self.traced: Trace = self.parts.trace(self.micro, CPU)
            if plan.starts[-1] == len(self.traced.graph.ops):
                break
        self.parts.graph(self.traced)  # decides how weights lie
        self.sums = {n: (plan.shared.get(n, ()), self.parts.partial(n)) for stage in plan.stages for n in stage.params}
        if plan.starts[-1] != len(self.traced.graph.ops):
            raise ValueError(
                f"the plan cuts {plan.starts[-1]} ops, but {type(model).__name__} runs {len(self.traced.graph.ops)} "
                f"for micro-batches of {rows(self.micro)} samples: name the model and the size the plan was made from"
            )
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.real = _last(plan)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """While it is open, the model's weights have shapes and no data."""
        with fake_model(self.model, self.mode, CPU):
            yield

    def groups_of(self, rank: int) -> Did:
        """Only the groups that a rank makes."""
        with _rank(rank, self.plan.mesh.size) as world:
            groups = self._groups(world)
            return Did(rank, _made(groups), ())

    def act(self, rank: int) -> Did:
        """One step of a rank, up to the update of the weights."""
        plan, device = self.plan, CPU
        # to divide a trace over ranks puts one rank's groups into it
        traced = self.traced if plan.mesh.tp == 1 else self.parts.trace(self.micro, CPU)
        with _rank(rank, plan.mesh.size) as world, ExitStack() as held:
            groups, watch = self._groups(world), Watch(world.rank, world.timeout)
            held.callback(watch.close)
            shards = self.parts.shards(groups.coord.tp)
            held.enter_context(_cut(self.model, plan, shards, self.mode))
            own = [stage for stage in plan.stages if stage.rank == groups.coord.pp]
            names = {name for stage in own for name in stage.params}
            parameters = {n: p for n, p in self.model.named_parameters() if n in names and p.requires_grad}
            readers = {name: frozenset(s.index for s in own if name in s.params) for name in parameters}
            pending = Counter[int]()
            programs = Programs(
                self.model, plan, traced, self.micro, groups.coord.pp, device, self.parts,
                self.parts.prepare(groups, watch), pending,
            )  # fmt: skip
            links: Links = NoLinks()
            if plan.mesh.pp > 1:
                links = shapes = ShapeLinks(groups, watch, device)
                shapes.mode = self.mode
                if (coding := coding_in(plan)) is not None:
                    links = CodedShapes(shapes, coding.text)
            with self.mode:
                reducer = Reducer(
                    parameters, {name: groups.sums[self.sums[name]] for name in parameters}, watch, readers, pending,
                    self.parts.copies([Slot(n, p, tuple(p.shape)) for n, p in parameters.items()], groups, watch),
                )  # fmt: skip
            talks = [group for group in groups.tensor.values() if group is not None]
            once = OnePrograms(programs, self.micro, self.mode, self.real, talks)
            engine = Engine(
                plan=plan, model=self.model, parameters=parameters, programs=cast(Programs, once), links=links,
                reducer=reducer, update=Update([], None, max_grad_norm=None, guard=Guard(0)), world=world,
                groups=groups, watch=watch, prepare=lambda batch: batch, loss_weight=rows, seed=0,
                save=lambda *_: None, shards=shards,
            )  # fmt: skip
            self._step(engine, reducer)
            return Did(rank, _made(groups), echo.heard(groups.made))

    def _step(self, engine: Engine, reducer: Reducer) -> None:
        """``Engine.step`` without the numbers, which tensors without data do not have."""
        for bucket in reducer.buckets:  # how many ranks have a gradient is read as a number
            bucket.counts = torch.ones(len(bucket.parameters))
        engine._clear_gradients()
        engine._run(self._batch(), True, training=True)
        reducer.finish()
        engine._losses.clear()
        engine._numbers(0.0)
        reducer.close()

    def _groups(self, world: World) -> Groups:
        return make_groups(
            self.plan.mesh, world, self.plan.stage_rank, list(self.sums.values()), self.parts.spans()
        )  # fmt: skip

    def _batch(self) -> Any:
        """The global batch: the micro-batch over and over, to be split; the stages get the micro-batch itself."""
        size, times = rows(self.micro), self.plan.mesh.dp * self.plan.micro_batches

        def larger(item: Any) -> Any:
            if not isinstance(item, Tensor) or not item.dim() or item.shape[0] != size:
                return item
            return torch.empty((times * size, *item.shape[1:]), dtype=item.dtype, device="meta")

        return tree_map(larger, self.micro)


@contextmanager
def _rank(rank: int, size: int) -> Iterator[World]:
    if dist.is_initialized():
        raise ValueError("this process is a rank of a job already: verify a plan in a process of its own")
    if size == 1:
        yield World(0, 1, CPU, LIMIT)
        return
    echo.join(rank, size)
    try:
        yield World(rank, size, CPU, LIMIT)
    finally:
        dist.destroy_process_group()


def _made(groups: Groups) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(dist.get_process_group_ranks(group)) for group in groups.made)


@contextmanager
def _cut(model: nn.Module, plan: Plan, shards: Shards, mode: FakeTensorMode) -> Iterator[None]:
    """While it is open, weights without data have the size of a rank's parts. Ties stay ties."""
    first = {alias: names[0] for names in plan.ties for alias in names}
    made: dict[str, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Any]] = []
    for path, module in model.named_modules():
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                name = first.get(full := f"{path}.{key}" if path else key, full)
                if tensor is None or name not in shards.layouts:
                    continue
                if name not in made:
                    whole = torch.empty(shards.shape(name, tensor.shape), dtype=tensor.dtype, device="meta")
                    if isinstance(tensor, nn.Parameter):
                        made[name] = fake_parameter(mode, nn.Parameter(whole, tensor.requires_grad), CPU)
                    else:
                        made[name] = fake_like(mode, whole, CPU)
                before.append((registry, key, tensor))
                registry[key] = made[name]  # type: ignore[assignment]
    try:
        yield
    finally:
        for registry, key, tensor in before:
            registry[key] = tensor


def _last(plan: Plan) -> Mapping[int, Real]:
    """The micro-batch of each stage whose backward is first, and whose backward or weights' half of it is last."""
    schedule = schedule_of(plan)
    apart = schedule.apart(Kind.W)
    found: dict[int, Real] = {}
    for order in schedule.orders:
        for kind, index, stage, _ in order:
            if kind in (Kind.B, Kind.W):
                first = found[stage].first if stage in found else index
                found[stage] = Real(first, index, (index, stage) in apart)
    return found
