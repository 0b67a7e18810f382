"""Stages that are elsewhere: to an engine they are stages like any other, and their work is to send and to receive.

    edge   head ─► Leaves              Arrives ─► tail          one rank, four stages
    host           Arrives ─► cloud's half ─► Leaves            the stages in the middle may be on several ranks

What `Leaves` does forward is a send and backward a receive; `Arrives` is the other end. So the engine's loop, its
orders and its random streams serve a cut over a slow link without knowing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merak_like.runtime.links import Spec
from merak_like.runtime.stage import Stage
from merak_like.split.exchange import Exchange, Link


@dataclass(frozen=True)
class Nothing:
    """What such a stage runs, as far as an engine asks."""

    sent: tuple[str, ...] = ()
    results: tuple[str, ...] = ()


class Leaves:
    """Values go to the other end; their gradients come from there."""

    def __init__(self, exchange: Exchange, link: Link, specs: Sequence[Spec]) -> None:
        self.exchange, self.specs = exchange, tuple(specs)
        self.link: Link = link
        self.code = Nothing()

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """Send what the stage before made."""
        self.exchange.put(self.link, "forward", micro_batch, self.leaving(micro_batch, batch, received), self.specs)
        return {}

    def leaving(self, micro_batch: int, batch: Any, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is sent of it: all as it is."""
        return received

    def recompute(self, micro_batch: int) -> None:
        """There is nothing to do again."""

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Wait for the gradients."""
        back = [spec for spec in self.specs if spec.requires_grad]
        return self.exchange.take(self.link, "backward", micro_batch, back)

    def weight(self, micro_batch: int) -> None:
        """There are no weights."""


class Arrives:
    """Values come from the other end; their gradients go there. Some values are made here again instead."""

    def __init__(
        self, exchange: Exchange, link: Link, specs: Sequence[Spec], names: Sequence[str],
        again: Callable[[Any], Mapping[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """``names`` are the values it hands on; ``again`` makes those of a batch that do not travel."""
        self.exchange, self.specs, self.again = exchange, tuple(specs), again
        self.link: Link = link
        self.code = Nothing(tuple(names))

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """Wait for the values."""
        found = self.exchange.take(self.link, "forward", micro_batch, self.specs)
        return {**found, **(self.again(batch) if self.again is not None else {})}

    def recompute(self, micro_batch: int) -> None:
        """There is nothing to do again."""

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send the gradients; what had no part in the loss has zeros."""
        back = [spec for spec in self.specs if spec.requires_grad]
        device = next(iter(gradients.values())).device if gradients else torch.device("cpu")
        missing = [spec for spec in back if spec.name not in gradients]
        zeros = {s.name: torch.zeros(s.shape, dtype=s.dtype, device=device) for s in missing}
        self.exchange.put(self.link, "backward", micro_batch, {**gradients, **zeros}, back)
        return {}

    def weight(self, micro_batch: int) -> None:
        """There are no weights."""


class Shown(Stage):
    """A stage whose results can be looked at after the step: the logits of the edge's tail."""

    shown: dict[int, dict[str, Tensor]]
    """The model's outputs by micro-batch."""

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """As the stage itself."""
        made = super().forward(micro_batch, batch, received, put_off=put_off)
        self.__dict__.setdefault("shown", {})[micro_batch] = {n: made[n].detach() for n in self.code.results}
        return made
