"""Write calls down as nodes of an fx graph, finding their arguments by tensor identity."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from merak_like._compat import BackwardCFunction, FakeTensor, is_functorch_tensor, storage_key
from merak_like.partitioner.graph import Value
from merak_like.partitioner.tracer.draft import Descend, Draft
from merak_like.partitioner.tracer.encode import Attribute, Opaque, encode, results
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.fakes import FakeModel, dtype_name

Found = Sequence[tuple[tuple[Any, ...], torch.Tensor]]
"""The tensors of a result, each with the path to it."""


class Writer:
    """The graph under construction; every tensor of the pass is known by the node that made it."""

    def __init__(self, fake: FakeModel, device: torch.device) -> None:
        self.fake, self.device = fake, device
        self.graph = fx.Graph()
        self.drafts: list[Draft] = []
        self.nodes: dict[int, fx.Node] = {}
        self.by_name: dict[str, fx.Node] = {}
        self.keep: list[Any] = list(fake.tensors)
        """Whatever is known by its id stays alive."""
        self.constants: dict[str, Any] = {}
        self.constant_names: dict[int, str] = {}
        self.inputs: dict[fx.Node, torch.Tensor] = {}
        self.leaf_of: dict[int, str] = {}
        self.custom: set[int] = set()
        self.scope: list[str] = [""]

    @property
    def where(self) -> str:
        """The module being traced, for messages."""
        return self.scope[-1] or "the model's own forward"

    def state(self) -> tuple[Any, ...]:
        """Grad mode and autocast in force for the op."""
        kind = self.device.type
        return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def emit(self, draft: Draft, op: str, target: Any, args: Any, kwargs: Any) -> None:
        """Append a node; reading parameters and constants becomes ``get_attr`` nodes just before it."""

        def of_tensor(tensor: torch.Tensor) -> fx.Node:
            found = self.reference(tensor, draft)
            return found if isinstance(found, fx.Node) else self.get_attr(found.name)

        def of_object(value: Any) -> fx.Node:
            return self.get_attr(self.hold(value))

        try:
            args = encode(tuple(args), of_tensor, of_object)
            kwargs = encode(dict(kwargs), of_tensor, of_object) if kwargs else {}
        except Opaque as error:
            if draft.kind == "module":
                raise
            raise TraceError(
                f"{draft.target} in {self.where} is called with {error}, which code cannot repeat"
            ) from None
        draft.node = node = self.graph.create_node(op, target, args, kwargs, getattr(target, "node_name", None))
        draft.name = node.name
        node.meta["index"] = len(self.drafts)
        node.meta["state"] = self.state()

    def get_attr(self, name: str) -> fx.Node:
        """Read an attribute of the root, here."""
        node = self.graph.create_node("get_attr", name)
        node.meta["index"] = len(self.drafts)
        return node

    def hold(self, value: Any) -> str:
        """Keep a Python object or constant tensor beside the code; the attribute's name."""
        name = self.constant_names.get(id(value))
        if name is None:
            name = self.constant_names[id(value)] = f"_constant_{len(self.constants)}"
            self.constants[name] = value
        return name

    def reference(self, tensor: torch.Tensor, draft: Draft | None = None) -> fx.Node | Attribute:
        """How code speaks of a tensor: the node that made it, or the parameter, buffer or constant it is."""
        node = self.nodes.get(id(tensor))
        if node is not None:
            if draft is not None:
                draft.inputs[node.name] = None
                self.check_custom(tensor)
            return node
        name = self.fake.names.get(id(tensor))
        if name is not None:
            if draft is not None:
                (draft.buffers if name in self.fake.buffers else draft.params)[name] = None
            return Attribute(name)
        if not isinstance(tensor, FakeTensor) and not is_functorch_tensor(tensor):
            self.keep.append(tensor)
            return Attribute(self.hold(tensor))
        leaf = self.leaf_of.get(id(tensor))
        if leaf:
            raise Descend(leaf)
        raise TraceError(
            f"{self.where} uses a tensor of shape {tuple(tensor.shape)} that no recorded operation made: it was kept "
            "from an earlier forward in a Python attribute, or made outside torch's Python functions"
        )

    def check_custom(self, tensor: torch.Tensor) -> None:
        """A custom autograd function called past the recorder would lose its backward: refuse it."""
        if isinstance(tensor.grad_fn, BackwardCFunction) and id(tensor) not in self.custom:
            name = type(tensor.grad_fn).__name__.removesuffix("Backward")
            raise TraceError(
                f"{self.where} uses the autograd function {name} through a saved '{name}.apply': its own backward "
                f"would be lost. Call {name}.apply(...) where it is used"
            )

    def finish(self, draft: Draft, found: Found, changed: Iterable[torch.Tensor]) -> None:
        """Register what the op made and what it changed in place."""
        node = draft.node
        assert node is not None
        changes: list[int] = []
        for tensor in changed:
            draft.mutates[self.reference(tensor).name] = None
            changes.append(storage_key(tensor))
        if changes:
            node.meta["changes"] = tuple(changes)
        self.drafts.append(draft)
        if len(found) == 1 and not found[0][0]:
            self.adopt(draft, node, found[0][1])
            return
        steps: dict[tuple[Any, ...], fx.Node] = {(): node}
        for path, tensor in found:
            self.adopt(draft, self.follow(steps, path, node.meta["index"]), tensor)

    def follow(self, steps: dict[tuple[Any, ...], fx.Node], path: tuple[Any, ...], index: int) -> fx.Node:
        """The node for one tensor inside a nested result."""
        if path not in steps:
            parent = self.follow(steps, path[:-1], index)
            key = path[-1]
            is_attribute = isinstance(key, str) and key.startswith(".")
            get: Callable[..., Any] = getattr if is_attribute else operator.getitem
            node = self.graph.create_node("call_function", get, (parent, key[1:] if is_attribute else key))
            node.meta.update(index=index, state=steps[()].meta["state"])
            steps[path] = node
        return steps[path]

    def adopt(self, draft: Draft, node: fx.Node, tensor: torch.Tensor) -> None:
        """From now on this tensor is that node."""
        self.nodes[id(tensor)] = node
        self.by_name[node.name] = node
        self.keep.append(tensor)
        if (draft.custom or draft.kind == "module") and isinstance(tensor.grad_fn, BackwardCFunction):
            self.custom.add(id(tensor))
        node.meta["storages"] = (storage_key(tensor),)
        draft.outputs.append(Value(node.name, tuple(tensor.shape), dtype_name(tensor.dtype), tensor.requires_grad))


def outputs_of(out: Any) -> Found:
    """The tensors of a torch function's result; other objects (hook handles, sizes) carry none."""
    if isinstance(out, torch.Tensor):
        return [((), out)]
    return results(out) if isinstance(out, (tuple, list, dict)) else []
