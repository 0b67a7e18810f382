"""The end of a step: the one global norm, clipping, the update, and the numbers every rank shall see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from merak_like.runtime.finite import Guard
from merak_like.runtime.initialize import World
from merak_like.runtime.watch import Watch

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What one step gave; the same on every rank."""

    loss: float
    """Mean over all items (target tokens, or samples) of the global batch."""
    grad_norm: float
    """Of all gradients of the model together, each counted once, before clipping."""
    tokens: int
    """Items the loss is the mean of."""
    skipped: bool = False
    """Whether the weights were left as they were, because the loss or a gradient was not finite."""


@dataclass(frozen=True)
class Slot:
    """A weight as the optimizer has it: the parameter itself, its copy in full precision, or a share of either."""

    name: str
    target: nn.Parameter
    """What the optimizer updates."""
    shape: tuple[int, ...]
    """Of this rank's parameter."""
    run: tuple[int, int] | None = None
    """``target`` is flat and holds these of the parameter's numbers, in row-major order; None: all, in their shape."""
    counted: bool = True
    """Whether this rank counts its gradient in the norm."""


class Store(Protocol):
    """Holds the weights that the optimizer updates, where those are not the model's parameters."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer's step and bring the new weights into the model's parameters."""
        ...

    def publish(self) -> None:
        """Bring the weights into the model's parameters."""
        ...


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    """For a rank whose tensors are the model's."""
    return tensor


def everything(name: str, gradient: Tensor) -> Iterable[Tensor]:
    """For a rank that has its weights whole."""
    return (gradient,)


class Update:
    """Turns summed gradients into new weights, or refuses to."""

    def __init__(
        self, slots: Sequence[Slot], optimizer: torch.optim.Optimizer | None, *, max_grad_norm: float | None,
        guard: Guard, store: Store | None = None, answers: Callable[[str, Tensor], Iterable[Tensor]] = everything,
        rate: Callable[[int, float], float] | None = None, whole: Callable[[str, Tensor], Tensor] = as_it_is,
    ) -> None:  # fmt: skip
        """``store`` is where the targets lie that are not the model's parameters themselves.

        ``rate`` is a learning-rate schedule: from a step and a group's own rate to the rate it learns at.
        ``answers`` gives the parts of a named gradient that this one of several tensor-parallel ranks counts;
        ``whole`` gives a named tensor of the model, whole on the first of the replicas that share its rows.
        """
        self.slots, self.optimizer, self.guard = slots, optimizer, guard
        self.max_grad_norm = max_grad_norm
        self._store, self._rate, self._whole = store, rate, whole
        self._own = [group["lr"] for group in optimizer.param_groups] if optimizer and rate else []
        self._counted = {slot.name: _counted(slot, answers) for slot in slots if slot.counted}

    def begin(self, step: int) -> None:
        """Give the optimizer the rate of this step: what treats gradients may ask for it."""
        if self.optimizer is not None and self._rate is not None:
            for group, own in zip(self.optimizer.param_groups, self._own, strict=True):
                group["lr"] = self._rate(step, own)

    def squares(self) -> float:
        """This rank's share of the squared norm of all gradients."""
        found = [(slot, slot.target.grad) for slot in self.slots if slot.counted]
        return squared_norm([p for slot, grad in found if grad is not None for p in self._counted[slot.name](grad)])

    def apply(self, found: StepResult, step: int, blame: Callable[[], str]) -> StepResult:
        """Clip, and step. ``found`` has the norm of the gradients as they are, scaled.

        Where it is not finite the step is skipped, or FloatingPointError raised with what ``blame()`` says.
        """
        scale = self.guard.scale
        result = replace(found, grad_norm=found.grad_norm / scale)
        if not self.guard.passes(result.loss, result.grad_norm, step, blame):
            return replace(result, skipped=True)
        factor = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (result.grad_norm + 1e-6))
        if factor / scale != 1:
            for slot in self.slots:
                if slot.target.grad is not None:
                    slot.target.grad.mul_(factor / scale)
        if self.optimizer is not None:
            if self._store is None:
                self.optimizer.step()
            else:
                self._store.step(self.optimizer)
        return result

    def entries(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's ``state_dict`` with its parameters themselves; every rank asks."""
        return {name: self._whole(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    @torch.no_grad()
    def adopt(self, parameters: Mapping[str, Tensor]) -> None:
        """Bring some of the model's parameters, filled from elsewhere, into what the optimizer updates."""
        for slot in self.slots:
            found = parameters.get(slot.name)
            if found is not None and found is not slot.target:
                slot.target.copy_(found if slot.run is None else found.flatten()[slice(*slot.run)])
        self.publish()

    def publish(self) -> None:
        """Bring targets that were changed otherwise, as by a checkpoint, into the model's parameters."""
        if self._store is not None:
            self._store.publish()


def _counted(slot: Slot, answers: Callable[[str, Tensor], Iterable[Tensor]]) -> Callable[[Tensor], Iterable[Tensor]]:
    """From a gradient of a slot to what this rank counts of it."""
    if slot.run is None:
        return lambda gradient: answers(slot.name, gradient)
    marks = torch.zeros(slot.shape, dtype=torch.bool, device=slot.target.device)
    for part in answers(slot.name, marks):
        part.fill_(True)
    mine = marks.flatten()[slice(*slot.run)]
    if mine.all():
        return lambda gradient: (gradient,)
    return (lambda gradient: (gradient[mine],)) if mine.any() else lambda gradient: ()


def squared_norm(gradients: Sequence[Tensor]) -> float:
    """Sum of squares of all their elements."""
    return torch.nn.utils.get_total_norm(list(gradients)).double().square().item() if gradients else 0.0


def agree_on(numbers: Mapping[str, float], world: World, watch: Watch) -> dict[str, float]:
    """Sum some numbers over all ranks, in one small collective."""
    if world.alone:
        return dict(numbers)
    total: Tensor = torch.tensor(list(numbers.values()), dtype=torch.float64, device=world.device)
    watch.wait(dist.all_reduce(total, async_op=True), "the sum of the step's numbers", "with all ranks")
    return dict(zip(numbers, total.tolist(), strict=True))
