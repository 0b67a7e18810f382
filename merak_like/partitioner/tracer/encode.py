"""Arguments of recorded calls: tensors become graph nodes, harmless constants stay, anything else is refused."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType, EllipsisType, FunctionType, NoneType
from typing import Any

import numpy as np
import torch

from merak_like._compat import tree_flatten_with_path

CONSTANTS = (
    bool, int, float, complex, str, bytes, NoneType, EllipsisType, enum.Enum, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types that generated code can write down as they are."""


class Opaque(Exception):
    """An argument or a result that may hide tensors from the trace."""


@dataclass(frozen=True)
class Attribute:
    """A parameter, buffer or constant of the root, to be read where it is used."""

    name: str


def encode(item: Any, of_tensor: Callable[[torch.Tensor], Any], of_object: Callable[[Any], Any]) -> Any:
    """Rewrite nested arguments with the graph's own words.

    Raises Opaque for an object that is neither a tensor, a plain container nor a harmless constant.
    """
    if isinstance(item, torch.Tensor):
        return of_tensor(item)
    kind = type(item)
    if isinstance(item, np.generic):  # code would need numpy to write it down; torch takes it for a Python number
        return item.item()
    if isinstance(item, CONSTANTS):
        return item
    if kind is tuple or kind is torch.Size or kind.__module__ == "torch.return_types":
        return tuple([encode(x, of_tensor, of_object) for x in item])
    if kind is list:
        return [encode(x, of_tensor, of_object) for x in item]
    if isinstance(item, dict) and kind is dict and all(isinstance(k, str) for k in item):
        return {k: encode(v, of_tensor, of_object) for k, v in item.items()}
    if isinstance(item, slice):
        return slice(*(encode(x, of_tensor, of_object) for x in (item.start, item.stop, item.step)))
    if kind in (FunctionType, BuiltinFunctionType) and not getattr(item, "__closure__", None):
        return of_object(item)
    raise Opaque(f"an object of type {kind.__module__}.{kind.__qualname__}")


def results(item: Any) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors of a call's result with the path to each. Raises Opaque where an unknown object may hide one."""
    found: list[tuple[tuple[Any, ...], torch.Tensor]] = []
    _collect(item, (), found)
    return found


def _collect(item: Any, path: tuple[Any, ...], found: list[tuple[tuple[Any, ...], torch.Tensor]]) -> None:
    kind = type(item)
    if isinstance(item, torch.Tensor):
        found.append((path, item))
    elif kind is tuple or kind is list:  # by far the most common: without torch's registry of containers
        for index, inner in enumerate(item):
            _collect(inner, (*path, index), found)
    elif not isinstance(item, CONSTANTS) and kind is not torch.Size:
        for more, leaf in tree_flatten_with_path(item):
            if isinstance(leaf, torch.Tensor):
                found.append(((*path, *more), leaf))
            elif not isinstance(leaf, CONSTANTS) and not isinstance(leaf, torch.Size):
                raise Opaque(f"a result of type {type(leaf).__module__}.{type(leaf).__qualname__}")
