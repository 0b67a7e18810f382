"""A stage at work: its code, and the micro-batches that are between their forward and their backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tracer.example import leaf
from merak_like.runtime.recompute import Again
from merak_like.runtime.split_backward import PutOff, SplitBackward
from merak_like.runtime.stage_code import Piece, StageCode, current_state, set_state


@dataclass
class Live:
    """What a micro-batch leaves behind in its forward for its backward."""

    received: Mapping[str, Tensor]
    later: PutOff
    put_off: bool
    """Whether a W follows the B."""
    made: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    again: list[Again] = field(default_factory=list[Again])


class Stage:
    """Runs the actions F, R, B and W of micro-batches; gradients add up in the parameters' ``grad``."""

    def __init__(
        self, code: StageCode, inputs: Mapping[str, tuple[Any, ...]], device: torch.device,
        pending: Counter[int] | None = None, keeping: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """``pending`` counts the gradients that wait for a W, by the ``id`` of the parameter; ``keeping`` is on while
        autograd's graph is made, and may decide what it keeps."""
        self.code, self.device, self.keeping = code, device, keeping
        self.paths = {name: inputs[name] for name in code.inputs}
        self.live: dict[int, Live] = {}
        self.waiting: dict[int, PutOff] = {}
        """The micro-batches between their B and their W."""
        self._pending: Counter[int] = Counter() if pending is None else pending
        self._changing: dict[str, list[Tensor]] = {}
        """Buffers that a recomputed piece was seen to change."""

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """Run one micro-batch; the values made, by name, detached. Values must arrive under the names of the plan.

        A received value that needs a gradient must say so by its ``requires_grad``. With ``put_off`` the backward
        leaves gradients of weights to ``weight``.
        """
        values = {name: leaf(batch, path).to(self.device) for name, path in self.paths.items()}
        grads = torch.is_grad_enabled()
        boundary = {
            name: received[name].detach().requires_grad_(grads and received[name].requires_grad)
            for name in self.code.received
        }
        values.update(boundary)
        live = Live(boundary, PutOff(self._pending), put_off)
        state = current_state(self.device.type)
        try:
            with self.keeping():
                for piece in self.code.pieces:
                    args = [values[name] for name in (*piece.inputs, *piece.received)]
                    with SplitBackward(live.later) if put_off else nullcontext():
                        given = self._run(piece, args, live) if grads else piece.run(*args)
                    values.update(zip(piece.made, given, strict=True))
        finally:
            set_state(self.device.type, state)
        made = {name: values[name] for name in (*self.code.sent, *self.code.results)}
        if grads:  # a backward starts from what is sent and from the loss
            live.made = {name: value for name, value in made.items() if name in self.code.sent or name == "loss"}
            self.live[micro_batch] = live
        return {name: value.detach().requires_grad_(value.requires_grad) for name, value in made.items()}

    def _run(self, piece: Piece, args: list[Tensor], live: Live) -> tuple[Tensor, ...]:
        if not piece.again:
            return piece.run(*args)
        again = Again(piece, args, self.device, self._changing.get(piece.name, piece.buffers))
        live.again.append(again)
        made = again.first(args)
        if piece.name not in self._changing:
            self._changing[piece.name] = again.changed()
        return made

    def recompute(self, micro_batch: int) -> None:
        """Run again, once, the pieces of a micro-batch whose activations were not kept."""
        live = self.live[micro_batch]
        if not live.again:
            return
        state = current_state(self.device.type)
        try:
            for again in live.again:
                with SplitBackward(live.later) if live.put_off else nullcontext():
                    again.run()
        finally:
            set_state(self.device.type, state)

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one micro-batch backward from the gradients of what it made; the gradients of what it received.

        What was not kept and is not there again yet is computed first.
        """
        self.recompute(micro_batch)
        live = self.live.pop(micro_batch)
        if live.put_off:
            self.waiting[micro_batch] = live.later
        roots = [(live.made[n], g) for n, g in gradients.items() if live.made[n].requires_grad]
        if roots:
            torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])
        return {name: t.grad for name, t in live.received.items() if t.grad is not None}

    def weight(self, micro_batch: int) -> None:
        """Compute the gradients of weights that the backward of this micro-batch put off."""
        self.waiting.pop(micro_batch).run()
