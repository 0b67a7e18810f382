"""Execute the steps of a trace on several ranks in one process, in lockstep and in float64, without dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel.call import flatten
from merak_like.partitioner.tensor_parallel.derived import DerivedBlock, Group
from merak_like.partitioner.tensor_parallel.layout import Layout, is_sharded, pieces, same_parts
from merak_like.partitioner.tensor_parallel.perform import arguments, perform, wide
from merak_like.partitioner.tensor_parallel.reductions import AllReduce, Enter, Scale, over
from merak_like.partitioner.tensor_parallel.rewritten import REWRITTEN
from merak_like.partitioner.tracer.fine import Name, Step


def take(tensor: Tensor, layout: Layout | None, rank: int) -> Tensor:
    """A rank's part of a whole tensor."""
    for dim, factors in enumerate(layout or ()):
        if is_sharded(factors):
            parts = [tensor.narrow(dim, start, stop - start) for start, stop in pieces(factors, rank)]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


SHAKE = 0.02
"""Standard deviation of what is added to every parameter."""


def shaken(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in float64. Zero biases and norms of ones would hide a bias that is added once per rank."""
    shake = torch.Generator().manual_seed(0)
    return {
        name: (
            wide(w.detach()) + SHAKE * torch.randn(w.shape, generator=shake, dtype=torch.float64)
        ).requires_grad_(w.requires_grad)
        for name, w in model.named_parameters()
    } | {name: wide(w.detach()) for name, w in model.named_buffers()}  # fmt: skip


class Ranks:
    """The ranks of a group, in lockstep."""

    def __init__(
        self, model: nn.Module, steps: Sequence[Step], constants: Mapping[str, Any], blocks: Sequence[DerivedBlock],
        count: int, weights: Mapping[str, Tensor], inputs: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """``weights`` are whole; ``inputs`` are the batch, and values made elsewhere, by the names of their steps."""
        self.model, self.steps, self.constants, self.count = model, steps, constants, count
        self.layouts = {name: layout for block in blocks for name, layout in block.weights.items()}
        self.weights = {
            name: [
                take(w.detach(), self.layouts.get(name), rank).clone().requires_grad_(w.requires_grad)
                for rank in range(count)
            ]
            for name, w in weights.items()
        }
        self.inputs = {
            name: [wide(x).detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
                   for _ in range(count)]
            for name, x in inputs.items()
        }  # fmt: skip
        self.env: dict[str, list[Any]] = {}
        self.at = ""
        """The step that runs."""
        self.partial: dict[str, list[Group]] = {}
        self.block: dict[str, DerivedBlock] = {}
        self.outside: dict[str, list[Group]] = {}
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

    def run(self) -> None:
        """All steps."""
        # A leaf may not be changed in place, a copy may.
        self.env = {name: [x.clone() if isinstance(x, Tensor) else x for x in xs] for name, xs in self.inputs.items()}
        for step in self.steps:
            if step.kind != "guard" and step.name not in self.env:
                self.at = step.name
                self.step(step)

    def backward(self, cotangents: Mapping[str, Tensor]) -> None:
        """Gradients of what other units read, or of a loss, flow back on every rank."""
        total: Any = 0
        for name, cotangent in cotangents.items():
            degree = prod(group.degree for group in self.outside.get(name, ()))
            total = total + sum((value * cotangent).sum() / degree for value in self.env[name])
        total.backward()

    def gradients(self, name: str) -> list[Tensor]:
        """The gradient of a weight on every rank, after what is summed once a step."""
        grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights[name]]
        for group in self.partial.get(name, ()):
            grads = over(group, grads, _total)
        for group in self.divides.get(name, ()):
            total = over(group, grads, _total)
            for dim, factors in enumerate(self.layouts.get(name, ())):
                for start, stop in same_parts(factors, group.degree, group.repeat, self.count):
                    for grad, all_of in zip(grads, total, strict=True):
                        grad.narrow(dim, start, stop - start).copy_(all_of.narrow(dim, start, stop - start))
        return grads

    def step(self, step: Step) -> None:
        """One step on every rank."""
        block = self.block.get(step.name)
        args = [self.arguments(step, block, rank) for rank in range(self.count)]
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

    def arguments(self, step: Step, block: DerivedBlock | None, rank: int) -> Any:
        """The arguments of one rank: its tensors, its sizes."""

        def tensor(name: Name) -> Any:
            if name.kind == "weight":
                return self.weights[name.name][rank]
            return wide(self.constants[name.name]) if name.kind == "constant" else self.env[name.name][rank]

        return arguments(step, block.sizes if block else {}, tensor)

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
        if step.kind != "module":
            return perform(step, args, kwargs)
        torch.manual_seed(step.index)
        own = {n.removeprefix(f"{step.target}."): w[rank] for n, w in self.weights.items()
               if n.startswith(f"{step.target}.")}  # fmt: skip
        return torch.func.functional_call(self.model.get_submodule(step.target), own, args, kwargs)


def _total(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack(tensors).sum(0)] * len(tensors)


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
