"""A device that is paced: matrix products take the time that a slow device would need, and nothing is multiplied.

Eight ranks on two cores then show their schedule, their transfers and their collectives, which are real, and not how
they share the cores. The results of the products are zeros.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from merak_like._compat import TorchDispatchMode
from merak_like.partitioner.hardware import Hardware, Link

FLOPS = 6e9
"""Of a paced device, per second: a block's forward on one micro-batch takes 70 ms."""
DEVICES = 4
"""Of a node."""
BETWEEN = 1e9 / 8
"""Bytes per second of the cable between the two nodes."""

PACED = Hardware(
    name="paced", peak_flops={"float32": FLOPS}, memory_bytes=16 * 10**9, memory_bandwidth=4e9, efficiency=1.0,
    half_flops=0.0, launch_seconds=2e-4, intra=Link(5e8, 5e-4), inter=Link(BETWEEN / DEVICES, 1e-3),
    devices_per_node=DEVICES,
    source="flops and the cable as set; memory, latencies and launches assumed for 8 processes of gloo on 2 cores",
)  # fmt: skip

aten = torch.ops.aten
PRODUCTS: dict[Any, tuple[int, int]] = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2)}
"""Which arguments are multiplied."""


class Pace(TorchDispatchMode):
    """Sleep for the flops of each product."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = PRODUCTS.get(func)
        if places is None:
            return func(*args, **(kwargs or {}))
        begin = time.perf_counter()
        a, b = (args[place] for place in places)
        made = _made(a, b)
        seconds = 2 * made.numel() * a.shape[-1] / FLOPS
        time.sleep(max(0.0, seconds - (time.perf_counter() - begin)))
        return made


def _made(a: Tensor, b: Tensor) -> Tensor:
    return a.new_zeros((*a.shape[:-1], b.shape[-1]))
