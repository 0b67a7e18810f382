"""The weights that a group shares: held once, changed by one optimizer, from the gradients of those in a round.

A round of clients i with gradients g_i of the mean loss of n_i items each:

    g = sum_i (n_i / n) g_i        rate = clients^alpha * lr

The rate is SplitLr of SGLR (Pal et al. 2021, "Server-side local gradient averaging and learning rate acceleration for
scalable split learning"). With one client that is its own step, to the last bit. Buffers such as running means are put
together alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from merak_like.split import checkpoint
from merak_like.split.checkpoint import State
from merak_like.split.crew import Crew
from merak_like.split.groups import GroupText
from merak_like.split.half import Made
from merak_like.split.layers import weighted
from merak_like.split.sharded import fitting, part, whole
from merak_like.split.training import optimizer_of, rate


@dataclass(frozen=True)
class Part:
    """What one client brings to a round."""

    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    items: int
    """That its loss is the mean of, as far as the host can count them."""
    session: str = ""
    member: str = ""
    loss: float = 0.0


class Common:
    """Shared weights and their optimizer."""

    def __init__(self, made: Made, text: GroupText, crew: Crew) -> None:
        """They are those of a half that was built, on each rank its part."""
        self._crew, self._shards, self._fixed = crew, made.shards, {f"buffers/{name}" for name in made.fixed}
        own = set(made.own)
        named = dict(made.model.named_parameters())
        self.text = text
        self.weights: dict[str, nn.Parameter] = {n: p for n, p in named.items() if n in own and not p.is_meta}
        self.buffers = {n: b.clone() for n, b in made.model.named_buffers() if n in own and not b.is_meta}
        self.trained = tuple(made.trained)
        learning = [self.weights[name] for name in self.trained]
        self.optimizer = optimizer_of(text.optimizer)(learning) if learning else None

    def learn(self, parts: Sequence[Part], update: int) -> None:
        """Change the weights, once; nothing is changed if this raises before the optimizer's step."""
        shares = [part.items / sum(each.items for each in parts) for part in parts]
        for name in self.trained:
            found = [(s, p.gradients[name]) for s, p in zip(shares, parts, strict=True) if name in p.gradients]
            self.weights[name].grad = _sum(found) if found else None
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.text.optimizer, update, float(len(parts)) ** self.text.alpha)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.mean_buffers(parts)

    def seen_by_one(self) -> Mapping[str, nn.Parameter]:
        """The parameters that a session's half is built of: these themselves."""
        return self.weights

    def show(self, member: str, model: nn.Module) -> None:
        """Let a session's weights be what its member sees: they are these already."""

    def mean_buffers(self, parts: Sequence[Part]) -> None:
        """Put running means together, weighted by items."""
        shares = [part.items / sum(each.items for each in parts) for part in parts]
        for name, own in self.buffers.items():
            each = [part.buffers[name] for part in parts]
            if own.dtype.is_floating_point:
                own.copy_(weighted(shares, each))
            else:  # a count of batches
                own.copy_(torch.stack(each).amax(0) if own.dtype != torch.bool else each[0])

    def state(self) -> State:
        """Everything of it that training changes; on rank 0, and every rank is asked."""
        return self._crew.gather(self._mine(), partial(whole, self._shards))

    def _mine(self) -> State:
        """What this rank has of it."""
        optimizer = checkpoint.optimizer_state(self.optimizer, self.trained)
        tensors = {
            **checkpoint.under("weights/", {name: self.weights[name].detach() for name in self.trained}),
            **checkpoint.under("buffers/", self.buffers), **checkpoint.under("optimizer/", optimizer.tensors),
        }  # fmt: skip
        return State(tensors, {"optimizer": dict(optimizer.facts)})

    def restore(self, state: State | None) -> None:
        """Go back, or on, to a state that rank 0 has; every rank is told.

        Raises ValueError, before anything is changed, where it is of another model.
        """
        shared = self._crew.share(state)
        self._crew.each(lambda: self._restore(self._part(shared)))

    def _part(self, shared: State) -> State:
        return State({name: part(self._shards, name, t) for name, t in shared.tensors.items()}, shared.facts)

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        """Go to this rank's part of a state."""
        mine = {
            **checkpoint.under("weights/", {name: self.weights[name] for name in self.trained}),
            **checkpoint.under("buffers/", self.buffers),
        }
        theirs = {n: t for n, t in state.tensors.items() if n.startswith(("weights/", "buffers/"))}
        for name in fitting(mine, theirs, self._fixed, alone=self._crew.world.alone):
            mine[name].copy_(theirs[name])
        optimizer = State(checkpoint.of("optimizer/", state.tensors), state.facts["optimizer"])
        if "groups" in optimizer.facts:
            checkpoint.load_optimizer(self.optimizer, self.trained, optimizer)


def _sum(found: Sequence[tuple[float, Tensor]]) -> Tensor:
    (share, first), *more = found
    total = first * share
    for share, gradient in more:
        total.add_(gradient, alpha=share)
    return total
