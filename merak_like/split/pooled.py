"""Cut-layer gradients that clients of a round have in common (SplitAvg of SGLR; see ``common`` for the source).

Of C clients in a round, phi * C are drawn. Each of them gets, for each place of a micro-batch, the mean of what all of
them would get; the others get their own. It mixes gradients of unrelated samples, so all must have the same shape.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from merak_like.runtime.links import Spec
from merak_like.split.exchange import Exchange, Link, Way

Blend = Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From a micro-batch and its gradients to those that go back."""


class Pooled(Exchange):
    """An exchange whose gradients at the cut may be others' too."""

    blend: Blend | None = None

    def put(self, link: Link, way: Way, micro_batch: int, values: Mapping[str, Tensor], specs: Sequence[Spec]) -> None:
        """Send, blended where it is the edge's gradient."""
        if self.blend is not None and specs and link == "up" and way == "backward":
            values = self.blend(micro_batch, values)
        super().put(link, way, micro_batch, values, specs)


class AtCut:
    """The same where the steps of a round go side by side (abreast.py): who brings last has the mean, for all."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        """Of those that are drawn, in the order in which their gradients are added."""
        self.exchanges = exchanges
        self._brought: dict[int, dict[int, Mapping[str, Tensor]]] = {}
        self._lock = threading.Lock()  # replicas bring by threads of their own

    def bring(self, exchange: Exchange, micro_batch: int, values: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """One's gradients for a micro-batch; the mean where all are there, to be sent by each exchange."""
        place = next(i for i, one in enumerate(self.exchanges) if one is exchange)
        with self._lock:
            brought = self._brought.setdefault(micro_batch, {})
            brought[place] = values
            if len(brought) < len(self.exchanges):
                return None
            del self._brought[micro_batch]
        return mean([brought[i] for i in range(len(self.exchanges))])


def mean(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Place by place. Raises ValueError for gradients of different shapes."""
    for name in found[0]:
        shapes = sorted({tuple(each[name].shape) for each in found if name in each})
        if len(shapes) != 1 or any(name not in each for each in found):
            raise ValueError(
                f"phi takes the mean of gradients of one shape, the clients of this round have {shapes}: give all "
                "the same batch size and length, or use alpha alone"
            )
    return {name: torch.stack([each[name] for each in found]).mean(0) for name in found[0]}
