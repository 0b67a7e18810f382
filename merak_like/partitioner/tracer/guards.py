"""Checks that stand in the recorded code where Python looked at the data: a batch that differs is refused loudly."""

from __future__ import annotations

from typing import Any

import torch


class GuardError(RuntimeError):
    """This batch takes another way through the model than the batch it was traced with."""


def check_value(tensor: torch.Tensor, reader: str, expected: Any, where: str) -> None:
    """Raise GuardError unless ``tensor.<reader>()`` gives what it gave for the traced example."""
    found = getattr(tensor, reader)()
    if found != expected:
        raise GuardError(
            f"in {where} the traced example had {reader.strip('_')}() == {expected!r}, this batch has {found!r}: the "
            "model would take another branch; trace again with this batch as the example"
        )


def check_shape(tensor: torch.Tensor, expected: tuple[int, ...], where: str) -> None:
    """Raise GuardError unless a data-dependent result has the shape it had for the traced example."""
    if tuple(tensor.shape) != tuple(expected):
        raise GuardError(
            f"in {where} the traced example gave a result of shape {tuple(expected)}, this batch gives "
            f"{tuple(tensor.shape)}: trace again with this batch as the example"
        )
