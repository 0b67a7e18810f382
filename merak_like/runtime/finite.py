"""Numbers that are not finite: noticed before the weights change, and traced to the first module that made one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merak_like._compat import tree_leaves
from merak_like.partitioner.schedules.action import Action
from merak_like.runtime import collect
from merak_like.runtime.initialize import World
from merak_like.runtime.watch import Watch


@dataclass
class LossScale:
    """The one factor that every rank multiplies the loss with, so that small gradients are not lost in float16.

    It is halved when a gradient overflowed, and doubled after ``interval`` good steps (Micikevicius et al., ICLR 2018,
    section 3.2); None: it stays. All ranks see the same norm, so all have the same factor.
    """

    value: float = 2.0**16
    interval: int | None = 2000
    patience: int = 1
    """Overflows since it was last doubled until it is halved, and then at each."""
    good: int = 0
    """Good steps since it last changed."""
    overflows: int = 0
    """Since it was last doubled."""

    def after(self, finite: bool) -> None:
        """Take note of a step."""
        self.good = self.good + 1 if finite else 0
        if self.interval is None:
            return
        if not finite:
            self.overflows += 1
            self.value /= 2 if self.overflows >= self.patience else 1
        elif self.good == self.interval:
            self.value, self.good, self.overflows = self.value * 2, 0, 0


@dataclass
class Guard:
    """What becomes of a step that is not finite: skipped, up to ``limit`` in a row, then an error."""

    limit: int = 0
    loss_scale: LossScale | None = None
    skipped: int = field(default=0, init=False)
    """Steps skipped in a row."""

    @property
    def scale(self) -> float:
        """What the loss is multiplied with."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def passes(self, loss: float, norm: float, step: int, blame: Callable[[], str]) -> bool:
        """Whether the step may change the weights. Raises FloatingPointError where it may not be skipped either."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and self.skipped >= self.limit:
            where = blame()
            after = f" after {self.skipped} skipped steps in a row" if self.skipped else ""
            raise FloatingPointError(
                f"step {step}: the loss is {loss} and the gradient norm {norm}{after}; {where}; the weights are as "
                "they were before the step"
            )
        self.skipped = 0 if finite else self.skipped + 1
        if self.loss_scale is not None:
            self.loss_scale.after(finite)
        return finite

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        scale = self.loss_scale
        return {"skipped": self.skipped, "scale": None if scale is None else (scale.value, scale.good, scale.overflows)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on as the job that was saved."""
        self.skipped = saved["skipped"]
        if self.loss_scale is not None and saved["scale"] is not None:
            self.loss_scale.value, self.loss_scale.good, *rest = saved["scale"]
            self.loss_scale.overflows = sum(rest)


class Witness:
    """Watches a forward for the first number that is not finite, micro-batch by micro-batch."""

    def __init__(self, model: nn.Module, numbers: Sequence[int], batches: Iterable[Any]) -> None:
        """``numbers`` are those of this replica's micro-batches among all replicas'."""
        self.model, self.numbers, self.batches = model, numbers, list(batches)
        self._now: Action | None = None
        self.seen: dict[int, tuple[int, str]] = {}
        """Micro-batch to stage and what it was."""

    @contextmanager
    def watching(self) -> Iterator[Callable[[Callable[[Action], object]], Callable[[Action], object]]]:
        """Hooks on every module; yields what to wrap the forward action with. Buffers are put back at the end."""
        buffers = [(b, b.clone()) for b in self.model.buffers() if not b.is_meta]
        hooks = [
            module.register_forward_hook(self._hook(f"{name} ({type(module).__name__})"))
            for name, module in self.model.named_modules()
            if name
        ]
        try:
            yield self._noting
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def _noting(self, forward: Callable[[Action], object]) -> Callable[[Action], object]:
        def noting(action: Action) -> None:
            self._now = action
            if _bad(self.batches[action.micro_batch]):
                self._note("the batch itself")
            forward(action)

        return noting

    def _hook(self, what: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if _bad(inputs):  # an operation between two modules made it
                self._note(f"the input of {what}")
            elif _bad(output):
                self._note(what)

        return look

    def _note(self, what: str) -> None:
        if self._now is not None:
            self.seen.setdefault(self.numbers[self._now.micro_batch], (self._now.stage, what))


def _bad(values: Any) -> bool:
    return any(
        isinstance(t, Tensor)
        and (t.is_floating_point() or t.is_complex())
        and not t.is_meta  # of a batch that another rank has
        and not t.isfinite().all()
        for t in tree_leaves(values)
    )


def report(
    seen: Mapping[int, tuple[int, str]], gradients: Mapping[str, Tensor | None], stage_of: Mapping[str, int],
    world: World, watch: Watch,
) -> str:  # fmt: skip
    """Where it began, in words; every rank calls it and says the same. Parameters are in the order of the forward."""
    bad = [name for name, gradient in gradients.items() if gradient is not None and _bad(gradient)]
    last = [(stage_of[bad[-1]], bad[-1])] if bad else []  # the backward meets it first
    everyone = collect.from_all((dict(seen), last), world, watch)
    first: dict[int, tuple[int, str]] = {}
    for micro_batch, where in (item for one, _ in everyone for item in one.items()):
        first[micro_batch] = min(where, first.get(micro_batch, where))
    if first:
        told = "; ".join(
            f"micro-batch {index}: first in {what} of stage {stage}"
            for index, (stage, what) in sorted(first.items())[:4]
        )
        return f"in micro-batches {sorted(first)} ({told})"
    late = max((where for _, one in everyone for where in one), default=None)
    where = f", seen first in the gradient of {late[1]} of stage {late[0]}" if late else ""
    return f"the forward of every micro-batch is finite, the backward is not{where}"
