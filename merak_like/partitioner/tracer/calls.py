"""Module calls and custom autograd functions during a trace: which become one op, which are recorded inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from merak_like._compat import (
    CheckpointFunction,
    FakeTensor,
    call_module,
    compiled_function_stance,
    converting_modules,
    is_compiled,
)
from merak_like.partitioner.tracer.counting import tensors_in
from merak_like.partitioner.tracer.draft import CannotStayWhole, Draft
from merak_like.partitioner.tracer.encode import Attribute, Opaque, encode, results
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.kernels import Kernel
from merak_like.partitioner.tracer.recorder import Recorder
from merak_like.partitioner.tracer.rehearsal import rehearse
from merak_like.partitioner.tracer.writer import outputs_of

_ONE_TRACE = threading.RLock()
"""Tracing replaces ``nn.Module.__call__`` for the whole process while it runs."""


@dataclass
class ModuleCall:
    """A call of a module whose inside was recorded, with what is needed to fold it back into one node."""

    path: str
    type: str
    first: int
    depth: int
    atomic: bool
    state: tuple[Any, ...]
    args: Any = ()
    kwargs: Any = None
    outputs: list[tuple[tuple[Any, ...], fx.Node | Attribute]] | None = None
    stop: int = 0
    opaque: str = ""
    """Why the call cannot be one node; empty when it can."""
    hooked: bool = False
    """Whether the user's hooks run at every call: then it should stay one node."""


@dataclass(frozen=True)
class Choices:
    """Paths of modules that are not recorded the usual way."""

    atomic: frozenset[str] = frozenset()
    """Stay whole in the code; also class names."""
    descend: frozenset[str] = frozenset()
    """Childless, but recorded inside."""
    rehearse: frozenset[str] = frozenset()
    """One op each, run for real because they look at their data."""
    kernels: Mapping[str, Kernel] = field(default_factory=dict[str, Kernel])
    """By path, for activations that one torch function computes as well."""


class CustomFunction:
    """A custom autograd function as a node's target: calls ``apply``, so that its own backward is kept."""

    __module__ = "merak_like.partitioner.tracer.calls"

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.node_name = cls.__name__.strip("_").lower()
        """For the graph: the same in every process."""
        self.__name__ = self.__qualname__ = f"{cls.__name__}_{id(cls)}"  # for the code: one global for each class

    def __call__(self, *args: Any) -> Any:
        return self.cls.apply(*args)  # type: ignore[attr-defined]


class Calls:
    """Routes module calls into the recorder."""

    def __init__(self, recorder: Recorder, choices: Choices) -> None:
        self.recorder, self.writer, self.costs = recorder, recorder.writer, recorder.costs
        self.paths = recorder.writer.fake.paths
        self.choices = choices
        self.calls: list[ModuleCall] = []
        self.open: list[ModuleCall] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Stands for ``nn.Module.__call__`` during the trace."""
        path = self.paths.get(id(module))
        if self.recorder.quiet or self.recorder.running:
            return call_module(module, *args, **kwargs)
        if path is None:
            for call in self.open:
                call.opaque = call.opaque or "it makes modules in its forward"
            return call_module(module, *args, **kwargs)
        if path in self.choices.rehearse:
            return self.leaf(module, path, args, kwargs)
        if path in self.choices.kernels and len(args) == 1 and not kwargs and not self.kept:
            return self.kernel(self.choices.kernels[path], path, args[0])
        if path and not module._modules and path not in self.choices.descend:
            return self.leaf(module, path, args, kwargs)
        return self.inside(module, path, args, kwargs)

    def leaf(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One op for the whole call."""
        writer, costs = self.writer, self.costs
        rehearsed = path in self.choices.rehearse
        draft = Draft("", "module", path, path)
        try:
            writer.emit(draft, "call_module", path, args, kwargs)
        except Opaque as error:
            if rehearsed:
                raise CannotStayWhole(path, writer.scope[-1], TraceError(f"{path} is called with {error}")) from None
            return self.inside(module, path, args, kwargs)
        before, costs.current = costs.current, draft
        own = [*module.parameters(), *module.buffers()]
        with self.silent(path):
            if rehearsed:
                out, changed = self.rehearse(draft, module, path, args, kwargs)
            else:
                watched = [*tensors_in(args), *tensors_in(kwargs), *own]
                versions = [t._version for t in watched]
                out = call_module(module, *args, **kwargs)
                changed = [t for t, v in zip(watched, versions, strict=True) if t._version != v]
        try:
            found = outputs_of(out) or results(out)
        except Opaque as error:  # it hides tensors in an object: take the op back and record its inside
            if rehearsed:
                raise CannotStayWhole(path, writer.scope[-1], TraceError(f"{path} gives {error}")) from None
            assert draft.node is not None
            writer.graph.erase_node(draft.node)
            costs.current = before
            return self.inside(module, path, args, kwargs)
        for tensor in own:
            writer.reference(tensor, draft)
        call = ModuleCall(path, type(module).__qualname__, len(writer.drafts), len(self.open), False, writer.state())
        writer.finish(draft, found, changed)
        call.stop = len(writer.drafts)
        call.opaque = "a leaf"
        self.calls.append(call)
        return out

    @property
    def kept(self) -> bool:
        """Whether a call around this one is to stay one node, so that nothing in it can be exchanged."""
        return any(call.atomic or call.hooked for call in self.open)

    def kernel(self, kernel: Kernel, path: str, argument: Any) -> Any:
        """One torch function in place of the call; what is around it can no longer be one node."""
        for call in self.open:
            call.opaque = call.opaque or f"a kernel stands for {path}"
        self.writer.scope.append(path)
        try:
            return kernel(argument)
        finally:
            self.writer.scope.pop()

    def rehearse(self, draft: Draft, module: nn.Module, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What a module that looks at its data gives and changes."""
        try:
            done = rehearse(self.recorder, draft, lambda a, k: call_module(module, *a, **k), module, args, kwargs)
        except TraceError as error:
            raise CannotStayWhole(path, self.writer.scope[-2], error) from error
        return done.out, done.changed

    def inside(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Record what the module does, and remember the call."""
        writer = self.writer
        kind = type(getattr(module, "_orig_mod", module))
        hooked = bool(module._backward_hooks or module._backward_pre_hooks)
        atomic = is_compiled(module) or hooked or path in self.choices.atomic or kind.__name__ in self.choices.atomic
        call = ModuleCall(path, kind.__qualname__, len(writer.drafts), len(self.open), atomic, writer.state())
        call.hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        self.calls.append(call)
        try:
            call.args = encode(tuple(args), writer.reference, _no_objects)
            call.kwargs = encode(dict(kwargs), writer.reference, _no_objects)
        except Opaque as error:
            call.opaque = f"it is called with {error}"
        writer.scope.append(path)
        self.open.append(call)
        try:
            out = _without_backward_hooks(module, args, kwargs) if hooked else call_module(module, *args, **kwargs)
        finally:
            writer.scope.pop()
            self.open.pop()
        call.stop = len(writer.drafts)
        try:
            call.outputs = [(p, writer.reference(t)) for p, t in results(out)]
        except Opaque as error:
            call.opaque = call.opaque or f"it gives {error}"
        return out

    def function(self, cls: type, original: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Stands for ``torch.autograd.Function.apply``: one op that keeps its own backward."""
        writer = self.writer
        if self.recorder.below and any(t.requires_grad for t in tensors_in(args)):
            raise TraceError(f"{cls.__qualname__}.apply under torch.vmap in {writer.where}: its backward would be lost")
        if self.recorder.running:  # the code calls the function around it, which calls it again
            out = original(*args)
            for _, tensor in results(out):
                writer.keep.append(tensor)
                writer.custom.add(id(tensor))
            return out
        if self.recorder.quiet or self.recorder.below:
            return original(*args)
        if cls is CheckpointFunction:  # recomputing is the plan's business: record what is checkpointed
            return args[0](*args[2:])
        draft = Draft("", "function", f"{cls.__module__}.{cls.__qualname__}", writer.scope[-1], custom=True)
        writer.emit(draft, "call_function", CustomFunction(cls), args, {})
        self.costs.current = draft
        watched = tensors_in(args)
        versions = [t._version for t in watched]
        with self.silent(writer.scope[-1]):
            out = original(*args)
        changed = [t for t, v in zip(watched, versions, strict=True) if t._version != v]
        writer.finish(draft, results(out), changed)
        return out

    @contextmanager
    def silent(self, path: str) -> Iterator[None]:
        """Inside a leaf nothing is recorded, only counted."""
        self.recorder.quiet += 1
        self.writer.scope.append(path)
        try:
            yield
        finally:
            self.writer.scope.pop()
            self.recorder.quiet -= 1


def _no_objects(value: Any) -> Any:
    raise Opaque(f"a Python object of type {type(value).__name__}")


def _without_backward_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Full backward hooks wrap inputs in an autograd function; the folded call runs them, the recording need not."""
    hooks, pre = dict(module._backward_hooks), dict(module._backward_pre_hooks)
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()
    try:
        return call_module(module, *args, **kwargs)
    finally:
        module._backward_hooks.update(hooks)
        module._backward_pre_hooks.update(pre)


@contextmanager
def routed(calls: Calls) -> Iterator[None]:
    """Send every module call and ``Function.apply`` of this process through ``calls``."""
    if not _ONE_TRACE.acquire(timeout=600):
        raise TraceError("another thread of this process has been tracing for ten minutes")
    module_call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return calls(self, args, kwargs)

    def patched_apply(cls: type, *args: Any) -> Any:
        return calls.function(cls, apply.__get__(None, cls), args)

    def convert(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for tensor in [*self.parameters(recurse), *self.buffers(recurse)]:
            if isinstance(tensor, FakeTensor) and fn(tensor) is not tensor:
                raise TraceError(f"{calls.writer.where} converts the weights of a module in its forward: do it before")
        return self

    with ExitStack() as stack:
        stack.callback(_ONE_TRACE.release)
        stack.enter_context(calls.recorder.vmapped())
        stack.enter_context(converting_modules(convert))
        stack.enter_context(compiled_function_stance())
        nn.Module.__call__ = call  # type: ignore[method-assign]
        torch.autograd.Function.apply = classmethod(patched_apply)  # type: ignore[assignment]
        try:
            yield
        finally:
            nn.Module.__call__ = module_call  # type: ignore[method-assign]
            torch.autograd.Function.apply = apply  # type: ignore[assignment]
