"""An edge that learns at home, by AdaSplit's contrastive loss (adasplit.py), over a line on which no gradient returns.

    head ──► features ──► contrastive loss on the edge's own labels ──► gradients of the head
                └───────► to the host, where it hears this edge in this step; labels with them

Both ends are stages like any other, so that checkpoints, order and doing a step again are those of any edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from merak_like.runtime.links import Spec
from merak_like.split.adasplit import contrastive
from merak_like.split.elsewhere import Arrives, Leaves
from merak_like.split.exchange import Exchange
from merak_like.split.halves import LABELS
from merak_like.split.messages import LocalText

if TYPE_CHECKING:
    from merak_like.split.programs import HalfPrograms

PROJECTOR = "contrast_projector"
"""The name under which an edge's model has what the loss compares; the host's has none."""


def feature(sent: Sequence[Spec]) -> Spec:
    """The one value that a cut sends. Raises ValueError where there are more."""
    found = [spec for spec in sent if spec.dtype.is_floating_point and spec.requires_grad]
    if len(found) != 1 or len(found[0].shape) < 2:
        shapes = [spec.shape for spec in sent]
        raise ValueError(f"local learning compares one value a sample, and the cut sends {shapes}: cut elsewhere")
    return found[0]


def projector(sent: Sequence[Spec], text: LocalText, seed: int) -> nn.Module:
    """A layer from a sample's features to ``width`` numbers."""
    spec = feature(sent)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(prod(spec.shape[1:]), text.width, dtype=spec.dtype)


class Contrasted(Leaves):
    """Values go to the other end where it listens; their gradients are of a loss at home."""

    def __init__(
        self, exchange: Exchange, specs: Sequence[Spec], text: LocalText, share: float, compare: nn.Module
    ) -> None:
        """``compare`` is the projector; ``share`` a micro-batch's of a step."""
        super().__init__(exchange, "up", specs)
        self._text, self._share, self._compare, self._name = text, share, compare, feature(specs).name
        self._live: dict[int, tuple[Tensor, Tensor]] = {}
        self.losses: dict[int, float] = {}
        """Of the last step's micro-batches, each with its share."""

    def forward(
        self, micro_batch: int, batch: Any, received: Mapping[str, Tensor], *, put_off: bool = False
    ) -> dict[str, Tensor]:
        """Compare, and send where the other end listens; an evaluation is always sent."""
        if torch.is_grad_enabled():
            x = received[self._name].detach().requires_grad_()
            loss = contrastive(self._compare(x.flatten(1)), batch[LABELS], self._text.temperature)
            loss = self._share * (loss + self._text.sparse * x.abs().mean())
            self._live[micro_batch], self.losses[micro_batch] = (x, loss), float(loss.detach())
        if self.exchange.heard or not self.exchange.training:
            super().forward(micro_batch, batch, received)
        return {}

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the loss; nothing is waited for."""
        x, loss = self._live.pop(micro_batch)
        loss.backward()
        assert x.grad is not None
        return {self._name: x.grad}


def loss_at_home(programs: HalfPrograms, parts: Sequence[Any]) -> float:
    """Of the last step on these micro-batches."""
    stages = {stage for part in parts for stage in programs.at(part).stages.values() if isinstance(stage, Contrasted)}
    return sum(loss for stage in stages for loss in stage.losses.values())


class Hears(Arrives):
    """Values come from the other end; nothing goes back."""

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients end here."""
        return {}
