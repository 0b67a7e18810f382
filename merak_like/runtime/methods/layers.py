"""Watching the layers of a stage while its code runs: every call of a function that has a row in split_backward.py.

A piece's code is called inside a mode that gives each such call with a parameter as weight to ``around``. The mode is
the innermost, so it sees a layer whatever else is on: a backward in two halves, a piece that is run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merak_like.runtime.split_backward import ROWS, Operands

Around = Callable[[Any, Operands, Callable[[], Tensor]], Tensor]
"""(function, its operands, the call) to the call's result."""


class Watched:
    """Code of a stage whose layers go through ``around``."""

    watches = True

    def __init__(self, code: Callable[..., Any], around: Around) -> None:
        self._code, self._around = code, around

    def __call__(self, *args: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return self._code(*args)
        with _Layers(self._around):
            return self._code(*args)


class _Layers(TorchFunctionMode):
    def __init__(self, around: Around) -> None:
        super().__init__()
        self._around = around

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        row, more = ROWS.get(func), kwargs or {}
        if row is not None and row.autocast and torch.is_grad_enabled():
            found = row.operands(*args, **more)
            if found is not None and isinstance(found.weight, nn.Parameter) and found.weight.requires_grad:
                return self._around(func, found, lambda: func(*args, **more))
        if func in ALSO and torch.is_grad_enabled():
            return self._around(func, ALSO[func], lambda: func(*args, **more))
        return func(*args, **more)


NOTHING: Any = Operands(None, None, None)  # type: ignore[arg-type]
ALSO: dict[Any, Operands] = {torch.nn.functional.relu: NOTHING, torch.relu: NOTHING, Tensor.relu: NOTHING}
"""Functions without weights that keep their result, which the next layer keeps as well."""
