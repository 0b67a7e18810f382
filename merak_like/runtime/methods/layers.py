"""Watching the layers of a stage while its code runs: every call of a function that has a row in split_backward.py.

A piece's code is called inside a mode that gives each such call with a parameter as weight to ``around``. The mode is
the innermost, so it sees a layer whatever else is on: a backward in two halves, a piece that is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merak_like.runtime.split_backward import ROWS, Operands

Around = Callable[[Any, Operands, Callable[[Tensor], Tensor]], Tensor]
"""(function, its operands, the call as a function of the layer's input) to the call's result."""
Also = Mapping[frozenset[Any], Callable[[Callable[[], Tensor]], Tensor]]
"""Functions to what takes their call."""


class Watched:
    """Code of a stage whose layers go through ``around``."""

    def __init__(self, code: Callable[..., Any], around: Around, also: Also | None = None) -> None:
        """``also``: what goes around other functions."""
        self._code, self._around, self._also = code, around, also or {}

    def __call__(self, *args: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return self._code(*args)
        with _Layers(self._around, self._also):
            return self._code(*args)


class _Layers(TorchFunctionMode):
    def __init__(self, around: Around, also: Also) -> None:
        super().__init__()
        self._around = around
        self._also = {func: inner for some, inner in also.items() for func in some}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        row, more = ROWS.get(func), kwargs or {}
        if func in self._also and torch.is_grad_enabled():
            return self._also[func](lambda: func(*args, **more))
        if row is None or not row.autocast or not torch.is_grad_enabled():
            return func(*args, **more)
        found = row.operands(*args, **more)
        if found is None or not isinstance(found.weight, nn.Parameter) or not found.weight.requires_grad:
            return func(*args, **more)

        def call(x: Tensor) -> Tensor:
            return func(
                *(x if a is found.x else a for a in args), **{k: x if a is found.x else a for k, a in more.items()}
            )

        return self._around(func, found, call)
