"""``topk`` and ``randtopk``: the largest elements of every sample, and where they are.

Top-k sends, of each sample's features, the k largest by magnitude; the rest arrive as zero (Aji and Heafield 2017,
"Sparse Communication for Distributed Gradient Descent", for gradients). The gradient of what was not sent is zero
too, so the backward sends only the elements whose forward was sent, and no indices. Randomised top-k takes about a
share ``alpha`` of the k from the other features, at random, while training, so that all of them get trained (Zheng et
al. 2023, "Reducing Communication for Split Learning by Randomized Top-k Sparsification" (IJCAI)).

k is the share of features, rounded up. Values keep their dtype: chain a quantiser behind. NaN counts as largest, and
passes. A gradient whose forward went by another codec (``int8|topk(0.1)``) has indices of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from merak_like.runtime.codecs.bits import index_bytes, pack_indices, unpack_indices
from merak_like.runtime.codecs.codec import Codec, Context, by_sample, require_floating
from merak_like.runtime.codecs.wire import Layout, from_bytes, layout_of, to_bytes

OWN, AS_FORWARD = b"\x00", b"\x01"


@dataclass(eq=False)
class TopK(Codec):
    """``share`` of every sample's features, the largest."""

    name: ClassVar[str] = "topk"
    share: float = 0.1
    _sent: dict[tuple[int, int], Tensor] = field(init=False, default_factory=dict, repr=False)
    """Indices of this step's forward transfers, by step and micro-batch."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"{self.text}: the share of features must be above 0 and at most 1, found {self.share}")

    def pack(self, x: Tensor, context: Context) -> tuple[Tensor, bytes]:
        require_floating(layout_of(x), self.text)
        indices = self._forward_of(context)
        if indices is not None:
            self._require_fit(indices, layout_of(x), context)
            return x.reshape(-1)[indices], AS_FORWARD
        samples, features = by_sample(tuple(x.shape))
        chosen = self.choose(x.reshape(samples, features), self._kept(features), context)
        mask = torch.zeros(samples, features, dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
        indices = mask.view(-1).nonzero().view(-1)  # in order, in less time than by sorting
        self._remember(indices, context)
        return x.reshape(-1)[indices], OWN + to_bytes(pack_indices(indices, x.numel()))

    def unpack(self, body: Tensor, side: bytes, layout: Layout, context: Context) -> Tensor:
        require_floating(layout, self.text)
        if side == AS_FORWARD:
            indices = self._forward_of(context)
            if indices is None:
                raise ValueError(
                    f"the frame of {self._transfer(context)} counts on the indices of its forward, which this end does "
                    f"not have: repeat the forward"
                )
            self._require_fit(indices, layout, context)
            wanted = Layout((indices.numel(),), layout.dtype)
        else:
            samples, features = by_sample(layout.shape)
            wanted = Layout((samples * self._kept(features),), layout.dtype)
            data = from_bytes(side[1:], torch.uint8, body.device)
            indices = unpack_indices(data, wanted.numel, layout.numel)
        if layout_of(body) != wanted or side[:1] not in (OWN, AS_FORWARD):
            raise ValueError(f"the frame is malformed: {self.text} makes of {layout} a body of {wanted}")
        if side != AS_FORWARD:
            self._remember(indices, context)
        x = body.new_zeros(layout.numel)
        x[indices] = body
        return x.view(layout.shape)

    def packed(self, layout: Layout, context: Context) -> tuple[Layout, int]:
        require_floating(layout, self.text)
        samples, features = by_sample(layout.shape)
        count = samples * self._kept(features)
        return Layout((count,), layout.dtype), 1 if context.answers else 1 + index_bytes(count, layout.numel)

    def choose(self, x: Tensor, count: int, context: Context) -> Tensor:
        """The features to send: (samples, count) indices of (samples, features)."""
        return x.abs().topk(count, 1, sorted=False).indices

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{step}.{micro_batch}": indices for (step, micro_batch), indices in self._sent.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        sent: dict[tuple[int, int], Tensor] = {}
        for name, indices in state.items():
            step, _, micro_batch = name.partition(".")
            if not (step.isdigit() and micro_batch.isdigit()):
                raise ValueError(f"the state of {self.text} has steps and micro-batches as in '3.0', found {name!r}")
            sent[int(step), int(micro_batch)] = indices
        self._sent = sent

    def forget(self, samples: object = None) -> None:
        self._sent.clear()

    def _kept(self, features: int) -> int:
        # Without the rounding 0.07 * 100 is 7.000000000000001, and one more is kept.
        return min(features, ceil(round(self.share * features, 6)))

    def _forward_of(self, context: Context) -> Tensor | None:
        return self._sent.get((context.step, context.micro_batch)) if context.answers else None

    def _remember(self, indices: Tensor, context: Context) -> None:
        if context.direction == "forward" and context.training and context.paired:
            # A step's backward transfers end before the next step's forward ones begin.
            self._sent = {key: kept for key, kept in self._sent.items() if key[0] == context.step}
            self._sent[context.step, context.micro_batch] = indices

    def _require_fit(self, indices: Tensor, layout: Layout, context: Context) -> None:
        count = self.packed(layout, context)[0].numel
        if indices.numel() != count or (count and int(indices[-1]) >= layout.numel):
            raise ValueError(f"the gradient of {self._transfer(context)} is {layout}: its forward had another shape")


@dataclass(eq=False)
class RandTopK(TopK):
    """``topk`` with, while training, each of the k drawn from the other features with probability ``alpha``."""

    name: ClassVar[str] = "randtopk"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{self.text}: alpha is a probability, 0 to 1, found {self.alpha}")

    def choose(self, x: Tensor, count: int, context: Context) -> Tensor:
        top = super().choose(x, count, context)
        others = x.shape[1] - count
        if not context.training or not others or not count:
            return top
        random = context.generator(self.text, x.device)
        replaced = torch.rand(top.shape, generator=random, device=x.device) < self.alpha
        replaced &= x.gather(1, top).isfinite()  # what is not finite must be seen
        replaced &= replaced.cumsum(1) <= others
        keys = torch.rand(x.shape, generator=random, device=x.device).scatter_(1, top, 2.0)
        drawn = keys.topk(min(count, others), 1, largest=False).indices  # distinct, and none of the top
        which = (replaced.cumsum(1) - 1).clamp(min=0)
        return torch.where(replaced, drawn.gather(1, which), top)
