"""A model whose blocks take a fixed time by sleeping, so that many processes on few cores show their schedule."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from merak_like.runtime.split_backward import ROWS, Operands, Row

WIDTH = 64


class _Paced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, forward, *ctx.seconds = args
        ctx.save_for_backward(x, weight)
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(sum(ctx.seconds))
        _, weight = ctx.saved_tensors
        return gradients[0], torch.zeros_like(weight), None, None, None


def paced(x: Tensor, weight: Tensor, forward: float, backward: float, later: float) -> Tensor:
    """x, after so many seconds; its backward takes ``backward`` seconds for x and ``later`` for the weight."""
    if has_torch_function((x, weight)):
        return handle_torch_function(paced, (x, weight), x, weight, forward, backward, later)
    return _Paced.apply(x, weight, forward, backward, later)  # pyright: ignore[reportReturnType]


def _slept(seconds: float, made: Tensor) -> Tensor:
    time.sleep(seconds)
    return made


ROWS[paced] = Row(
    lambda x, weight, *seconds: Operands(x, weight, None, seconds),
    forward=lambda x, weight, bias, forward, backward, later: _slept(forward, x.clone()),
    input_gradient=lambda g, weight, x, forward, backward, later: _slept(backward, g),
    weight_gradient=lambda g, x, weight, forward, backward, later: _slept(later, torch.zeros_like(weight)),
)


class Block(nn.Module):
    """A small layer, for the planner to weigh, and a nap."""

    def __init__(self, forward: float, backward: float, later: float) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = forward, backward, later

    def forward(self, x: Tensor) -> Tensor:
        return paced(self.layer(x), self.weight, *self.seconds)


class Shift(nn.Module):
    """So cheap that no planner minds; makes the first block's input need a gradient, as those of the others do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def model(blocks: int, forward: float, backward: float, later: float) -> nn.Sequential:
    """Equal blocks in a row."""
    torch.manual_seed(0)
    return nn.Sequential(Shift(), *(Block(forward, backward, later) for _ in range(blocks)))


def loss_of(output: Tensor, batch: object) -> Tensor:
    """Any scalar."""
    return output.square().mean()
