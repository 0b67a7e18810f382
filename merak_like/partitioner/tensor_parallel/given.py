"""What a unit is given when it is run alone: weights, the batch, and what other units made.

Values that carry a gradient are random. Others (masks, rotary tables, positions) mean something, so the steps that lead
to them are run at their real size and the beginning of every dimension is taken. Where that would take too much, or
leads through the model itself, a stand-in must do: numbers, zeros for indices, a chequered mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel.axes import Axes
from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tensor_parallel.follow import Followed
from merak_like.partitioner.tensor_parallel.perform import arguments, perform, wide
from merak_like.partitioner.tensor_parallel.ranks import SHAKE
from merak_like.partitioner.tensor_parallel.tiny import shape
from merak_like.partitioner.tensor_parallel.units import VIEWS
from merak_like.partitioner.tracer import Trace
from merak_like.partitioner.tracer.example import leaves
from merak_like.partitioner.tracer.fine import Name, Step

MOST = 1 << 25
"""Elements of the values on the way to a mask or table, to run it at its real size."""


SAME = VIEWS | frozenset("pad long int to contiguous clone where masked_fill roll cat setitem clamp".split())
"""Operations that leave rows of a table what they are."""


def stand_in(size: tuple[int, ...], dtype: torch.dtype, made: torch.Generator) -> Tensor:
    """Positive numbers, zeros for integers, a chequered mask: in every row of it both are found."""
    if dtype == torch.bool:
        place = torch.zeros(size, dtype=torch.int64)
        for dim, n in enumerate(size):
            place += torch.arange(n).view(-1, *[1] * (len(size) - 1 - dim))
        return place % 2 == 0
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(size, dtype=dtype)
    if len(size) > 1:
        return torch.randn(size, generator=made, dtype=torch.float64) / size[-1] ** 0.5
    return 0.5 + torch.rand(size, generator=made, dtype=torch.float64)


def beginning(tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    """The first elements along every dimension."""
    return tensor[tuple(slice(0, n) for n in size)]


@dataclass
class Sources:
    """A model, its fine trace and a batch: where a unit's tensors come from."""

    model: nn.Module
    traced: Trace
    steps: Sequence[Step]
    batch: Any
    made: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        found = leaves(self.batch)
        self.inputs = {name: found[path] for name, path in self.traced.inputs.items()}
        self.tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.maker = {step.name: step for step in self.steps}
        self.changes: dict[str, list[Step]] = {}
        for step in self.steps:
            for name in step.mutates:
                self.changes.setdefault(name, []).append(step)
        self.known: dict[str, Any] = {}

    def weights(self, followed: Followed, axes: Axes) -> dict[str, Tensor]:
        """Those of the unit, real ones shaken and cut to size."""
        found = {name: self.weight(name, shape(axes, dims)) for name, dims in followed.weights.items()}
        for step in followed.unit.steps:
            if step.kind == "module":
                own = [name for name in self.tensors if name.startswith(f"{step.target}.") and name not in found]
                found |= {name: self.weight(name, tuple(self.tensors[name].shape)) for name in own}
        return found

    def weight(self, name: str, size: tuple[int, ...]) -> Tensor:
        """A parameter or buffer in float64."""
        tensor = self.tensors[name]
        if tensor.is_meta:
            return stand_in(size, tensor.dtype, self.made).requires_grad_(tensor.requires_grad)
        cut = wide(beginning(tensor.detach(), size)).cpu()
        if isinstance(tensor, nn.Parameter) and cut.is_floating_point():
            cut = cut + SHAKE * torch.randn(cut.shape, generator=self.made, dtype=torch.float64)
        return cut.requires_grad_(tensor.requires_grad)

    def constants(self, followed: Followed, axes: Axes) -> dict[str, Any]:
        """Those that the unit reads, cut to size."""
        found = dict(self.traced.constants)
        for name in found.keys() & followed.outer:
            found[name] = beginning(found[name], shape(axes, followed.values[name, 0]))
        return found

    def values(self, followed: Followed, axes: Axes) -> dict[str, Any]:
        """What comes from the batch and from other units."""
        steps = followed.unit.steps
        own = {step.name for step in steps}
        names = [n.name for step in steps for _, n in flatten((step.args, step.kwargs)) if n.kind == "value"]
        parents = {step.args[0].name for step in steps if step.kind == "item"} - own
        names = [name for name in dict.fromkeys(names) if name not in own and name not in parents]
        names += [step.name for step in steps if step.kind == "item" and step.args[0].name in parents]
        begin = min(step.index for step in steps)
        found = {name: self.value(name, shape(axes, followed.values[name, 0]), followed, begin) for name in names}
        tables = _tables(followed, axes)
        for step in steps:
            if step.kind == "input":
                found[step.name] = self.input(step, shape(axes, followed.values[step.name, 0]), tables)
        return found

    def value(self, name: str, size: tuple[int, ...], followed: Followed, begin: int) -> Tensor:
        """A value made elsewhere."""
        known = followed.known[name]
        if known.grad:
            return torch.randn(size, generator=self.made, dtype=torch.float64).requires_grad_()
        if name not in self.known:
            self.compute(name, begin)
        tensor = self.known.get(name)
        if not isinstance(tensor, Tensor):
            return stand_in(size, getattr(torch, known.dtype), self.made)
        return beginning(tensor, size)

    def input(self, step: Step, size: tuple[int, ...], tables: Mapping[str, int]) -> Any:
        """A tensor of the batch: numbers are random, and so is what picks rows of a table or says the right class."""
        given = self.inputs[step.name]
        if not isinstance(given, Tensor):
            return given
        if given.is_floating_point():
            return torch.randn(size, generator=self.made, dtype=torch.float64)
        cut = beginning(given.cpu(), size)
        if step.name not in tables:
            return cut
        drawn = torch.randint(0, tables[step.name], cut.shape, generator=self.made, dtype=cut.dtype)
        return drawn if (cut < 0).all() else drawn.where(cut >= 0, cut)

    def compute(self, name: str, begin: int) -> None:
        """Run the steps that lead to a value, if they are few enough."""
        needed, queue = dict[str, Step](), [name]
        total = 0
        while queue:
            one = queue.pop()
            if one in needed or one in self.known:
                continue
            step = self.maker[one]
            shapes = [self.tensors[n.name].shape for _, n in flatten((step.args, step.kwargs)) if n.kind == "weight"]
            total += prod(step.value.shape) if step.value else 0
            total += sum(map(prod, shapes))
            if step.kind == "module" or (step.value and step.value.requires_grad) or total > MOST:
                return
            needed[one] = step
            changed = [other for other in self.changes.get(one, ()) if other.index < begin]
            for each in (step, *changed):
                needed[each.name] = each
                queue += [n.name for _, n in flatten((each.args, each.kwargs)) if n.kind == "value"]
        try:
            for step in sorted(needed.values(), key=lambda step: step.index):
                if step.kind == "input":
                    self.known[step.name] = self.inputs[step.name]
                elif step.kind != "guard":
                    with torch.no_grad():
                        self.known[step.name] = perform(step, *arguments(step, {}, self.tensor))
        except Exception:  # a stand-in does, and the probe of the block says how it was probed
            self.known.pop(name, None)

    def tensor(self, name: Name) -> Any:
        """A tensor at its real size."""
        if name.kind == "weight":
            return self.weight(name.name, tuple(self.tensors[name.name].shape)).detach()
        return wide(self.traced.constants[name.name]) if name.kind == "constant" else self.known[name.name]


def _tables(followed: Followed, axes: Axes) -> dict[str, int]:
    """For inputs that pick rows of a table, or are the classes of a loss: how many there are."""
    maker = {step.name: step for step in followed.unit.steps}
    found: dict[str, int] = {}
    for record in followed.records:
        if record.form not in ("embedding", "cross_entropy"):
            continue
        rows = axes.size(axes.resolve(record.contracted[0]))
        queue = [use.name.name for use in record.uses if use.name.kind == "value"]
        while queue:
            step = maker.get(queue.pop())
            known = followed.known.get(step.name) if step else None
            if step is None or known is None or not known.dtype.startswith(("int", "uint")):
                continue
            if step.kind == "input":
                found[step.name] = min(rows, found.get(step.name, rows))
            if step.word not in SAME:
                continue
            queue += [n.name for _, n in flatten((step.args, step.kwargs)) if n.kind == "value"]
    return found
