"""What this machine can do, measured in a few seconds and remembered.

Measured are matmuls, the bandwidth of memory and the launch of a small op; links are not (that takes two processes), so
they are the constants of gloo over loopback, or of PCIe 4.0 x16 between GPUs, and ``source`` says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from merak_like.partitioner.hardware import Hardware, Link

if TYPE_CHECKING:
    import torch

LOOPBACK = Link(1e9, 100e-6)
"""Assumed for two CPU processes of one machine: gloo copies through a socket."""
PCIE4 = Link(32e9, 15e-6)
"""Assumed for two GPUs of one machine: PCIe 4.0 x16, the figure of the standard."""
NETWORK = Link(125e6, 200e-6)
"""Assumed between machines: gigabit Ethernet."""

SECONDS = 0.25
"""Each figure is the best of repeated runs over about this time."""


def this_machine(*, cache: Path | None = None, device: str | None = None, again: bool = False) -> Hardware:
    """Measure the device (``cuda`` if there is one, else ``cpu``), or read what was measured before.

    ``cache`` is the folder of the user's caches: pass ``XDG_CACHE_HOME`` if it is set, default ``~/.cache``. There the
    figures are kept in ``merak_like/``, a file for each kind of device and version of torch. ``again`` measures anyway.
    The memory of a CPU is all of the machine's: ranks that share it need a ``memory_limit``.
    """
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"cpu {torch.get_num_threads()} threads"
    file = f"{name} torch {torch.__version__}".lower().replace(" ", "-").replace("/", "-") + ".json"
    path = (cache or Path.home() / ".cache") / "merak_like" / file
    if path.exists() and not again:
        try:
            return Hardware.from_json(path.read_text(encoding="utf-8"))
        except ValueError:  # written by another version: measure again
            pass
    measured = _measure(where, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(measured.to_json() + "\n", encoding="utf-8")
    return measured


def _measure(device: torch.device, name: str) -> Hardware:
    import torch

    gpu = device.type == "cuda"
    large, small = (8192, 512) if gpu else (1024, 64)
    wait = torch.cuda.synchronize if gpu else _nothing
    seconds: dict[tuple[str, int], float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for size in (large, small):
            a = torch.ones(size, size, dtype=dtype, device=device)
            out = torch.empty_like(a)
            seconds[str(dtype)[6:], size] = _best(lambda a=a, out=out: torch.mm(a, a, out=out), wait)
    words = 2**26 if gpu else 2**24
    source, target = torch.ones(words, device=device), torch.empty(words, device=device)
    bandwidth = 2 * 4 * words / _best(lambda: target.copy_(source), wait)
    tiny = torch.ones(8, device=device)
    launch = _best(lambda: _many(lambda: tiny.add_(1.0)), wait) / 100
    flops = {size: 2.0 * size**3 for size in (large, small)}
    peaks = {dtype: flops[large] / seconds[dtype, large] for dtype in ("float32", "bfloat16")}
    # time = launch + (flops + half) / peak, solved for half at the small size.
    half = max((seconds["float32", small] - launch) * peaks["float32"] - flops[small], 0.0)
    peaks |= {"float16": peaks["bfloat16"], "float64": peaks["float32"] / 2}
    devices = torch.cuda.device_count() if gpu else 1
    return Hardware(
        name=name,
        peak_flops=peaks,
        memory_bytes=_memory(device),
        memory_bandwidth=bandwidth,
        intra=PCIE4 if gpu else LOOPBACK,
        inter=NETWORK,
        devices_per_node=devices if gpu else 64,  # processes of one machine stand in for devices
        efficiency=1.0,
        half_flops=half,
        launch_seconds=launch,
        source="measured here; float16, float64 and the links are assumed, not measured",
    )


def _memory(device: torch.device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _many(run: Callable[[], object]) -> None:
    for _ in range(100):
        run()


def _nothing() -> None: ...


def _best(run: Callable[[], object], wait: Callable[[], object]) -> float:
    """Seconds of the fastest of repeated runs, after one to warm up."""
    run()
    wait()
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        begin = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - begin)
    return best
