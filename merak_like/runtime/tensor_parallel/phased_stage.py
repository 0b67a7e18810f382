"""A stage at work whose collectives run under its compute.

Autograd's graph ends at every collective. A sum is started where its summand is made and waited for where it is read;
backward, the gradient of an entry is sent on its way before the gradients of weights are computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tracer.example import leaves
from merak_like.runtime import rng
from merak_like.runtime.recompute import Again
from merak_like.runtime.split_backward import PutOff, SplitBackward
from merak_like.runtime.stage_code import Piece, current_state, set_state
from merak_like.runtime.tensor_parallel.collectives import PEER, Enter, Reduce
from merak_like.runtime.tensor_parallel.phases import PhasedCode, Segment

Key = tuple[str, int | None]
"""A value and the share of samples; None for all samples."""


@dataclass
class Flight:
    """A sum on its way."""

    tensor: Tensor
    work: Any
    node: Enter | Reduce

    @classmethod
    def start(cls, tensor: Tensor, node: Enter | Reduce) -> Flight:
        """Sum a tensor over ranks, in place."""
        return cls(tensor, node.group.begin(tensor, node.what), node)

    def land(self) -> Tensor:
        """Wait for it."""
        if self.work is not None:
            self.node.group.watch.wait(self.work, self.node.what, PEER)
            self.work = None
        return self.tensor


@dataclass
class Ran:
    """One run of a segment, between its forward and its backward."""

    leaves: Mapping[str, Tensor]
    made: Mapping[str, Any]
    later: PutOff
    again: Again | None


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
        pending: Counter[int] | None = None,
    ) -> None:  # fmt: skip
        self.code, self.device = code, device
        self.paths = {name: inputs[name] for name in code.inputs}
        self.live: dict[int, Live] = {}
        self.waiting: dict[int, list[PutOff]] = {}
        self._pending: Counter[int] = Counter() if pending is None else pending
        self._changing: dict[str, list[Tensor]] = {}
        self._forward, self._backward = code.forward(), code.backward()
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
        found = leaves(batch) if self.paths else {}
        values = Values(self.code)
        for name, path in self.paths.items():
            values.put((name, None), found[path].to(self.device))
        for name in self.code.received:
            values.put((name, None), received[name])
        live, states, state = Live(put_off), dict[int, Tensor](), current_state(self.device.type)
        try:
            for at, share in self._forward:
                segment = self.code.segments[at]
                if share is not None and segment.pieces[share].random:
                    if share:  # every share draws what all samples draw, and takes its rows
                        rng.resume(states[at], self.device)
                    else:
                        states[at] = rng.state(self.device)
                ran = self._run(segment, share, values, put_off)
                if torch.is_grad_enabled():
                    live.ran[at, share] = ran
        finally:
            set_state(self.device.type, state)
        if torch.is_grad_enabled():
            self.live[micro_batch] = live
        sent = {name: values.get((name, None)) for name in self.code.sent}
        return sent | {name: values.get((value, None)) for name, value in self.code.results.items()}

    def _run(self, segment: Segment, share: int | None, values: Values, put_off: bool) -> Ran:
        piece = segment.pieces[share or 0]
        for entry in segment.entries:
            values.put((entry.name, share), values.get((entry.source, share)))
        own = {name: _leaf(values.get((name, share))) for name in piece.received}
        ran = Ran(own, {}, PutOff(self._pending), None)
        with SplitBackward(ran.later):
            given = self._call(piece, list(own.values()), ran)
        ran.made = dict(zip(piece.made, given, strict=True))
        for name, value in ran.made.items():
            values.put((name, share), value)
        for one in segment.sums:
            values.put((one.name, share), Flight.start(_summand(ran.made[one.source], one.node), one.node))
            values.grads[one.name, share] = ran.made[one.source].requires_grad
        return ran

    def _call(self, piece: Piece, args: list[Any], ran: Ran) -> tuple[Any, ...]:
        if not piece.again or not torch.is_grad_enabled():
            return piece.module(*args)
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
        flowing = Gradients(self.code)
        for name, gradient in gradients.items():
            flowing.add((self.code.results.get(name, name), None), gradient)
        self._expect(1)
        for at, share in self._backward:
            segment, ran = self.code.segments[at], live.ran[at, share]
            self._expect(-1, at)
            self._back(segment, share, ran, flowing)
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

    def _back(self, segment: Segment, share: int | None, ran: Ran, flowing: Gradients) -> None:
        for one in segment.sums:
            flowing.add((one.source, share), flowing.take((one.name, share)))
        roots = [
            (value, gradient)
            for name, value in ran.made.items()
            if isinstance(value, Tensor) and value.requires_grad
            and (gradient := flowing.take((name, share))) is not None
        ]  # fmt: skip
        if roots:
            torch.autograd.backward([value for value, _ in roots], [gradient for _, gradient in roots])
        for name, leaf in ran.leaves.items():
            if isinstance(leaf, Tensor) and leaf.grad is not None:
                flowing.add((name, share), leaf.grad)
        for entry in segment.entries:
            gradient = flowing.take((entry.name, share))
            if gradient is not None:
                flowing.add((entry.source, share), Flight.start(gradient.contiguous(), entry.node))

    def weight(self, micro_batch: int) -> None:
        """Compute the gradients of weights that the backward of this micro-batch put off."""
        for later in self.waiting.pop(micro_batch):
            later.run()


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _summand(made: Tensor, node: Reduce) -> Tensor:
    own = made.detach()
    return own if node.own and own.is_contiguous() else own.clone(memory_format=torch.contiguous_format)


class Values:
    """The values of one micro-batch as it runs, detached, for all samples or by share, whichever is asked for."""

    def __init__(self, code: PhasedCode) -> None:
        self._code = code
        self._there: dict[Key, Any] = {}
        self.grads: dict[Key, bool] = {}
        """Whether a sum on its way will need a gradient."""

    def put(self, key: Key, value: Any) -> None:
        """A value that was made, or is on its way."""
        needs = torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad
        self._there[key] = value.detach().requires_grad_(needs) if isinstance(value, Tensor) else value

    def get(self, key: Key) -> Any:
        """The value, waited for, cut or put together as need be."""
        if key not in self._there:
            self._there[key] = self._converted(*key)
        value = self._there[key]
        if isinstance(value, Flight):
            needs = torch.is_grad_enabled() and self.grads[key]
            value = self._there[key] = value.land().requires_grad_(needs)
        return value

    def _converted(self, name: str, share: int | None) -> Any:
        dim = self._code.dims[name]
        if share is None:
            parts = [self.get((name, j)) for j in range(len(self._code.shares))]
            whole = parts[0] if dim is None else torch.cat([part.detach() for part in parts], dim)
            return whole.detach().requires_grad_(parts[0].requires_grad) if isinstance(whole, Tensor) else whole
        whole = self.get((name, None))
        if dim is None or not isinstance(whole, Tensor):
            return whole
        return _rows(whole.detach(), self._code, dim, share).requires_grad_(whole.requires_grad)


def _rows(whole: Tensor, code: PhasedCode, dim: int, share: int) -> Tensor:
    start, stop = code.shares[share]
    each = whole.shape[dim] // code.samples
    return whole.narrow(dim, start * each, (stop - start) * each)


class Gradients:
    """The gradients of one micro-batch's values as they flow back, each added up when it is taken."""

    def __init__(self, code: PhasedCode) -> None:
        self._code = code
        self._found: dict[Key, list[Tensor | Flight]] = {}
        self._whole: dict[str, Tensor | None] = {}

    def add(self, key: Key, gradient: Tensor | Flight | None) -> None:
        """A part of a value's gradient."""
        if gradient is not None:
            self._found.setdefault(key, []).append(gradient)

    def take(self, key: Key) -> Tensor | None:
        """All of a value's gradient; None if nothing read it. It is taken in the form the value was made in."""
        name, share = key
        dim = self._code.dims.get(name)
        total = self._sum(key)
        if share is None:
            shares = [self._sum((name, j)) for j in range(len(self._code.shares))]
            return _added(total, *self._together(shares, dim))
        if name not in self._whole:
            self._whole[name] = self._sum((name, None))
        whole = self._whole[name]
        if whole is None or (dim is None and share):
            return total
        return _added(total, whole if dim is None else _rows(whole, self._code, dim, share).clone())

    def _together(self, shares: list[Tensor | None], dim: int | None) -> Iterator[Tensor]:
        there = [part for part in shares if part is not None]
        if dim is None:
            yield from there
        elif there:
            each = there[0].shape[dim] // next(
                b - a for (a, b), g in zip(self._code.shares, shares, strict=True) if g is not None
            )
            sizes = [each * (stop - start) for start, stop in self._code.shares]
            like = there[0]
            zeros = [like.new_zeros((*like.shape[:dim], size, *like.shape[dim + 1 :])) for size in sizes]
            yield torch.cat([zero if part is None else part for part, zero in zip(shares, zeros, strict=True)], dim)

    def _sum(self, key: Key) -> Tensor | None:
        found = self._found.pop(key, [])
        return _added(*(part.land() if isinstance(part, Flight) else part for part in found))


def _added(*parts: Tensor | None) -> Tensor | None:
    total: Tensor | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total + part
    return total
