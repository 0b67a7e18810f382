"""What an edge does to what it sends: signs, a norm and noise, a loss against what they tell (B-SL; binarised.py).

    head ──► signs ──► at most a norm, plus noise ──► codec, line        the host knows of none of it
      ▲        │
      └── gradients from the host, and of ``leak`` times the distance correlation of samples and what is sent

Only values that a layer made are touched; masks and positions are not. None of it is a proof of anything: measure with
``merak edge leakage``, which hears what is sent through the same screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merak_like.partitioner.tracer.example import leaves
from merak_like.runtime.links import Spec
from merak_like.split.binarised import clip_noise, leak_loss, sign
from merak_like.split.elsewhere import Leaves
from merak_like.split.exchange import Exchange, coded


@dataclass(frozen=True)
class Screen:
    """What is done; by default nothing."""

    signs: bool = False
    """Send +1 and -1; gradients pass where a number is within them."""
    norm: float | None = None
    """The most that a sample's norm may be."""
    noise: float = 0.0
    """Deviation of the noise's norm, in such norms."""
    leak: float = 0.0
    """Weight of the loss against dependence, beside the task's."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that mean nothing."""
        if (self.norm is not None and self.norm <= 0) or self.noise < 0 or self.leak < 0:
            raise ValueError(f"{self}: a norm is above 0, noise and leak are not below")
        if self.noise and self.norm is None:
            raise ValueError(f"noise={self.noise} is in norms of a sample: say the norm that samples are clipped to")


class Screened(Leaves):
    """Values go to the other end through a screen."""

    def __init__(self, exchange: Exchange, specs: Sequence[Spec], screen: Screen, share: float, seed: int) -> None:
        """``share`` is a micro-batch's of a step; ``seed`` of the noise, which a step that is done again draws again.

        Raises ValueError for a loss against leaks where no gradient comes back to the head.
        """
        super().__init__(exchange, "up", specs)
        self.screen, self._share, self._seed = screen, share, seed
        self._own = [spec.name for spec in specs if coded(spec, frozen=exchange.frozen)]
        self._live: dict[int, tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]] = {}
        if screen.leak and not any(spec.requires_grad for spec in specs):
            raise ValueError("leak is a loss for the edge's head, which is not trained here: leave one of them out")

    def leaving(self, micro_batch: int, batch: Any, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is sent of it."""
        grads, screen = torch.is_grad_enabled(), self.screen
        entered = {n: received[n].detach().requires_grad_(grads and received[n].requires_grad) for n in self._own}
        made = dict(entered)
        for place, (name, x) in enumerate(entered.items()):
            x = sign(x) if screen.signs else x
            if screen.norm is not None:
                generator = torch.Generator().manual_seed(hash((self._seed, self.exchange.step, micro_batch, place)))
                drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
                x = clip_noise(x, screen.norm, screen.noise, drawn)
            made[name] = x
        if grads:
            self._live[micro_batch] = entered, made, self._leak(batch, made) if screen.leak else None
        return {**received, **{name: x.detach() for name, x in made.items()}}

    def backward(self, micro_batch: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Wait for the gradients, and take them through the screen."""
        found = super().backward(micro_batch, gradients)
        entered, made, leak = self._live.pop(micro_batch)
        roots = [(made[name], found.pop(name)) for name in self._own if name in found]
        roots += [] if leak is None else [(leak, torch.full_like(leak, self._share))]
        if roots:
            torch.autograd.backward([x for x, _ in roots], [g for _, g in roots])
        return {**found, **{name: x.grad for name, x in entered.items() if x.grad is not None}}

    def _leak(self, batch: Any, made: Mapping[str, Tensor]) -> Tensor:
        """Mean over what is sent, of how much it depends on the batch's numbers."""
        some = [x for x in leaves(batch).values() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1]
        if not some:
            raise ValueError(
                "leak compares samples by their numbers, and this batch has none, ids of tokens at most: leave it out"
            )
        sent = [z for z in made.values() if z.requires_grad]
        x = torch.cat([one.flatten(1).to(sent[0]) for one in some], 1)
        if any(len(z) != len(x) for z in sent):
            raise ValueError(f"leak needs what is sent a row a sample, found {[tuple(z.shape) for z in sent]}")
        return self.screen.leak * torch.stack([leak_loss(x, z) for z in sent]).mean()
