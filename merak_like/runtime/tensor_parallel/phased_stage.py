"""A stage at work whose collectives run under its compute.

Autograd's graph ends at every collective. A sum is started where its summand is made and waited for where it is read;
backward, the gradient of an entry is sent on its way before the gradients of weights are computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tracer.example import leaves
from merak_like.runtime import rng
from merak_like.runtime.recompute import Again
from merak_like.runtime.split_backward import PutOff, SplitBackward
from merak_like.runtime.stage_code import Piece, current_state, set_state
from merak_like.runtime.tensor_parallel.collectives import Reduce
from merak_like.runtime.tensor_parallel.in_flight import Flight, Gradients, Values
from merak_like.runtime.tensor_parallel.phases import PhasedCode, Segment


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
            given = self._call(piece, [leaf.clone() if n in segment.changed else leaf for n, leaf in own.items()], ran)
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
