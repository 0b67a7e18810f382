"""Code that computes a few values of a trace again, from some inputs alone: what need not travel over a slow link."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.example import leaves


@dataclass(frozen=True)
class ValueCode:
    """Some values of a trace as a function of the batch."""

    names: tuple[str, ...]
    module: fx.GraphModule
    inputs: Mapping[str, tuple[Any, ...]]
    """Names of the batch's values it reads, and where they are in a batch."""
    buffers: tuple[str, ...]
    """Buffers of the model it reads, by first name."""

    def __call__(self, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """The values by name."""
        if not self.names:
            return {}
        found = leaves(batch)
        with torch.no_grad():
            given = self.module(*(found[path].to(device) for path in self.inputs.values()))
        return dict(zip(self.names, given, strict=True))


def value_code(trace: Trace, model: nn.Module, names: Sequence[str], stop: int) -> ValueCode:
    """The code of the ops before ``stop`` that these values are computed by; they must draw nothing at random."""
    ops, nodes = trace.graph.ops, list(trace.code.nodes)
    kept = _needed(trace, nodes, names, stop)
    placeholders = [node for node in nodes if node in kept and node.op == "placeholder"]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in placeholders}
    for node in nodes:
        if node in kept and node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])
    by_name = {node.name: node for node in nodes}
    graph.output(tuple(env[by_name[name]] for name in names))
    attributes: dict[str, Any] = dict(trace.constants)
    for getter in (model.named_parameters, model.named_buffers):
        attributes.update(getter(remove_duplicate=False))
    modules = dict(model.named_modules())
    root = {
        str(n.target): modules[n.target] if n.op == "call_module" else attributes[str(n.target)]
        for n in graph.nodes
        if n.op in ("call_module", "get_attr")
    }
    used = {node.meta["index"] for node in kept}
    buffers = dict.fromkeys(trace.graph.canonical[b] for i in sorted(used) if i < len(ops) for b in ops[i].buffers)
    paths = {node.name: trace.inputs[node.name] for node in placeholders}
    return ValueCode(tuple(names), fx.GraphModule(root, graph, class_name="Values"), paths, tuple(buffers))


def _needed(trace: Trace, nodes: Sequence[fx.Node], names: Collection[str], stop: int) -> set[fx.Node]:
    """The nodes behind some values, those that change one of them in place included."""
    kept: set[fx.Node] = set()
    todo = [node for node in nodes if node.name in names]
    changes = [
        (set(trace.graph.ops[node.meta["index"]].mutates), node)
        for node in nodes
        if node.op not in ("placeholder", "output") and node.meta["index"] < stop
    ]
    while todo:
        while todo:
            node = todo.pop()
            if node not in kept:
                kept.add(node)
                todo += node.all_input_nodes
        known = {node.name for node in kept}
        todo = [node for changed, node in changes if changed & known and node not in kept]
    return kept
