"""A half on several ranks: what breaks on one must not leave the other ranks in the middle of a step.

What may break is the way to the edge, and a stage that a client's batch does not suit. That rank goes on with zeros. At
the end of the step, before any weight changes, all ranks hear that it came to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.schedules.action import Action
from merak_like.runtime.data_parallel import Gradients
from merak_like.runtime.links import Links, Spec
from merak_like.runtime.stage_code import StageCode
from merak_like.runtime.watch import PeerError
from merak_like.split.crew import Crew
from merak_like.split.elsewhere import Shown
from merak_like.split.exchange import Channel, Exchange, Link, Way


class Enduring(Exchange):
    """Keeps what went wrong instead of raising it."""

    broken: Exception | None = None
    """What went wrong in this step first."""
    stuck = False
    """Whether a stage of this rank failed: then they compute no more in this step. Where only the way to the edge
    broke, they go on, for tensor-parallel ranks that nothing happened to compute along with them."""
    place = 0
    """Where its step is among those that go side by side."""

    def begin(self, channel: Channel, step: int, samples: Sequence[tuple[int, ...]], *, training: bool = True) -> None:
        """As any exchange, with nothing wrong yet."""
        self.settled()
        super().begin(channel, step, samples, training=training)

    def put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        """Send, unless the step is lost already."""
        if self.broken is None:
            try:
                super().put(link, way, micro_batch, values, specs)
            except Exception as error:
                self.broken = error

    def take(self, link: Link, way: Way, micro_batch: int, specs: Sequence[Spec]) -> dict[str, Tensor]:
        """Receive; zeros once the step is lost."""
        if self.broken is None:
            try:
                return super().take(link, way, micro_batch, specs)
            except Exception as error:
                self.broken = error
        grown = [(s, torch.zeros(s.shape, dtype=s.dtype, device=self.device)) for s in specs]
        return {s.name: x.requires_grad_() if s.requires_grad and way == "forward" else x for s, x in grown}

    def settled(self) -> Exception | None:
        """What went wrong; from now on nothing has."""
        error, self.broken, self.stuck = self.broken, None, False
        return error


class Sturdy(Shown):
    """A stage that makes zeros once something broke here; its backward then has nothing to give."""

    def __init__(
        self, code: StageCode, inputs: Mapping[str, tuple[Any, ...]], device: torch.device, exchange: Exchange,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    ) -> None:  # fmt: skip
        """``shapes``: of all it may make."""
        super().__init__(code, inputs, device)
        self.exchange, self.shapes = exchange, shapes

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """As the stage, as long as all is well."""
        mind = self.exchange
        if not isinstance(mind, Enduring):
            return super().forward(micro_batch, batch, received, put_off=put_off)
        if not mind.stuck:
            try:
                return super().forward(micro_batch, batch, received, put_off=put_off)
            except PeerError:
                raise
            except Exception as error:
                mind.broken, mind.stuck = mind.broken or error, True
        names = dict.fromkeys((*self.code.sent, *self.code.results))
        return {n: torch.zeros(self.shapes[n][0], dtype=self.shapes[n][1], device=self.device) for n in names}

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the stage, as long as all is well."""
        mind = self.exchange
        if isinstance(mind, Enduring) and mind.stuck:
            self.live.pop(micro_batch, None)
            return {}
        return super().backward(micro_batch, gradients)


class Together:
    """Links whose flush asks all ranks whether the step stands."""

    def __init__(self, links: Links, crew: Crew, exchange: Exchange, reducer: Gradients) -> None:
        """``reducer`` has the sums that some replicas have begun when the step turns out to be lost."""
        self.links, self.crew, self.exchange, self.reducer = links, crew, exchange, reducer

    def post(self, action: Action, specs: Sequence[Spec]) -> None:
        """As the links."""
        self.links.post(action, specs)

    def take(self, action: Action) -> dict[str, Tensor]:
        """As the links."""
        return self.links.take(action)

    def send(self, action: Action, specs: Sequence[Spec], values: Mapping[str, Tensor]) -> None:
        """As the links."""
        self.links.send(action, specs, values)

    def flush(self) -> None:
        """As the links; then raises on every rank what broke on one."""
        self.links.flush()
        self.exchange.over()
        error = self.exchange.settled() if isinstance(self.exchange, Enduring) else None
        try:
            self.crew.agree(error)
        except Exception as why:
            if self.crew.agreed(why):
                self.reducer.finish()
            raise
