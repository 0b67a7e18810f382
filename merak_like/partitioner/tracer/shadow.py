"""Answer questions about data during a trace: run the few recorded ops that lead to a value on the real example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from merak_like._compat import unset_fake
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.guards import check_value


class Unknowable(Exception):
    """The value depends on weights or on random numbers, so it has no value that holds for every step."""


class Chance(Unknowable):
    """The value depends on random numbers."""


class Shadow:
    """Evaluates nodes of a graph under construction with the example's real tensors."""

    def __init__(
        self, inputs: Mapping[fx.Node, torch.Tensor], constants: Mapping[str, Any], lasting: Mapping[str, torch.Tensor]
    ) -> None:
        self.inputs = inputs
        self.constants = constants
        self.lasting = lasting
        """Real buffers and frozen parameters by name: as good as constants while nothing changes them."""

    def value(self, node: fx.Node) -> torch.Tensor:
        """The tensor a node stands for. Raises Unknowable if it depends on parameters, activations or chance."""
        order = self._slice(node)
        with unset_fake(), torch.no_grad():
            low = self._run(order, node, torch.zeros_like)
            if any(n.meta.get("random") for n in order):
                high = self._run(order, node, lambda t: torch.full_like(t, 1 - 2**-24))
                if not torch.equal(low, high):
                    raise Chance("it depends on random numbers (layer drop? set its probability to 0)")
            return low

    def _slice(self, node: fx.Node) -> list[fx.Node]:
        """The node's ancestors, with the ops that change their storages in place, in the order they ran."""
        before = [n for n in node.graph.nodes if n.meta.get("index", -1) <= node.meta["index"]]
        needed = {node}
        grown = True
        while grown:
            grown = False
            storages = {s for n in needed for s in n.meta.get("storages", ())}
            for n in reversed(before):
                if n not in needed and storages & set(n.meta.get("changes", ())):
                    needed.add(n)
                    grown = True
                if n in needed:
                    fresh = set(n.all_input_nodes) - needed
                    needed |= fresh
                    grown = grown or bool(fresh)
        return [n for n in before if n in needed]

    def _run(self, order: list[fx.Node], last: fx.Node, chance: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        made: dict[fx.Node, Any] = {}
        for node in order:
            args = fx.map_arg(node.args, lambda n: made[n])
            kwargs: dict[str, Any] = fx.map_arg(dict(node.kwargs), lambda n: made[n])
            if node.op == "placeholder":
                if self.inputs[node].device.type == "meta":
                    raise Unknowable("the example has no values: give an example with real tensors")
                made[node] = self.inputs[node].clone()
            elif node.op == "get_attr":
                name = str(node.target)
                if name not in self.constants and name not in self.lasting:
                    raise Unknowable("it depends on the model's weights or buffers")
                made[node] = self.constants[name] if name in self.constants else self.lasting[name].clone()
            elif node.op == "call_module":
                raise Unknowable("it depends on the model's activations")
            elif node.op == "call_method":
                made[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                if node.meta.get("random"):
                    if getattr(node.target, "__name__", "") not in ("rand", "rand_like"):
                        raise Chance("it depends on random numbers")
                    made[node] = chance(made[node])
        return made[last]


@dataclass(frozen=True)
class Question:
    """A guard that can be checked before a batch is run: it depends on the batch alone."""

    guard: fx.Node
    order: tuple[fx.Node, ...]
    """The recorded ops that lead to the tensor it reads."""
    attributes: Mapping[str, Any]
    """The constants and buffers among them."""

    def holds(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether these inputs, by name, give the answer the traced example gave."""
        tensor, reader, expected, _ = self.guard.args
        given = {node: inputs[node.name] for node in self.order if node.op == "placeholder"}
        shadow = Shadow(given, self.attributes, {})
        with torch.no_grad():
            value = shadow._run(list(self.order), tensor, torch.zeros_like)  # type: ignore[arg-type]
        return bool(getattr(value, str(reader))() == expected)


def questions(graph: fx.Graph, shadow: Shadow) -> tuple[Question, ...]:
    """The value guards of a recorded graph, with what each needs."""
    found: list[Question] = []
    for node in graph.nodes:
        if node.target is check_value:
            tensor = node.args[0]
            assert isinstance(tensor, fx.Node)
            order = shadow._slice(tensor)
            known = {**shadow.lasting, **shadow.constants}
            needed = {str(n.target): known[str(n.target)] for n in order if n.op == "get_attr"}
            found.append(Question(node, tuple(order), needed))
    return tuple(found)


def refuse(what: str, where: str, reason: object) -> TraceError:
    """The error for a question about data that has no lasting answer."""
    return TraceError(
        f"{what} in {where or 'the model'} asks for the data of a tensor, but {reason}. A recorded graph can only "
        "follow one branch: compute the choice with tensor operations (torch.where), or name the module that decides "
        "as atomic so that it runs as it is"
    )
