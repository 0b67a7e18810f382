"""From the batch a user shows to the arguments of ``forward``, the loss, and the names of the inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from merak_like._compat import tree_flatten_with_path
from merak_like.partitioner.tracer.errors import TraceError

LossFn = Callable[[Any, Any], torch.Tensor]
"""``loss_fn(outputs, batch) -> scalar``."""


@dataclass(frozen=True)
class Arguments:
    """How one batch is passed to the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def leaves(batch: Any) -> dict[tuple[Any, ...], Any]:
    """Every leaf of a batch by its path."""
    return dict(tree_flatten_with_path(batch))


def leaf(batch: Any, path: tuple[Any, ...]) -> Any:
    """The leaf at a path of ``leaves``, without a walk through the others."""
    found = batch
    try:
        for key in path:
            attribute = isinstance(key, str) and key.startswith(".") and not isinstance(found, Mapping)
            found = getattr(found, key[1:]) if attribute else found[key]
    except (TypeError, LookupError, AttributeError):  # a container of the user's own, which only torch can take apart
        return leaves(batch)[path]
    return found


def replace_tensors(item: Any, new: Callable[[torch.Tensor], Any]) -> Any:
    """The same nested batch with every tensor replaced."""
    if isinstance(item, torch.Tensor):
        return new(item)
    if isinstance(item, Mapping):
        return {key: replace_tensors(value, new) for key, value in item.items()}
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(replace_tensors(x, new) for x in item))
    if isinstance(item, (tuple, list)):
        return type(item)(replace_tensors(x, new) for x in item)
    return item


def distinct(batch: Any) -> Any:
    """The same batch with each tensor an object of its own: one that stands in two places is two inputs, as it is when
    micro-batches are cut from a batch."""
    seen = set[int]()

    def new(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in seen:
            return tensor.detach().requires_grad_(tensor.requires_grad)
        seen.add(id(tensor))
        return tensor

    return replace_tensors(batch, new)


def arguments(model: nn.Module, batch: Any, has_loss_fn: bool) -> Arguments:
    """Split a batch into what ``forward`` takes; the rest is for the loss.

    A mapping is passed by name (with a ``loss_fn``, only the names that ``forward`` knows), a tuple or list by
    position (with a ``loss_fn``, as many as ``forward`` requires), anything else as the only argument.
    """
    signature = inspect.signature(model.forward)
    parameters = list(signature.parameters.values())
    if isinstance(batch, Mapping):
        names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if has_loss_fn:
            return Arguments((), {k: v for k, v in batch.items() if k in names})
        if not accepts_any and (unknown := sorted(set(batch) - names)):
            raise TraceError(
                f"{type(model).__name__}.forward has no arguments {unknown} (it takes {sorted(names)}): leave them "
                "out, or give a loss_fn(outputs, batch) that uses them"
            )
        return Arguments((), dict(batch))
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        if not has_loss_fn:
            return Arguments(tuple(batch), {})
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        required = sum(p.default is p.empty for p in positional)
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            required = max(required, len(batch) - 1)
        return Arguments(tuple(batch[: max(required, 1)]), {})
    return Arguments((batch,), {})


def find_loss(outputs: Any, model: nn.Module) -> torch.Tensor:
    """The scalar loss in a model's own outputs. Raises TraceError where there is none."""
    loss = outputs if isinstance(outputs, torch.Tensor) else None
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif loss is None:
        loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, (tuple, list)) and outputs:
        loss = outputs[0]
    if not isinstance(loss, torch.Tensor) or loss.dim() > 1 or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else "none"
        raise TraceError(
            f"{type(model).__name__} should give a scalar loss, found {found} in its {type(outputs).__name__}: put "
            "labels into the example, or give loss_fn(outputs, batch)"
        )
    return loss


def name_of(path: tuple[Any, ...]) -> str:
    """A name for the input at a path: ``input_ids``, ``batch_0``."""
    name = "_".join(str(step) for step in path) or "batch"
    return name if not name[0].isdigit() else f"batch_{name}"
