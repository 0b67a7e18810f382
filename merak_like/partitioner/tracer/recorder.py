"""Watch every torch call of one forward pass: run it on fakes, write it down, and answer questions about data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from merak_like._compat import DATA_DEPENDENT, FakeTensor, around_vmap, tensor_methods, unset_fake
from merak_like.partitioner.tracer import guards
from merak_like.partitioner.tracer.below import Below
from merak_like.partitioner.tracer.costs import Costs
from merak_like.partitioner.tracer.counting import tensors_in
from merak_like.partitioner.tracer.draft import Draft, ReadsData
from merak_like.partitioner.tracer.errors import TraceError
from merak_like.partitioner.tracer.fakes import FakeModel
from merak_like.partitioner.tracer.shadow import Chance, Shadow, Unknowable, refuse
from merak_like.partitioner.tracer.shapes import SHAPE_RULES, run_with_real
from merak_like.partitioner.tracer.words import EFFECTS, FORBIDDEN, QUERIES, RANDOM, READERS
from merak_like.partitioner.tracer.writer import Writer, outputs_of

_METHODS = MappingProxyType(tensor_methods())


class Recorder(TorchFunctionMode):
    """Records while ``quiet`` is 0; inside a leaf it only counts."""

    def __init__(self, fake: FakeModel, device: torch.device, memo: bool) -> None:
        super().__init__()
        self.writer = Writer(fake, device)
        self.costs = Costs(fake.mode, fake.tensors, self.writer.keep, memo)
        self.shadow = Shadow(self.writer.inputs, self.writer.constants, fake.lasting)
        self.quiet = 0
        self.running = False
        """Whether a recorded function runs: what it calls itself is part of it."""
        self.rehearsing = False
        self.below = False
        self.dynamic = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", None) or type(func).__name__
        writer, costs = self.writer, self.costs
        if self.below:
            return func(*args, **kwargs)
        if self.rehearsing:
            out = func(*args, **kwargs)
            costs.tally(name, args, kwargs, tensors_in(out))
            return out
        if self.quiet:
            out = self.run(func, name, args, kwargs)
            if outs := tensors_in(out):
                costs.tally(name, args, kwargs, outs)
                for t in outs:
                    writer.leaf_of[id(t)] = writer.scope[-1]
                    writer.keep.append(t)
            return out
        if name in READERS and any(isinstance(t, FakeTensor) for t in args[:1]):
            return self.read(func, name, args, kwargs)
        if name in FORBIDDEN:
            raise TraceError(f"{name}() inside the forward of {writer.where} cannot be part of a recorded graph")
        ins = tensors_in(args) + tensors_in(kwargs) if kwargs else tensors_in(args)
        versions = [t._version for t in ins]
        before = costs.current
        draft = costs.current = Draft("", "function", name, writer.scope[-1])
        self.dynamic = False
        try:
            out = self.run(func, name, args, kwargs)
        except RuntimeError:  # a tensor where torch wants a Python number reads its data in C++
            args, kwargs = self.numbers(args), self.numbers(kwargs)
            out = self.run(func, name, args, kwargs)
        changed = [t for t, version in zip(ins, versions, strict=True) if t._version != version]
        if name in EFFECTS and not (name == "__set__" and not ins):
            changed = ins[:1]
        found = outputs_of(out)
        if not found and not changed:
            if not ins or name == "__get__" or name in QUERIES or name.startswith("is_"):
                costs.current = before
                return out
            raise TraceError(
                f"{name}() in {writer.where} takes a tensor and returns none: the trace cannot tell what it changes"
            )
        if not changed and found and all(any(t is a for a in ins) for _, t in found):
            costs.current = before
            return out  # nothing happened: .to() of what is there already, .contiguous() of what is
        self.write(draft, func, name, args, kwargs)
        writer.finish(draft, found, changed)
        costs.tally(name, args, kwargs, [t for _, t in found])
        if self.dynamic:
            for _, tensor in found:
                self.guard(guards.check_shape, (tensor, tuple(tensor.shape), writer.where))
        return out

    def vmapped(self) -> AbstractContextManager[None]:
        """Record one level below while a vmapped function runs."""

        @contextmanager
        def switch() -> Iterator[None]:
            if self.quiet:
                yield
                return
            self.below = True
            try:
                with Below(self.writer, self.costs):
                    yield
            finally:
                self.below = False

        return around_vmap(switch)

    def run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call the function on fakes, with the rules for those that need data or have no fake kernel."""
        rule = SHAPE_RULES.get(name)
        if rule is not None and any(isinstance(t, FakeTensor) for t in tensors_in(args)):
            made = rule(*args, **kwargs)
            if made is not None:
                return made
        memo, before, self.running = self.costs.memo, self.running, True
        try:
            return memo.run(func, name, args, kwargs, self.writer.state()) if memo else func(*args, **kwargs)
        except DATA_DEPENDENT as error:
            if self.quiet:
                raise self.reads_data(name, Unknowable("it depends on the model's activations")) from error
            self.dynamic = True
            try:
                return run_with_real(func, name, args, kwargs, self.real_value)
            except Unknowable as reason:
                raise self.reads_data(name, reason) from error
        finally:
            self.running = before

    def real_value(self, tensor: torch.Tensor) -> torch.Tensor:
        """The data behind a fake tensor for the traced example; see Shadow.value."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        node = self.writer.nodes.get(id(tensor))
        if node is not None:
            return self.shadow.value(node)
        name = self.writer.fake.names.get(id(tensor), "")
        if name not in self.writer.fake.lasting or any(name in draft.mutates for draft in self.writer.drafts):
            raise Unknowable("it depends on the model's weights or buffers")
        return self.writer.fake.lasting[name]

    def read(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A question about data: answer it for the example and leave a guard in the code."""
        try:
            return func(*args, **kwargs)  # constants know their data
        except (*DATA_DEPENDENT, RuntimeError, TypeError, ValueError):
            pass
        try:
            real = [self.real_value(t) if isinstance(t, torch.Tensor) else t for t in args]
        except Unknowable as reason:
            raise self.reads_data(name, reason) from None
        with unset_fake():
            answer = getattr(real[0], name)(*real[1:], **kwargs)
        if len(tensors_in(args)) == 1:
            self.guard(guards.check_value, (args[0], name, answer, self.writer.where))
        return answer

    def reads_data(self, name: str, reason: Unknowable) -> Exception:
        """What to raise for data that is not known: a module below the top may stay whole, unless chance decides."""
        error = refuse(f"{name}()", self.writer.where, reason)
        path = self.writer.scope[-1]
        return ReadsData(path, error) if path and not isinstance(reason, Chance) else error

    def numbers(self, item: Any) -> Any:
        """Integer scalars on tensors as the Python numbers they are in the traced example, each with its guard."""
        if isinstance(item, FakeTensor) and not item.dim() and not item.is_floating_point() and not item.is_complex():
            return self.read(torch.Tensor.item, "item", (item,), {})
        if isinstance(item, (tuple, list)):
            return type(item)(self.numbers(x) for x in item)
        return {k: self.numbers(v) for k, v in item.items()} if isinstance(item, dict) else item

    def guard(self, check: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Leave a check in the code: the answer that was followed must hold for every batch."""
        draft = Draft("", "guard", check.__name__, self.writer.scope[-1])
        self.writer.emit(draft, "call_function", check, args, {})
        self.writer.finish(draft, [], [])

    def write(self, draft: Draft, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """Emit the node that repeats this torch call."""
        emit = self.writer.emit
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__
            draft.target = f"{'set' if name == '__set__' else 'get'}attr {attribute}"
            op = setattr if name == "__set__" else getattr
            emit(draft, "call_function", op, (args[0], attribute, *args[1 : 2 if op is setattr else 1]), {})
        elif args and isinstance(args[0], torch.Tensor) and (method := _METHODS.get(func)) is not None:
            draft.kind, draft.target = "method", method
            emit(draft, "call_method", method, args, kwargs)
        else:
            draft.target = f"{getattr(func, '__module__', None) or 'torch'}.{name}"
            emit(draft, "call_function", func, args, kwargs)
        if name in RANDOM:
            assert draft.node is not None
            draft.node.meta["random"] = True
