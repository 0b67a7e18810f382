"""CPU time of a feed-forward pass over 2 ranks, forward and backward: ours, written by hand, and DTensor."""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from merak_like import auto_parallel

WIDTH, ROWS, ROUNDS, PASSES = 64, 64, 15, 60


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Copy(torch.autograd.Function):
    """Identity; the gradient is summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad


class Sum(torch.autograd.Function):
    """Summed; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class ByHand(nn.Module):
    """Column and row halves, as one would write them."""

    def __init__(self, whole: Mlp) -> None:
        super().__init__()
        half, rank = 2 * WIDTH, dist.get_rank()
        part = slice(rank * half, (rank + 1) * half)
        self.up, self.up_bias = nn.Parameter(whole.up.weight[part].clone()), nn.Parameter(whole.up.bias[part].clone())
        self.down, self.bias = nn.Parameter(whole.down.weight[:, part].clone()), nn.Parameter(whole.down.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        linear = torch.nn.functional.linear
        inner = torch.nn.functional.gelu(linear(Copy.apply(x), self.up, self.up_bias))
        return Sum.apply(linear(inner, self.down)) + self.bias  # type: ignore[operator]


def loss_of(outputs: Tensor, batch: Any) -> Tensor:
    """Any scalar."""
    return outputs.square().mean()


def main() -> None:
    """Alternate the contenders; the median of the rounds' CPU time for one pass, on the busier rank."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole, x = Mlp(), torch.randn(ROWS, WIDTH, requires_grad=True)
    engine = auto_parallel(copy.deepcopy(whole), 1, 1, 2, example={"x": x}, loss_fn=loss_of, device="cpu")
    piece = engine._programs.at({"x": x}).stages[0].code.pieces[0]  # type: ignore[attr-defined]
    place = piece.made.index("loss")
    hand = ByHand(whole)
    tensors = parallelize_module(
        copy.deepcopy(whole), init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    contenders: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: piece.module(x)[place],
        "by hand": lambda: loss_of(hand(x), None),
        "DTensor": lambda: loss_of(tensors(x), None),
    }
    losses = {name: float(run().detach()) for name, run in contenders.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-6, losses
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 2):
        for name in sorted(contenders, key=lambda n: (list(contenders).index(n) + turn) % len(contenders)):
            dist.barrier()
            begin = time.process_time()
            for _ in range(PASSES):
                contenders[name]().backward()
            if turn > 1:
                times[name].append((time.process_time() - begin) / PASSES * 1e6)
    found = torch.tensor([statistics.median(times[name]) for name in contenders], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        rows = dict(zip(contenders, (round(value) for value in found.tolist()), strict=True))
        result = {"width": WIDTH, "rows": ROWS, "CPU microseconds a pass": rows}
        Path(sys.argv[1]).write_text(json.dumps(result))
    engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
