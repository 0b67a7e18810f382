"""Execute the steps of a trace on several ranks in one process, in lockstep and in float64, without dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tensor_parallel.derived import Derived, DerivedBlock, Group
from merak_like.partitioner.tensor_parallel.layout import Layout, is_sharded, pieces
from merak_like.partitioner.tensor_parallel.reductions import AllReduce, Enter, Scale, over
from merak_like.partitioner.tensor_parallel.rewritten import REWRITTEN, grouped_mm
from merak_like.partitioner.tracer.fine import Name, Step

RANDOM = frozenset("rand randn randint rand_like randn_like bernoulli uniform normal exponential multinomial".split())
WIDER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


def take(tensor: Tensor, layout: Layout | None, rank: int) -> Tensor:
    """A rank's part of a whole tensor."""
    for dim, factors in enumerate(layout or ()):
        if is_sharded(factors):
            parts = [tensor.narrow(dim, start, stop - start) for start, stop in pieces(factors, rank)]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


SHAKE = 0.02
"""Standard deviation of what is added to every parameter."""


class Ranks:
    """The ranks of a group, in lockstep."""

    def __init__(
        self, model: nn.Module, steps: Sequence[Step], constants: Mapping[str, Any],
        derived: Derived | None, inputs: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """``inputs`` are the batch's tensors by the names of their steps; one rank without ``derived``."""
        self.model, self.steps, self.inputs = model, steps, inputs
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.count = derived.tp if derived else 1
        blocks = derived.blocks if derived else ()
        layouts = derived.weights if derived else {}
        # Zero biases and norms of ones would hide a bias that is added once per rank, or not at all.
        shake = torch.Generator().manual_seed(0)
        shaken = {
            name: wide(w.detach()) + SHAKE * torch.randn(w.shape, generator=shake, dtype=torch.float64)
            for name, w in model.named_parameters()
        } | {name: wide(w.detach()) for name, w in model.named_buffers()}
        self.weights = {
            name: [
                take(w, layouts.get(name), rank).clone().requires_grad_(name in self.trainable)
                for rank in range(self.count)
            ]
            for name, w in shaken.items()
        }
        self.constants = constants
        self.env: dict[str, list[Any]] = {}
        self.partial: dict[str, list[Group]] = {}
        self.block: dict[str, DerivedBlock] = {}
        self.outside: dict[str, list[Group]] = {}
        self.layouts = layouts
        self.divides = {name: block.groups for block in blocks for name in block.weights}
        for block in blocks:
            for group in block.groups:
                for name in group.partial_gradients:
                    same = self.partial.setdefault(name, [])
                    if all((g.degree, g.repeat) != (group.degree, group.repeat) for g in same):
                        same.append(group)
                for name, uses in group.evened.items():
                    if ("", ()) in uses:
                        self.outside.setdefault(name, []).append(group)
        for block in blocks:
            self.block |= dict.fromkeys(block.steps, block)

    def run(self, loss: str) -> list[Tensor]:
        """One step; the loss on every rank."""
        self.env = {}
        for step in self.steps:
            self.step(step)
        losses = self.env[loss]
        sum(losses).backward()  # type: ignore[union-attr]
        return losses

    def step(self, step: Step) -> None:
        if step.kind == "guard":
            return
        if step.kind == "input":
            self.env[step.name] = [wide(self.inputs[step.name]) for _ in range(self.count)]
            return
        block = self.block.get(step.name)
        args = [self.words(step, (step.args, dict(step.kwargs)), (), block, rank) for rank in range(self.count)]
        self.convert(step, args, block)
        results = []
        form = next((g.forms[step.name] for g in block.groups if step.name in g.forms), "") if block else ""
        if form in REWRITTEN:
            assert block is not None
            results = REWRITTEN[form](self.layouts, step, args, block)
        else:
            for rank, (positional, keywords) in enumerate(args):
                with torch.set_grad_enabled(step.grad):
                    results.append(self.call(step, positional, keywords, rank))
        for group in block.groups if block else ():
            if group.forms.get(step.name) == "mean":
                results = [r / group.degree for r in results]
            if step.name in group.reduced:
                results = over(group, results, lambda some: AllReduce.apply(*some))  # type: ignore[arg-type]
        self.env[step.name] = results

    def words(self, step: Step, item: Any, path: tuple[Any, ...], block: DerivedBlock | None, rank: int) -> Any:
        """The arguments of one rank: its tensors, its sizes, everything in float64."""
        if block and len(path) > 1 and (size := block.sizes.get((step.name, path[1:]))) is not None:
            return size
        if isinstance(item, Name):
            if item.kind == "weight":
                return self.weights[item.name][rank]
            return self.constant(item.name) if item.kind == "constant" else self.env[item.name][rank]
        if isinstance(item, (tuple, list)):
            return type(item)([self.words(step, x, (*path, i), block, rank) for i, x in enumerate(item)])
        if isinstance(item, dict):
            return {key: self.words(step, x, (*path, key), block, rank) for key, x in item.items()}
        if isinstance(item, slice):
            ends = [self.words(step, getattr(item, k), (*path, k), block, rank) for k in ("start", "stop", "step")]
            return slice(*ends)
        return WIDER.get(item, item) if isinstance(item, torch.dtype) else item

    def constant(self, name: str) -> Any:
        return wide(self.constants[name])

    def convert(self, step: Step, args: list[Any], block: DerivedBlock | None) -> None:
        """Enter, even, share and slice the operands that ask for it, on all ranks together."""
        for path, name in list(flatten((step.args, dict(step.kwargs)))):
            path = path[1:]
            where = (step.name, path)
            values = [_get(a, path) for a in args]
            if not isinstance(values[0], Tensor):
                continue
            before = values
            for group in self.outside.get(name.name, ()):
                if self.block.get(step.name) is not self.block.get(name.name):
                    values = [Scale.apply(v, 1, group.degree) for v in values]  # type: ignore[misc]
            for group in block.groups if block else ():
                if where in group.entered.get(name.name, ()) and values[0].requires_grad:
                    values = over(group, values, lambda some: Enter.apply(*some))  # type: ignore[arg-type]
                if where in group.evened.get(name.name, ()):
                    values = [Scale.apply(v, 1, group.degree) for v in values]  # type: ignore[misc]
                if where in group.shared:
                    values = [Scale.apply(v, group.degree, 1) for v in values]  # type: ignore[misc]
                if where in group.sliced:
                    values = [take(v, group.sliced[where], rank) for rank, v in enumerate(values)]
            if values is not before:
                for rank, value in enumerate(values):
                    args[rank] = _put(args[rank], path, value)

    def call(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> Any:
        word = step.word
        if word in ("dropout", "dropout1d", "dropout2d", "alpha_dropout"):
            return args[0]
        if word == "scaled_dot_product_attention" and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        if word in ("_grouped_mm", "grouped_mm"):
            return grouped_mm(*args, **kwargs)
        if word in RANDOM or step.kind == "module":
            torch.manual_seed(step.index)
        if step.kind == "module":
            module = self.model.get_submodule(step.target)
            own = {n.removeprefix(f"{step.target}."): w[rank] for n, w in self.weights.items()
                   if n.startswith(f"{step.target}.")}  # fmt: skip
            return torch.func.functional_call(module, own, args, kwargs)
        if isinstance(step.target, str):
            method = "double" if word in ("float", "half", "bfloat16") and not args[1:] else step.target
            return getattr(args[0], method)(*args[1:], **kwargs)
        return step.target(*args, **kwargs)


def wide(value: Any) -> Any:
    """A tensor in float64 (complex128), anything else as it is."""
    return value.to(WIDER.get(value.dtype, value.dtype)) if isinstance(value, Tensor) else value


def _get(item: Any, path: tuple[Any, ...]) -> Any:
    args, kwargs = item
    item = kwargs if isinstance(path[0], str) else args
    for key in path:
        item = getattr(item, key) if isinstance(item, slice) else item[key]
    return item


def _put(item: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of nested arguments with one of them replaced."""
    args, kwargs = item

    def inside(item: Any, path: tuple[Any, ...]) -> Any:
        if not path:
            return value
        if isinstance(item, dict):
            return {**item, path[0]: inside(item[path[0]], path[1:])}
        if isinstance(item, slice):
            ends = {k: getattr(item, k) for k in ("start", "stop", "step")}
            ends[path[0]] = inside(ends[path[0]], path[1:])
            return slice(*ends.values())
        changed = list(item)
        changed[path[0]] = inside(changed[path[0]], path[1:])
        return type(item)(changed)

    return (args, inside(kwargs, path)) if isinstance(path[0], str) else (inside(args, path), kwargs)
