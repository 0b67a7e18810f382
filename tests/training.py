"""Training by the engine against training by plain PyTorch: the same models, batches and optimizer for both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merak_like import Engine, auto_parallel
from merak_like.runtime.batches import rows, split
from merak_like.runtime.rng import stream_seed
from tests.zoo.case import Batch, Toy

SEED = 3
LIMIT = 0.5
"""Of the gradient norm: below what the models have, so that clipping is at work."""

DENSE = ("llama", "gpt2", "bert", "t5", "vit")
MODELS = (*DENSE, "unet")


@dataclass(frozen=True)
class Subject:
    """A model to train, its batches and its loss."""

    model: nn.Module
    batch: Callable[..., Batch]
    loss_fn: Callable[[Any, Any], Tensor] | None
    weight: Callable[[Any], int]
    """How many items a micro-batch's mean loss is the mean of."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What plain PyTorch would minimise."""
        outputs = model(**batch)
        return outputs.loss if self.loss_fn is None else self.loss_fn(outputs, batch)


def subject(name: str, *, dropout: bool = True, dtype: torch.dtype = torch.float64) -> Subject:
    """A model of the zoo by name, the same weights in every process."""
    torch.manual_seed(0)
    if name == "unet":
        from tests.zoo.plain import TOYS

        return toy(TOYS[name], dtype)
    from merak_like import hf
    from tests.zoo.hugging_face import CASES

    model = CASES[name].build().to(dtype)
    if not dropout:
        without_dropout(model)
    return Subject(model, lambda *size: in_dtype(CASES[name].batch(*size), dtype), None, hf.loss_weight(model) or rows)


def in_one_precision(name: str, *, dropout: bool = True, dtype: torch.dtype = torch.float64) -> Subject:
    """The same, but a float64 model is float64 throughout: transformers' losses, norms and routers go to float32.

    Where sums are taken in another order, as over shards, a step in float32 would turn the last bit into 1e-8.
    """
    one = subject(name, dropout=dropout, dtype=dtype)
    if dtype == torch.float64:  # each module for itself: a stage calls modules, not the whole model
        for module in one.model.modules():
            if not type(module).__module__.startswith("torch."):
                module.forward = MethodType(_widely(type(module).forward), module)
    if hasattr(one.model, "set_experts_implementation"):
        one.model.set_experts_implementation("batched_mm")  # type: ignore[operator]  # the other has no float64
    return one


class Widely(TorchFunctionMode):
    """Whoever asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(item: Any) -> Any:
            return torch.float64 if item is torch.float32 else item

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{key: wide(item) for key, item in (kwargs or {}).items()})


def _widely(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def wide(*args: Any, **kwargs: Any) -> Any:
        with Widely():
            return forward(*args, **kwargs)

    return wide


def toy(one: Toy, dtype: torch.dtype = torch.float64) -> Subject:
    """A plain module of the zoo."""
    torch.manual_seed(0)
    return Subject(one.build().to(dtype).train(), lambda *size: in_dtype(one.batch(*size), dtype), one.loss_fn, rows)


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Floating tensors in another dtype."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def without_dropout(model: nn.Module) -> None:
    """Set every probability that a module holds to 0."""
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and (key == "p" or "drop" in key):
                setattr(module, key, 0.0)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


@dataclass(frozen=True)
class Step:
    """The numbers of one step, and every gradient after clipping."""

    loss: float
    norm: float
    items: int
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """Some steps and the weights they led to."""

    steps: Sequence[Step]
    weights: Mapping[str, Tensor]


def plain_step(one: Subject, model: nn.Module, parts: Sequence[Any], step: int) -> tuple[float, int]:
    """Forward and backward of the micro-batches one after the other; the loss and the items it is the mean of."""
    weights = [one.weight(part) for part in parts]
    loss = 0.0
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        torch.manual_seed(stream_seed(SEED, step, index))
        mean = one.loss(model, part)
        share = weight / sum(weights)  # rounded once, to the loss's own dtype: transformers makes it float32
        (mean * share).backward()
        loss += mean.item() * share
    return loss, sum(weights)


def plainly(
    one: Subject, batches: Sequence[Any], parts: int | Callable[[Any], list[Any]], limit: float | None = LIMIT
) -> Trained:
    """Train a copy of the model in this process, without the engine; ``parts`` micro-batches a step, or how to cut."""
    cut = parts if callable(parts) else lambda batch: split(batch, parts)
    model = copy.deepcopy(one.model)
    optimizer = adamw(model.parameters())
    steps = []
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        loss, items = plain_step(one, model, cut(batch), number)
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf") if limit is None else limit).item()
        steps.append(Step(loss, norm, items, gradients(model)))
        optimizer.step()
    return Trained(steps, {k: v.detach().clone() for k, v in model.state_dict().items()})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def engine(one: Subject, example: Any, dp: int, pp: int, micro_batches: int, **more: Any) -> Engine:
    """Build the engine for a copy of the model."""
    settings: dict[str, Any] = {"optimizer": adamw, "max_grad_norm": LIMIT, "device": "cpu"} | more
    return auto_parallel(
        copy.deepcopy(one.model), dp, pp, example=example, loss_fn=one.loss_fn, micro_batches=micro_batches,
        hardware="a100-80gb", seed=SEED, timeout=60, **settings,
    )  # fmt: skip


def by_engine(one: Subject, batches: Sequence[Any], dp: int, pp: int, micro_batches: int, **more: Any) -> Trained:
    """Train by the engine; gradients and weights are on rank 0."""
    ours = engine(one, batches[0], dp, pp, micro_batches, **more)
    steps = []
    for batch in batches:
        result = ours.step(batch)
        steps.append(Step(result.loss, result.grad_norm, result.tokens, ours.full_gradients()))
    weights = ours.full_state_dict()
    ours.close()
    return Trained(steps, weights)


def far(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, relative to the largest number where that is above 1."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not ours.numel():
        return 0.0
    worst = ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1)).item()
    return worst if worst == worst else float("inf")


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference and where; both must have the same names."""
    assert ours.keys() == theirs.keys(), f"only one side has {sorted(ours.keys() ^ theirs.keys())[:8]}"
    return max(((far(ours[name], theirs[name]), name) for name in ours), default=(0.0, ""))


def same(ours: Trained, theirs: Trained, tolerance: float, skip: Callable[[str], bool] = lambda name: False) -> float:
    """The largest difference of all. AssertionError, naming it, if it is above the tolerance."""
    found: list[tuple[float, str]] = []
    assert len(ours.steps) == len(theirs.steps)
    for number, (a, b) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        assert a.items == b.items, f"step {number}: {a.items} items, plainly {b.items}"
        found.append((abs(a.loss - b.loss), f"loss of step {number}"))
        found.append((abs(a.norm - b.norm) / max(1.0, b.norm), f"gradient norm of step {number}"))
        apart, name = worst(a.gradients, b.gradients)
        found.append((apart, f"gradient of {name} in step {number}"))
    kept = [{k: v for k, v in side.weights.items() if not skip(k)} for side in (ours, theirs)]
    assert kept[1].keys() <= kept[0].keys(), f"weights missing: {sorted(kept[1].keys() - kept[0].keys())[:8]}"
    apart, name = worst(*kept)
    found.append((apart, f"{name} after {len(ours.steps)} steps"))
    apart, where = max(found)
    assert apart <= tolerance, f"{where} differs by {apart:.3g}, more than {tolerance:g}; in all {sorted(found)[-5:]}"
    return apart
