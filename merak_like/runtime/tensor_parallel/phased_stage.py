"""A stage at work whose collectives run under its compute.

Autograd's graph ends at every collective. A sum is started where its summand is made, rows are gathered where they are
made, and both are waited for where they are read. Backward it is the same, and the gradient of an entry is sent on its
way before the gradients of weights are computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from merak_like.partitioner.tracer.example import leaf
from merak_like.runtime import rng
from merak_like.runtime.recompute import Again
from merak_like.runtime.split_backward import PutOff, SplitBackward
from merak_like.runtime.stage_code import Piece, current_state, set_state
from merak_like.runtime.tensor_parallel.collectives import Flight
from merak_like.runtime.tensor_parallel.in_flight import Gradients, Key, Values
from merak_like.runtime.tensor_parallel.segments import Converted, PhasedCode, Segment


@dataclass
class Ran:
    """One run of a segment, between its forward and its backward."""

    later: PutOff
    begins: dict[str, Begin] = field(default_factory=dict[str, "Begin"])
    """Where its graph begins, by what was read there."""
    ends: dict[str, GradientEdge] = field(default_factory=dict[str, GradientEdge])
    """Where it ends, by what was made there."""
    again: Again | None = None


class Begin:
    """A value where a segment's graph begins. The graph does not hold it: what operations keep of it is theirs."""

    grad: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The value, as the graph's beginning."""
        return _Begin.apply(torch.empty(0, device=value.device, requires_grad=True), value.detach(), self)  # type: ignore[return-value]


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, begin: Begin) -> Tensor:
        ctx.begin = begin
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.begin.grad = grads[0]
        return None, None, None


@dataclass
class Live:
    """A micro-batch between its forward and its backward."""

    put_off: bool
    ran: dict[tuple[int, int | None], Ran] = field(default_factory=dict[tuple[int, int | None], Ran])
    later: list[PutOff] = field(default_factory=list[PutOff])


class PhasedStage:
    """Runs the actions F, R, B and W of micro-batches, as ``Stage`` does."""

    def __init__(
        self, code: PhasedCode, inputs: Mapping[str, tuple[Any, ...]], device: torch.device,
        pending: Counter[int] | None = None, keeping: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """As ``Stage``."""
        self.code, self.device, self.keeping = code, device, keeping
        self.paths = {name: inputs[name] for name in code.inputs}
        self.live: dict[int, Live] = {}
        self.waiting: dict[int, list[PutOff]] = {}
        self._pending: Counter[int] = Counter() if pending is None else pending
        self._changing: dict[str, list[Tensor]] = {}
        self._forward, self._backward = code.forward(), code.backward()
        readers = Counter(name for segment in code.segments for name in segment.pieces[0].received)
        entries = [[entry.name for entry in segment.entries] for segment in code.segments]
        self._brief = [[name for name in names if readers[name] == 1] for names in entries]
        """For each segment, what it alone reads of what was made for it."""
        read = [
            [id(p) for p in code.segments[at].pieces[share or 0].module.parameters()] for at, share in self._backward
        ]
        times = Counter(key for keys in read for key in keys)
        self._often = [key for keys in read for key in keys if times[key] > 1]
        by_segment = {at: keys for (at, _), keys in zip(self._backward, read, strict=True)}
        self._often_in = {at: [key for key in keys if times[key] > 1] for at, keys in by_segment.items()}

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """Run one micro-batch; the values made, by name, detached."""
        values = Values(self.code)
        for name, path in self.paths.items():
            values.put((name, None), leaf(batch, path).to(self.device))
        for name in self.code.received:
            values.put((name, None), received[name])
        live, states, state = Live(put_off), dict[int, Tensor](), current_state(self.device.type)
        try:
            with self.keeping():
                for at, share in self._forward:
                    if share is not None and self.code.segments[at].pieces[share].random:
                        if share:  # every share draws what all samples draw, and takes its rows
                            rng.resume(states[at], self.device)
                        else:
                            states[at] = rng.state(self.device)
                    ran = self._run(at, share, values, put_off)
                    if torch.is_grad_enabled():
                        live.ran[at, share] = ran
        finally:
            set_state(self.device.type, state)
        if torch.is_grad_enabled():
            self.live[micro_batch] = live
        sent = {name: values.get((name, None)) for name in self.code.sent}
        return sent | {name: values.get((value, None)) for name, value in self.code.results.items()}

    def _run(self, at: int, share: int | None, values: Values, put_off: bool) -> Ran:
        segment = self.code.segments[at]
        piece = segment.pieces[share or 0]
        for entry in segment.entries:
            if not values.has((entry.name, share)):
                _enter(entry, share, values)
        ran = Ran(later=PutOff(self._pending))
        args = [_begun(name, values.get((name, share)), ran) for name in piece.received]
        args = [arg.clone() if n in segment.changed else arg for n, arg in zip(piece.received, args, strict=True)]
        for name in self._brief[at]:
            values.forget((name, share))
        with SplitBackward(ran.later):
            given = self._call(piece, args, ran)
        made = dict(zip(piece.made, given, strict=True))
        for name, value in made.items():
            values.put((name, share), value)
            if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                ran.ends[name] = get_gradient_edge(value)
        for one in segment.sums:
            values.send((one.name, share), one.node(share).start(made[one.source]), made[one.source].requires_grad)
        after = self.code.after(at)
        for entry in after.entries if after is not None else ():
            if not values.on_its_way((entry.source, share)):
                _enter(entry, share, values)
        return ran

    def _call(self, piece: Piece, args: list[Any], ran: Ran) -> tuple[Any, ...]:
        if not piece.again or not torch.is_grad_enabled():
            return piece.run(*args)
        ran.again = Again(piece, args, self.device, self._changing.get(piece.name, piece.buffers))
        made = ran.again.first(args)
        if piece.name not in self._changing:
            self._changing[piece.name] = ran.again.changed()
        return made

    def recompute(self, micro_batch: int) -> None:
        """Run again, once, the segments whose activations were not kept. What was summed is there: nothing is sent."""
        state = current_state(self.device.type)
        try:
            for ran in self.live[micro_batch].ran.values():
                if ran.again is not None:
                    with SplitBackward(ran.later):
                        ran.again.run()
        finally:
            set_state(self.device.type, state)

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch backward from the gradients of what it made; the gradients of what it received."""
        self.recompute(micro_batch)
        live = self.live.pop(micro_batch)
        flowing, back = Gradients(self.code), dict[Key, Tensor | Flight | None]()
        for name, gradient in gradients.items():
            flowing.add((self.code.results.get(name, name), None), gradient)
        self._expect(1)
        for at, share in self._backward:
            segment, ran = self.code.segments[at], live.ran[at, share]
            self._expect(-1, at)
            self._back(segment, share, ran, flowing, back)
            before = self.code.before(at)
            for one in before.sums if before is not None else ():
                if one.node(share).sends_back and not flowing.on_its_way((one.name, share)):
                    back[one.name, share] = _leave(one, share, flowing)
            if live.put_off:
                live.later.append(ran.later)
            else:  # while the gradients of the entries are on their way
                ran.later.run()
            live.ran.pop((at, share))
        if live.put_off:
            self.waiting[micro_batch] = live.later
        found = {name: flowing.take((name, None)) for name in self.code.received}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def _expect(self, more: int, at: int | None = None) -> None:
        """Count, for weights that several runs read, the runs to come: until then their gradients are not whole."""
        for key in self._often if at is None else self._often_in[at]:
            self._pending[key] += more

    def _back(
        self, segment: Segment, share: int | None, ran: Ran, flowing: Gradients, back: dict[Key, Tensor | Flight | None]
    ) -> None:
        """``back`` are the gradients of sums that are on their way already."""
        for one in segment.sums:
            key = one.name, share
            flowing.add((one.source, share), back.pop(key) if key in back else _leave(one, share, flowing))
        roots = [(end, g) for name, end in ran.ends.items() if (g := flowing.take((name, share))) is not None]
        if roots:
            torch.autograd.backward([end for end, _ in roots], [gradient for _, gradient in roots])
        for name, begin in ran.begins.items():
            flowing.add((name, share), begin.grad)
        for entry in segment.entries:
            gradient = flowing.take((entry.name, share))
            if gradient is not None:
                flowing.add((entry.source, share), entry.node(share).start_back(gradient))

    def weight(self, micro_batch: int) -> None:
        """Compute the gradients of weights that the backward of this micro-batch put off."""
        for later in self.waiting.pop(micro_batch):
            later.run()


def _enter(entry: Converted, share: int | None, values: Values) -> None:
    """Start what makes an entry of its source."""
    source = values.get((entry.source, share))
    if isinstance(source, Tensor):
        values.send(
            (entry.name, share), entry.node(share).start(source), torch.is_grad_enabled() and source.requires_grad
        )
    else:
        values.put((entry.name, share), source)


def _leave(one: Converted, share: int | None, flowing: Gradients) -> Tensor | Flight | None:
    """Start what makes the gradient of a sum that of its summand."""
    gradient = flowing.take((one.name, share))
    return None if gradient is None else one.node(share).start_back(gradient)


def _begun(name: str, value: Any, ran: Ran) -> Any:
    """What a segment is given."""
    if not isinstance(value, Tensor) or not (value.requires_grad and torch.is_grad_enabled()):
        return value
    ran.begins[name] = Begin()
    return ran.begins[name](value)
