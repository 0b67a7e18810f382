"""JSON and tensors from one rank of a host to another, over a group on the CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.runtime.groups import Group


def say(said: Mapping[str, Any], to: int, group: Group) -> None:
    """Tell a rank something."""
    body = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    for tensor in (torch.tensor([body.numel()]), body):
        dist.send(tensor, to, group=group)


def heard(source: int, group: Group) -> dict[str, Any]:
    """What a rank has to tell."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, source, group=group)
    body = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(body, source, group=group)
    return json.loads(body.numpy().tobytes())


def give(tensor: Tensor, to: int, group: Group) -> None:
    """Send a tensor; the other rank knows what it is."""
    dist.send(raw(tensor), to, group=group)


def given(dtype: str | torch.dtype, shape: tuple[int, ...] | list[int], source: int, group: Group) -> Tensor:
    """A tensor that a rank sends."""
    found = blank(dtype, shape)
    dist.recv(found, source, group=group)
    return typed(found, dtype, shape)


def raw(tensor: Tensor) -> Tensor:
    """Its bytes, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def blank(dtype: str | torch.dtype, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Room for the bytes of a tensor."""
    return torch.empty(math.prod(shape) * _dtype(dtype).itemsize, dtype=torch.uint8)


def typed(found: Tensor, dtype: str | torch.dtype, shape: tuple[int, ...] | list[int]) -> Tensor:
    """The tensor that some bytes are."""
    return found.view(_dtype(dtype)).reshape(shape)


def named(tensor: Tensor) -> tuple[str, list[int]]:
    """Its dtype and shape, for JSON."""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
