"""A copy of a model without memory, to be traced where the model itself will have parts of its weights only."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model with tensors of the same shapes and no memory. Ties stay ties."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        data = torch.empty_like(tensor, device="meta", requires_grad=False)
        whole = nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        memo[id(tensor)] = whole
    return copy.deepcopy(model, memo)
