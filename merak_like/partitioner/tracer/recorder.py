"""Write down every torch call of one forward pass as a node of an fx graph, finding arguments by tensor identity."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from merak_like._compat import (
    DATA_DEPENDENT,
    BackwardCFunction,
    FakeTensor,
    FakeTensorMode,
    is_functorch_tensor,
    storage_key,
    unset_fake,
)
from merak_like.partitioner.graph import Value
from merak_like.partitioner.tracer import guards
from merak_like.partitioner.tracer.counting import count, tensors_in
from merak_like.partitioner.tracer.draft import Descend, Draft
from merak_like.partitioner.tracer.encode import Attribute, Opaque, encode, results
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.fakes import FakeModel, dtype_name
from merak_like.partitioner.tracer.memo import Memo
from merak_like.partitioner.tracer.shadow import Shadow, Unknowable, refuse
from merak_like.partitioner.tracer.shapes import SHAPE_RULES, run_with_real
from merak_like.partitioner.tracer.words import EFFECTS, FORBIDDEN, QUERIES, RANDOM, READERS, draws


class Recorder(TorchFunctionMode):
    """Records while ``quiet`` is 0; inside a leaf it only counts."""

    def __init__(self, fake: FakeModel, device: torch.device, mode: FakeTensorMode, memo: bool) -> None:
        super().__init__()
        self.memo = Memo(mode, self.pack, self.grow) if memo else None
        self.fake, self.device = fake, device
        self.graph = fx.Graph()
        self.drafts: list[Draft] = []
        self.nodes: dict[int, fx.Node] = {}
        self.by_name: dict[str, fx.Node] = {}
        self.keep: list[Any] = list(fake.tensors)
        self.constants: dict[str, Any] = {}
        self.constant_names: dict[int, str] = {}
        self.inputs: dict[fx.Node, torch.Tensor] = {}
        self.shadow = Shadow(self.inputs, self.constants)
        self.scope: list[str] = [""]
        self.quiet = 0
        self.dynamic = False
        self.leaf_of: dict[int, str] = {}
        self.custom: set[int] = set()
        self.saved_storages = {storage_key(t) for t in fake.tensors}
        self.current = Draft("", "", "", "")

    # --- what torch tells us -------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", type(func).__name__)
        if self.quiet:
            out = self.run(func, name, args, kwargs)
            outs = tensors_in(out)
            self.tally(name, args, kwargs, outs)
            for t in outs:
                self.leaf_of[id(t)] = self.scope[-1]
                self.keep.append(t)
            return out
        if name in READERS and any(isinstance(t, FakeTensor) for t in args[:1]):
            return self.read(func, name, args, kwargs)
        if name in FORBIDDEN:
            raise TraceError(f"{name}() inside the forward of {self.where} cannot be part of a recorded graph")
        ins = tensors_in(args) + (tensors_in(kwargs) if kwargs else [])
        versions = [t._version for t in ins]
        before = self.current
        draft = self.current = Draft("", "function", name, self.scope[-1])
        self.dynamic = False
        try:
            out = self.run(func, name, args, kwargs)
        except RuntimeError:  # a tensor where torch wants a Python number reads its data in C++
            args, kwargs = self.numbers(args), self.numbers(kwargs)
            out = self.run(func, name, args, kwargs)
        changed = [t for t, version in zip(ins, versions, strict=True) if t._version != version]
        if name in EFFECTS and not (name == "__set__" and not ins):
            changed = ins[:1]
        found = self.outputs_of(out)
        if not found and not changed:
            if not ins or name == "__get__" or name in QUERIES or name.startswith("is_"):
                self.current = before
                return out
            raise TraceError(
                f"{name}() in {self.where} takes a tensor and returns none: the trace cannot tell what it changes"
            )
        self.record_call(draft, func, name, args, kwargs)
        self.finish(draft, found, changed)
        self.tally(name, args, kwargs, [t for _, t in found])
        if self.dynamic:
            for _, tensor in found:
                self.guard(guards.check_shape, (tensor, tuple(tensor.shape), self.where))
        return out

    @property
    def where(self) -> str:
        """The module being traced, for messages."""
        return self.scope[-1] or "the model's own forward"

    def run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call the function on fakes, with the rules for those that need data or have no fake kernel."""
        rule = SHAPE_RULES.get(name)
        if rule is not None and any(isinstance(t, FakeTensor) for t in tensors_in(args)):
            made = rule(*args, **kwargs)
            if made is not None:
                return made
        try:
            return self.memo.run(func, name, args, kwargs, self.state()) if self.memo else func(*args, **kwargs)
        except DATA_DEPENDENT as error:
            if self.quiet:
                raise
            self.dynamic = True
            try:
                return run_with_real(func, name, args, kwargs, self.real_value)
            except Unknowable as reason:
                raise refuse(f"{name}()", self.where, reason) from error

    def real_value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The data behind a fake tensor for the traced example; see Shadow.value."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        node = self.nodes.get(id(tensor))
        if node is None:
            raise Unknowable("it depends on the model's weights or buffers")
        return self.shadow.value(node)

    def read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A question about data: answer it for the example and leave a guard in the code."""
        try:
            return func(*args, **kwargs)  # constants know their data
        except (*DATA_DEPENDENT, RuntimeError, TypeError, ValueError):
            pass
        try:
            real = [self.real_value(t) if isinstance(t, torch.Tensor) else t for t in args]
        except Unknowable as reason:
            raise refuse(f"{name}()", self.where, reason) from None
        with unset_fake():
            answer = getattr(real[0], name)(*real[1:], **kwargs)
        if len(tensors_in(args)) == 1:
            self.guard(guards.check_value, (args[0], name, answer, self.where))
        return answer

    def numbers(self, item: Any) -> Any:
        """Integer scalars on tensors as the Python numbers they are in the traced example, each with its guard."""
        if isinstance(item, FakeTensor) and not item.dim() and not item.is_floating_point() and not item.is_complex():
            return self.read(torch.Tensor.item, "item", (item,), {})
        if isinstance(item, (tuple, list)):
            return type(item)(self.numbers(x) for x in item)
        return {k: self.numbers(v) for k, v in item.items()} if isinstance(item, dict) else item

    def guard(self, check: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Leave a check in the code: the answer that was followed must hold for every batch."""
        draft = Draft("", "guard", check.__name__, self.scope[-1])
        self.emit(draft, "call_function", check, args, {})
        self.finish(draft, [], [])

    # --- nodes ---------------------------------------------------------------------------------------------------

    def record_call(self, draft: Draft, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Emit the node that repeats this torch call."""
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__
            draft.target = f"{'set' if name == '__set__' else 'get'}attr {attribute}"
            op = setattr if name == "__set__" else getattr
            self.emit(draft, "call_function", op, (args[0], attribute, *args[1 : 2 if op is setattr else 1]), {})
        elif args and isinstance(args[0], torch.Tensor) and getattr(torch.Tensor, name, None) is func:
            draft.kind = "method"
            self.emit(draft, "call_method", name, args, kwargs)
        else:
            draft.target = f"{getattr(func, '__module__', None) or 'torch'}.{name}"
            self.emit(draft, "call_function", func, args, kwargs)
        assert draft.node is not None
        draft.node.meta["random"] = name in RANDOM

    def emit(self, draft: Draft, op: str, target: Any, args: Any, kwargs: Any) -> None:
        """Append a node; reading parameters and constants becomes ``get_attr`` nodes just before it."""

        def of_tensor(tensor: torch.Tensor) -> fx.Node:
            found = self.reference(tensor, draft)
            return found if isinstance(found, fx.Node) else self.get_attr(found.name)

        def of_object(value: Any) -> fx.Node:
            return self.get_attr(self.hold(value))

        try:
            args = encode(tuple(args), of_tensor, of_object)
            kwargs = encode(dict(kwargs), of_tensor, of_object)
        except Opaque as error:
            if draft.kind == "module":
                raise
            raise TraceError(
                f"{draft.target} in {self.where} is called with {error}, which code cannot repeat"
            ) from None
        draft.node = self.graph.create_node(op, target, args, kwargs)
        draft.name = draft.node.name
        draft.node.meta.update(index=len(self.drafts), state=self.state())

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
                f"{self.where} uses the autograd function {name} through a saved '{name}.apply': its own backward would "
                f"be lost. Call {name}.apply(...) where it is used"
            )

    def state(self) -> tuple[Any, ...]:
        """Grad mode and autocast in force for the op."""
        kind = self.device.type
        return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def outputs_of(self, out: Any) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
        """The tensors of a torch function's result; other objects (hook handles, sizes) carry none."""
        if isinstance(out, torch.Tensor):
            return [((), out)]
        return results(out) if isinstance(out, (tuple, list, dict)) else []

    def finish(self, draft: Draft, found: Sequence[tuple[Any, torch.Tensor]], changed: Iterable[torch.Tensor]) -> None:
        """Register what the op made and what it changed in place."""
        node = draft.node
        assert node is not None
        changes = []
        for tensor in changed:
            reference = self.reference(tensor)
            draft.mutates[reference.name] = None
            changes.append(storage_key(tensor))
        node.meta["changes"] = tuple(changes)
        self.drafts.append(draft)
        steps: dict[tuple[Any, ...], fx.Node] = {(): node}
        for path, tensor in found:
            made = self.follow(steps, path, node.meta["index"])
            self.adopt(draft, made, tensor)
        self.current = draft

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
        if isinstance(tensor.grad_fn, BackwardCFunction) and (draft.kind == "module" or draft.custom):
            self.custom.add(id(tensor))
        node.meta["storages"] = (storage_key(tensor),)
        draft.outputs.append(Value(node.name, tuple(tensor.shape), dtype_name(tensor.dtype), tensor.requires_grad))

    # --- costs ---------------------------------------------------------------------------------------------------

    def tally(self, name: str, args: Any, kwargs: Any, outs: Sequence[torch.Tensor]) -> None:
        """Add one function call to the current op's cost."""
        flops, moved = count(name, args, kwargs, outs)
        self.current.flops += flops
        self.current.moved += moved
        self.current.kernels += bool(moved)
        self.current.random = self.current.random or draws(name, args, kwargs)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Saved-tensor hook: the op that first keeps a storage for the backward pays for it."""
        if self.memo:
            self.memo.note(tensor)
        key = storage_key(tensor)
        if key not in self.saved_storages:
            self.saved_storages.add(key)
            self.keep.append(tensor)
            self.current.saved += tensor.numel() * tensor.element_size()
        return tensor

    def grow(self, nbytes: int) -> None:
        """The current op keeps bytes for the backward that no tensor here stands for."""
        self.current.saved += nbytes
