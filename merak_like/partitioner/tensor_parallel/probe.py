"""Believe nothing unverified: a derived model sharded against the same model whole, in one process.

Every step runs once per rank on that rank's parts; reductions are explicit sums over the ranks' tensors, with their own
backward. Everything is in float64 and without dropout, whatever the model says. Loss and every gradient must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.partitioner.tensor_parallel.derived import Derived, DerivedBlock, Group
from merak_like.partitioner.tensor_parallel.layout import Factors, Layout, is_sharded, pieces, same_parts
from merak_like.partitioner.tracer.fine import Name, Step

RANDOM = frozenset("rand randn randint rand_like randn_like bernoulli uniform normal exponential multinomial".split())
WIDER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; the gradient of a rank's copy goes to its summand."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack([t.to(torch.promote_types(t.dtype, torch.float64)) for t in tensors]).sum(0)
        return tuple(total.to(tensors[0].dtype, copy=True) for _ in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class _Enter(torch.autograd.Function):
    """A copy on every rank; its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack(grads).sum(0)
        return tuple(total.clone() for _ in grads)


class _Scale(torch.autograd.Function):
    """Divide in one direction only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: int, backward: int) -> Tensor:
        ctx.by = backward
        return x / forward if forward > 1 else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad / ctx.by, None, None


@dataclass(frozen=True)
class Difference:
    """The largest of all differences, relative to the largest element of the tensor (to 0.01, where that is smaller)."""

    worst: float
    where: str


def probe(
    model: nn.Module, steps: Sequence[Step], constants: Mapping[str, Any], derived: Derived, loss: str,
    inputs: Mapping[str, Any],
) -> Difference:  # fmt: skip
    """Run a model whole and sharded; how far loss and gradients are apart.

    ``inputs`` are the batch's tensors by the names of their steps, ``loss`` the name of the loss value.
    """
    weights = _weights(model)
    whole = _Ranks(model, steps, constants, weights, None, inputs)
    sharded = _Ranks(model, steps, constants, weights, derived, inputs)
    found = {"loss": _difference(sharded.run(loss)[0], whole.run(loss)[0])}
    for name, reference in whole.weights.items():
        if not reference[0].requires_grad:
            continue
        grads = [w.grad if w.grad is not None else torch.zeros_like(w) for w in sharded.weights[name]]
        for group in sharded.partial.get(name, ()):
            grads = _over(group, grads, lambda some: [torch.stack(some).sum(0)] * len(some))
        want = reference[0].grad
        want = torch.zeros_like(reference[0]) if want is None else want
        layout = derived.weights.get(name)
        for group in sharded.divides.get(name, ()):
            total = _over(group, grads, lambda some: [torch.stack(some).sum(0)] * len(some))
            for dim, factors in enumerate(layout or ()):
                for start, stop in same_parts(factors, group.degree, group.repeat, derived.tp):
                    for grad, all_of in zip(grads, total, strict=True):
                        grad.narrow(dim, start, stop - start).copy_(all_of.narrow(dim, start, stop - start))
        found[name] = max(_difference(g, take(want, layout, rank)) for rank, g in enumerate(grads))
    worst = max(found, key=lambda name: found[name])
    return Difference(found[worst], worst)


def take(tensor: Tensor, layout: Layout | None, rank: int) -> Tensor:
    """A rank's part of a whole tensor."""
    for dim, factors in enumerate(layout or ()):
        if is_sharded(factors):
            parts = [tensor.narrow(dim, start, stop - start) for start, stop in pieces(factors, rank)]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    worst = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-2)).item()
    return worst if worst == worst else float("inf")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().to(WIDER.get(tensor.dtype, tensor.dtype)) for name, tensor in named}


def _over(group: Group, tensors: list[Any], function: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
    """Apply a function to the tensors of each set of ranks that form the group."""
    members: dict[tuple[int, int], list[int]] = {}
    for rank in range(len(tensors)):
        key = (rank // (group.repeat * group.degree), rank % group.repeat)
        members.setdefault(key, []).append(rank)
    out = list(tensors)
    for ranks in members.values():
        for rank, result in zip(ranks, function([tensors[r] for r in ranks]), strict=True):
            out[rank] = result
    return out


class _Ranks:
    """The ranks of a group, in lockstep."""

    def __init__(
        self, model: nn.Module, steps: Sequence[Step], constants: Mapping[str, Any], weights: Mapping[str, Tensor],
        derived: Derived | None, inputs: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.steps, self.inputs = model, steps, inputs
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.count = derived.tp if derived else 1
        blocks = derived.blocks if derived else ()
        layouts = derived.weights if derived else {}
        self.weights = {
            name: [
                take(w, layouts.get(name), rank).clone().requires_grad_(name in self.trainable)
                for rank in range(self.count)
            ]
            for name, w in weights.items()
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
            self.env[step.name] = [_wide(self.inputs[step.name]) for _ in range(self.count)]
            return
        block = self.block.get(step.name)
        args = [self.words(step, (step.args, dict(step.kwargs)), (), block, rank) for rank in range(self.count)]
        self.convert(step, args, block)
        results = []
        form = next((g.forms[step.name] for g in block.groups if step.name in g.forms), "") if block else ""
        if form in REWRITTEN:
            assert block is not None
            results = REWRITTEN[form](self, step, args, block)
        else:
            for rank in range(self.count):
                with torch.set_grad_enabled(step.grad):
                    results.append(self.call(step, *args[rank], rank))
        for group in block.groups if block else ():
            if group.forms.get(step.name) == "mean":
                results = [r / group.degree for r in results]
            if step.name in group.reduced:
                results = _over(group, results, lambda some: _AllReduce.apply(*some))  # type: ignore[arg-type]
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
        return _wide(self.constants[name])

    def convert(self, step: Step, args: list[Any], block: DerivedBlock | None) -> None:
        """Enter, even, share and slice the operands that ask for it, on all ranks together."""
        from merak_like.partitioner.tensor_parallel.call import flatten

        for path, name in list(flatten((step.args, dict(step.kwargs)))):
            path = path[1:]
            where = (step.name, path)
            values = [_get(a, path) for a in args]
            if not isinstance(values[0], Tensor):
                continue
            before = values
            for group in self.outside.get(name.name, ()):
                if self.block.get(step.name) is not self.block.get(name.name):
                    values = [_Scale.apply(v, 1, group.degree) for v in values]  # type: ignore[misc]
            for group in block.groups if block else ():
                if where in group.entered.get(name.name, ()) and values[0].requires_grad:
                    values = _over(group, values, lambda some: _Enter.apply(*some))  # type: ignore[arg-type]
                if where in group.evened.get(name.name, ()):
                    values = [_Scale.apply(v, 1, group.degree) for v in values]  # type: ignore[misc]
                if where in group.shared:
                    values = [_Scale.apply(v, group.degree, 1) for v in values]  # type: ignore[misc]
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


def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """Rows of ``a (s, k)`` up to each offset times the group's matrix of ``b (e, k, n)``, in any dtype."""
    rows, start = list[Tensor](), 0
    for group, stop in enumerate(offs.tolist()):
        rows.append(a[start:stop] @ b[group])
        start = stop
    rows.append(a.new_zeros(a.shape[0] - start, b.shape[-1]))
    return torch.cat(rows)


def _piece(factors: Factors, rank: int) -> tuple[int, int]:
    ((start, stop),) = pieces(factors, rank)
    return start, stop


def _embedding(ranks: _Ranks, step: Step, args: list[Any], block: DerivedBlock) -> list[Tensor]:
    """Rows that a rank does not have are zeros."""
    found = list[Tensor]()
    weight = step.kwargs.get("weight", step.args[1] if len(step.args) > 1 else None)
    for rank, ((ids, table, *_), _) in enumerate(args):
        start, stop = _piece(ranks.layouts[weight.name][0], rank)
        here = (ids >= start) & (ids < stop)
        padding = step.kwargs.get("padding_idx", step.args[2] if len(step.args) > 2 else None)
        rows = torch.nn.functional.embedding((ids - start).where(here, 0), table)
        if padding is not None:  # no gradient from there
            rows = rows.detach().where((ids == padding).unsqueeze(-1), rows)
        found.append(rows * here.unsqueeze(-1))
    return found


def _cross_entropy(ranks: _Ranks, step: Step, args: list[Any], block: DerivedBlock) -> list[Tensor]:
    """The classes are never gathered: maximum, sum of exponentials and the target's logit are reduced."""
    group = next(group for group in block.groups if step.name in group.forms)
    layout = block.values[step.args[0].name][1]
    top = torch.stack([a[0][0].detach().amax(1) for a in args]).amax(0)
    sums, hits = [], []
    for rank, (positional, _) in enumerate(args):
        logits, target = positional[0], positional[1]
        start, stop = _piece(layout, rank)
        sums.append((logits - top.unsqueeze(1)).exp().sum(1))
        here = (target >= start) & (target < stop)
        hits.append(logits.gather(1, (target - start).where(here, 0).unsqueeze(1)).squeeze(1) * here)
    del group
    sums, hits = _AllReduce.apply(*sums), _AllReduce.apply(*hits)  # type: ignore[misc]
    found = list[Tensor]()
    for (positional, kwargs), total, hit in zip(args, sums, hits, strict=True):  # type: ignore[arg-type]
        kept = positional[1] != kwargs.get("ignore_index", -100)
        losses = (total.log() + top - hit) * kept
        reduction = kwargs.get("reduction", "mean")
        found.append(losses if reduction == "none" else losses.sum() / (kept.sum() if reduction == "mean" else 1))
    return found


def _layer_norm(ranks: _Ranks, step: Step, args: list[Any], block: DerivedBlock) -> list[Tensor]:
    """Mean and variance over dimensions of which a rank has a part: two sums are reduced, their gradients too."""
    group = next(group for group in block.groups if step.name in group.forms)
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    if step.word == "rms_norm":
        names = ("input", "normalized_shape", "weight", "eps")
    given = [dict(zip(names, positional, strict=False)) | kwargs for positional, kwargs in args]
    dims = tuple(range(-len(given[0]["normalized_shape"]), 0))

    def mean(tensors: list[Tensor]) -> list[Tensor]:
        means = [t.mean(dims, keepdim=True) / group.degree for t in tensors]
        return _over(group, _over(group, means, lambda t: _AllReduce.apply(*t)), lambda t: _Enter.apply(*t))  # type: ignore[arg-type]

    x = [g["input"] for g in given]
    if step.word == "layer_norm":
        x = [t - m for t, m in zip(x, mean(x), strict=True)]
    found = list[Tensor]()
    for g, t, square in zip(given, x, mean([t * t for t in x]), strict=True):
        eps = g.get("eps", 1e-5)
        out = t * (square + (torch.finfo(t.dtype).eps if eps is None else eps)).rsqrt()
        out = out if g.get("weight") is None else out * g["weight"]
        found.append(out if g.get("bias") is None else out + g["bias"])
    return found


REWRITTEN: Mapping[str, Callable[..., list[Tensor]]] = {"embedding": _embedding, "cross_entropy": _cross_entropy,
                                                       "layer_norm": _layer_norm, "rms_norm": _layer_norm}


def _wide(value: Any) -> Any:
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
