"""One block, run alone in numbers: sharded over virtual ranks against whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merak_like.partitioner.tensor_parallel.axes import Axes
from merak_like.partitioner.tensor_parallel.derived import DerivedBlock
from merak_like.partitioner.tensor_parallel.follow import Followed
from merak_like.partitioner.tensor_parallel.given import Sources
from merak_like.partitioner.tensor_parallel.placed import places, resized
from merak_like.partitioner.tensor_parallel.probe import EXACT, difference, gradient_floor, of_gradients
from merak_like.partitioner.tensor_parallel.ranks import Ranks, take
from merak_like.partitioner.tensor_parallel.reductions import over
from merak_like.partitioner.tensor_parallel.tiny import elements, shape, tiny

SMALL = 10_000_000
"""Elements of a tiny copy's tensors, at most."""
REAL = 30_000_000
"""Elements of a block's tensors to run it at its real size."""
AGAIN = 12
"""Steps that may turn out, with numbers, to need their real sizes."""


@dataclass(frozen=True)
class Compared:
    """How far a sharded block is from the whole one; see ``Difference``."""

    worst: float
    where: str
    """The value, or the weight or input whose gradient it is; of a block that fails, the first step that differs."""
    way: str
    """What was run: ``tiny``, ``real size``; why nothing could be, then ``worst`` is infinite."""


class NotRun(Exception):
    """The whole block cannot be run in these sizes. ``step`` is where."""

    def __init__(self, why: str, step: str) -> None:
        super().__init__(why)
        self.step = step


def compare(followed: Followed, block: DerivedBlock, tp: int, sources: Sources) -> Compared:
    """Run a block in tiny form, or at its real size if there is none, forward and backward."""
    if not block.weights and not block.values:
        return Compared(0.0, "", "nothing is sharded")
    place, real = places(followed, block), dict[str, int]()
    why = ""
    for _ in range(AGAIN):
        axes = tiny(followed, block, place, tp, real)
        if axes is followed.axes or elements(followed, axes) > SMALL:
            break
        try:
            return _compared(followed, block, axes, tp, sources, "tiny")
        except NotRun as error:
            why = str(error)
            if real.get(error.step) == 3 or not error.step:
                break
            real[error.step] = real.get(error.step, 0) + 1
    if (count := elements(followed, followed.axes)) > REAL:
        return Compared(float("inf"), why, f"not run: {count:,} elements and no tiny form")
    try:
        return _compared(followed, block, followed.axes, tp, sources, "real size")
    except NotRun as error:
        return Compared(float("inf"), str(error), "not run")


def _compared(
    followed: Followed, block: DerivedBlock, axes: Axes, tp: int, sources: Sources, way: str
) -> Compared:  # fmt: skip
    whole_block, sharded_block = resized(block, followed, axes, tp)
    weights, values = sources.weights(followed, axes), sources.values(followed, axes)
    constants, code = sources.constants(followed, axes), followed.unit.steps
    whole = Ranks(sources.model, code, constants, (whole_block,), 1, weights, values)
    try:
        whole.run()
    except Exception as error:  # such as an index that is too large for a smaller table
        raise NotRun(f"{whole.at}: {' '.join(str(error).split())[:200]}", whole.at) from error
    for step in code:
        expected = followed.values.get((step.name, 0))
        value = whole.env.get(step.name, [None])[0]
        if expected is not None and isinstance(value, Tensor) and tuple(value.shape) != shape(axes, expected):
            raise NotRun(f"{step.word} gives {tuple(value.shape)}, its axes say {shape(axes, expected)}", step.name)
    ends = {name: whole.env[name][0] for name in sorted(followed.unit.left) if isinstance(whole.env.get(name), list)}
    if (odd := next((n for n, v in ends.items() if not v.isfinite().all()), None)) is not None:
        raise NotRun(f"{odd} is no number", "")
    cotangents = {
        name: torch.randn(value.shape, generator=sources.made, dtype=value.dtype)
        for name, value in ends.items() if value.requires_grad
    }  # fmt: skip
    sharded = Ranks(sources.model, code, constants, (sharded_block,), tp, weights, values)
    try:
        sharded.run()
    except Exception as error:
        return Compared(float("inf"), f"{sharded.at}: {' '.join(str(error).split())[:200]}", way)
    for ranks in (whole, sharded):
        if cotangents:
            ranks.backward(cotangents)
    found = {name: max(difference(ours, value, 0.0) for ours in sharded.env[name]) for name, value in ends.items()}
    found |= {f"gradient of {name}": far for name, far in of_gradients(whole, sharded).items()}
    floor = gradient_floor(whole)
    for name, (given,) in whole.inputs.items():
        if isinstance(given, Tensor) and given.requires_grad and given.grad is not None:
            ours = [x.grad if x.grad is not None else torch.zeros_like(x) for x in sharded.inputs[name]]
            found[f"gradient of {name}"] = max(difference(grad, given.grad, floor) for grad in ours)
    worst = max(found, key=lambda name: found[name], default="")
    far = found.get(worst, 0.0)
    if far >= EXACT:
        worst = f"{worst}; the first step that differs is {first_difference(whole, sharded, sharded_block)}"
    return Compared(far, worst, way)


def first_difference(whole: Ranks, sharded: Ranks, block: DerivedBlock) -> str:
    """The first step whose value on the ranks is neither the whole one, nor their parts of it, nor adds up to it."""
    for step in whole.steps:
        value, ours = whole.env.get(step.name, [None])[0], sharded.env.get(step.name, [])
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        layout = block.values.get(step.name)
        parts = [take(value, layout, rank) for rank in range(sharded.count)]
        if max(map(difference, ours, parts, [0.0] * len(parts))) < EXACT:
            continue
        sums = [over(group, ours, lambda some: [torch.stack(some).sum(0)] * len(some)) for group in block.groups]
        if not any(max(map(difference, total, parts, [0.0] * len(parts))) < EXACT for total in sums):
            return f"{step.word} ({step.name})"
    return "none: only gradients differ"
