"""From a trace and the stage starts to one runnable module per stage.

Every module call that lies wholly inside a stage is folded back into one call of the user's own module; what is left
runs as the graph's generated code. Parameters keep the names the user's model gives them.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from merak_like.partitioner.cuts import crossings
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.calls import ModuleCall
from merak_like.partitioner.tracer.encode import Attribute


@dataclass(frozen=True)
class Piece:
    """A run of ops as code: ``module(*inputs, *received)`` returns ``made``."""

    name: str
    module: fx.GraphModule
    inputs: tuple[str, ...]
    """Names of the batch's values it reads."""
    received: tuple[str, ...]
    """Values made by earlier pieces or stages."""
    made: tuple[str, ...]
    """Values read by later pieces or stages, then names of the model's outputs."""
    again: bool = False
    """Whether its activations are not kept."""
    random: bool = False
    """Whether it draws random numbers."""
    buffers: tuple[torch.Tensor, ...] = ()
    """Buffers it reads, and perhaps changes."""

    @property
    def run(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The code itself: a call of a module looks for hooks first, and on generated code there are none."""
        return self.module.forward if isinstance(self.module, fx.GraphModule) else self.module


@dataclass(frozen=True)
class StageCode:
    """One stage as code: pieces to run in order, one unless parts of it are recomputed."""

    index: int
    pieces: tuple[Piece, ...]
    inputs: tuple[str, ...]
    """Names of the batch's values it reads."""
    received: tuple[str, ...]
    """Values made by earlier stages."""
    sent: tuple[str, ...]
    """Values that later stages read."""
    results: tuple[str, ...]
    """Names of the model's outputs it makes, ``loss`` among them on the stage that makes the loss."""


def build_stages(trace: Trace, model: nn.Module, starts: Sequence[int]) -> tuple[StageCode, ...]:
    """Generate the code of every stage; stage s owns ``graph.ops[starts[s]:starts[s + 1]]``.

    The stages share the model's modules and parameters.
    """
    build = StageBuilder(trace, model, starts)
    return tuple(_stage(build, starts, index, ()) for index in range(len(starts) - 1))


def build_stage(
    trace: Trace, model: nn.Module, starts: Sequence[int], index: int, again: Collection[tuple[int, int]] = ()
) -> StageCode:
    """Generate the code of one stage: only its own parameters need be there.

    ``again`` are ranges of its ops, with legal borders, whose activations are not kept. Questions about the batch's
    data are left out: whoever runs a single stage asks ``trace.fits(batch)`` before, where the batch is still on the
    host, and spares the device a wait.
    """
    finer = sorted({*starts, *(border for ends in again for border in ends)})
    return _stage(StageBuilder(trace, model, finer, asked=True), starts, index, again)


def _stage(build: StageBuilder, starts: Sequence[int], index: int, again: Collection[tuple[int, int]]) -> StageCode:
    first, stop = starts[index], starts[index + 1]
    inside = [i for i, start in enumerate(build.starts[:-1]) if first <= start < stop]
    pieces = tuple(build.piece(i, any(a <= build.starts[i] < b for a, b in again)) for i in inside)
    inputs = tuple(dict.fromkeys(name for piece in pieces for name in piece.inputs))
    return StageCode(index, pieces, inputs, *crossed(build.trace, starts, index))


def crossed(trace: Trace, starts: Sequence[int], index: int) -> tuple[tuple[str, ...], ...]:
    """The values a stage receives, those it sends, and the names of the model's outputs it makes."""
    crossing = crossings(trace.graph, starts)
    made = {value.name for op in trace.graph.ops[starts[index] : starts[index + 1]] for value in op.outputs}
    return (
        tuple(c.value for c in crossing if index in c.targets),
        tuple(c.value for c in crossing if c.source == index),
        tuple(name for name, value in trace.graph.outputs.items() if value in made),
    )


def inputs_of(trace: Trace, starts: Sequence[int], index: int) -> tuple[str, ...]:
    """The batch values a stage's ops read (its folded calls may read fewer)."""
    read = {name for op in trace.graph.ops[starts[index] : starts[index + 1]] for name in op.inputs}
    outputs = {v for v in trace.graph.outputs.values() if index == len(starts) - 2}
    return tuple(name for name in trace.inputs if name in read | outputs)


class StageBuilder:
    """Generates code from the nodes of a trace, with the user's own modules and parameters."""

    def __init__(self, trace: Trace, model: nn.Module, starts: Sequence[int], asked: bool = False) -> None:
        self.trace, self.starts = trace, starts
        self.answered = {question.guard for question in trace.questions} if asked else set[fx.Node]()
        self.crossings = crossings(trace.graph, starts)
        self.nodes = list(trace.code.nodes)
        self.by_stage: list[list[fx.Node]] = [[] for _ in starts[:-1]]
        for node in self.nodes:
            if node.op != "placeholder":
                self.by_stage[self.stage_of(node)].append(node)
        self.named = {node.name: node for node in self.nodes}
        self.folds = {call.first: call for call in foldable(trace, starts)}
        self.modules = dict(model.named_modules())
        self.attributes: dict[str, Any] = dict(trace.constants)
        for getter in (model.named_parameters, model.named_buffers):
            self.attributes.update(getter(remove_duplicate=False))

    def stage_of(self, node: fx.Node) -> int:
        return bisect_right(self.starts, node.meta["index"], hi=len(self.starts) - 1) - 1

    def piece(self, index: int, again: bool) -> Piece:
        sent = tuple(c.value for c in self.crossings if c.source == index)
        received = tuple(c.value for c in self.crossings if index in c.targets)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        inputs = inputs_of(self.trace, self.starts, index)
        for name in (*inputs, *received):
            env[self.named[name]] = graph.placeholder(name)
        self.body(graph, self.by_stage[index], env)
        wanted = {n: v for n, v in self.trace.graph.outputs.items() if self.stage_of(self.named[v]) == index}
        graph.output(tuple(env[self.named[n]] for n in (*sent, *wanted.values())))
        indices = range(self.starts[index], self.starts[index + 1])
        ops = self.trace.graph.ops
        return self.finished(
            graph, f"ops {ops[indices[0]].name} to {ops[indices[-1]].name}", inputs, received, (*sent, *wanted), again,
            any(ops[i].random for i in indices), indices,
        )  # fmt: skip

    def finished(
        self, graph: fx.Graph, name: str, inputs: tuple[str, ...], received: tuple[str, ...], made: tuple[str, ...],
        again: bool, random: bool, ops: Collection[int],
    ) -> Piece:  # fmt: skip
        """A graph of some ops as code."""
        root = {
            str(n.target): self.modules[n.target] if n.op == "call_module" else self.attributes[str(n.target)]
            for n in graph.nodes
            if n.op in ("call_module", "get_attr")
        }
        names = [name for i in sorted(ops) for name in self.trace.graph.ops[i].buffers]
        buffers = {id(b): b for b in map(self.attributes.get, names) if b is not None}
        module = fx.GraphModule(root, graph, class_name=f"Ops{min(ops)}")
        return Piece(name, module, inputs, received, made, again, random, tuple(buffers.values()))

    def body(self, graph: fx.Graph, nodes: Sequence[fx.Node], env: dict[fx.Node, fx.Node]) -> None:
        ambient: fx.Node | None = None
        state = base = self.trace.state

        def switch(wanted: tuple[Any, ...]) -> None:
            nonlocal ambient, state
            if wanted != state:
                ambient = ambient or graph.call_function(current_state, (self.trace.device.type,))
                graph.call_function(set_state, (self.trace.device.type, ambient if wanted == base else wanted))
                state = wanted

        skip_to = -1
        for node in nodes:
            at = node.meta["index"]
            if at < skip_to or node in self.answered:
                continue
            call = self.folds.get(at)
            if call is not None:
                switch(call.state)
                self.fold(graph, call, env)
                skip_to = call.stop
                continue
            if node.op != "get_attr" and "state" in node.meta:
                switch(node.meta["state"])
            env[node] = graph.node_copy(node, lambda n: env[n])
        switch(base)

    def fold(self, graph: fx.Graph, call: ModuleCall, env: dict[fx.Node, fx.Node]) -> None:
        """One ``call_module`` for everything that happened inside a call."""

        def word(item: Any) -> Any:
            if isinstance(item, Attribute):
                return graph.create_node("get_attr", item.name)
            if isinstance(item, fx.Node):
                return env[item] if item in env else graph.call_function(stand_in, self.unread(item))
            if isinstance(item, (tuple, list)):
                return type(item)(word(x) for x in item)
            if isinstance(item, dict):
                return {k: word(v) for k, v in item.items()}
            if isinstance(item, slice):
                return slice(word(item.start), word(item.stop), word(item.step))
            return item

        made = graph.call_module(call.path, word(call.args), word(call.kwargs))
        steps: dict[tuple[Any, ...], fx.Node] = {(): made}

        def follow(path: tuple[Any, ...]) -> fx.Node:
            if path not in steps:
                key = path[-1]
                named = isinstance(key, str) and key.startswith(".")
                get: Callable[..., Any] = getattr if named else operator.getitem
                steps[path] = graph.call_function(get, (follow(path[:-1]), key[1:] if named else key))
            return steps[path]

        for path, old in call.outputs or ():
            if isinstance(old, fx.Node) and call.first <= old.meta["index"] < call.stop:
                env[old] = follow(path)

    def unread(self, node: fx.Node) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        value = self.trace.graph.values[node.name]
        return value.shape, getattr(torch, value.dtype), self.trace.device


def foldable(trace: Trace, starts: Sequence[int]) -> tuple[ModuleCall, ...]:
    """The largest module calls wholly inside one stage whose inner values are seen outside only as their results."""
    reach = [-1] * len(trace.graph.ops)
    made: list[list[fx.Node]] = [[] for _ in trace.graph.ops]
    for node in trace.code.nodes:
        index = node.meta["index"]
        made[index].append(node)
        reach[index] = max([reach[index], *(user.meta["index"] for user in node.users)])
    outputs = [n for n in trace.code.nodes if n.name in set(trace.graph.outputs.values())]
    chosen: list[ModuleCall] = []
    end = 0
    for call in trace.calls:  # pre-order: outermost first
        if call.first < end or call.stop <= call.first or call.opaque or not call.path:
            continue
        if bisect_right(starts, call.first) != bisect_right(starts, call.stop - 1):
            continue
        results = {node for _, node in call.outputs or () if isinstance(node, fx.Node)}
        if any(call.first <= n.meta["index"] < call.stop and n not in results for n in outputs):
            continue
        if any(reach[i] >= call.stop and not _only(results, made[i], call.stop) for i in range(call.first, call.stop)):
            continue
        chosen.append(call)
        end = call.stop
    return tuple(chosen)


def _only(results: Set[fx.Node], nodes: Iterable[fx.Node], stop: int) -> bool:
    """Whether every node that is read at or after ``stop`` is among the results."""
    return all(n in results or all(user.meta["index"] < stop for user in n.users) for n in nodes)


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """For an argument of which a module reads no more than shape, dtype and device: one number, no number if it can."""
    return torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device).expand(shape)


def current_state(device: str) -> tuple[bool, bool, torch.dtype]:
    """Grad mode and autocast now in force."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def set_state(device: str, state: tuple[bool, bool, torch.dtype]) -> None:
    """Enter the grad mode and autocast that a recorded op ran under."""
    grad, autocast, dtype = state
    torch.set_grad_enabled(grad)
    torch.set_autocast_enabled(device, autocast)
    torch.set_autocast_dtype(device, dtype)
