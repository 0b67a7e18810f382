"""Fit the constants of ``hardware.py`` to every other published step, or without one of vTrain's models.

    python -m benchmarks.planner.fit [--without 3.6B]

The step is the estimate of the planner in its simplest form: all work in equal stages, ``(m + (p - 1) / chunks)`` of
them, and what comes after. Damped Gauss-Newton on the logarithms of constants and errors, large errors counted less.
Within bounds that stay possible: a constant at its bound is one that the rows do not tell.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.planner.main import FITTED, OUTLIERS, TIMES
from benchmarks.planner.rows import Row, sources
from merak_like.partitioner.after import after_seconds
from merak_like.partitioner.balance import Floats
from merak_like.partitioner.cost import op_cost
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Hardware, Link, hardware_named
from merak_like.partitioner.plan import StageMemory
from merak_like.partitioner.software import Software

START = (0.75, 3e-6, 0.85, 2e-5, 0.75, 0.7)
LOW = (0.4, 1e-7, 0.4, 1e-7, 0.3, 0.2)
HIGH = (0.95, 4e-5, 0.9, 3e-4, 0.9, 0.9)
SOFT = 0.05
"""Relative error from which on it counts less."""


def hardware_of(row: Row, constants: Floats) -> Hardware:
    """The row's device with these constants."""
    efficiency, half, memory, launch, intra, inter = map(float, constants)
    made = hardware_named(row.hardware)
    return replace(
        made, efficiency=efficiency, half_flops=half * made.peak("bfloat16"), memory_efficiency=memory,
        launch_seconds=launch, intra_efficiency=intra, inter_efficiency=inter,
        inter=Link(row.inter or made.inter.bandwidth, made.inter.latency),
    )  # fmt: skip


def graph_of(row: Row) -> tuple[ProxyGraph, np.ndarray]:
    """One op of each kind, and how often it occurs."""
    device = hardware_named(row.hardware)
    selective = row.recompute == "selective" and device.attention == "math"
    software = Software("fused", device.attention, selective)
    graph = sources(*row.model).rank(row.mesh.tp, software, sequence_parallel=row.sequence_parallel)
    kinds, alike = graph.alike
    return graph, np.bincount(alike, minlength=len(kinds))


def step(row: Row, graph: ProxyGraph, counts: np.ndarray, constants: Floats) -> float:
    """The estimate, in seconds."""
    device, mesh = hardware_of(row, constants), row.mesh
    costs = [op_cost(graph.ops[index], graph, device, scale=row.micro_batch) for index in graph.alike[0]]
    forward = float(counts @ np.array([cost.forward_seconds for cost in costs]))
    backward = float(counts @ np.array([cost.backward_seconds for cost in costs]))
    work = forward * (2 if row.recompute == "blocks" else 1) + backward
    m = row.batch // mesh.dp // row.micro_batch
    weights = sum(p.nbytes for p in graph.parameters if not p.buffer) // mesh.pp
    held = StageMemory(weights=weights, gradients=2 * weights, optimizer=6 * weights)
    hidden = (backward + forward * bool(row.zero)) / mesh.pp
    after = after_seconds(mesh, device, [held], 0, zero=row.zero, hidden=hidden)
    return (m + (mesh.pp - 1) / row.chunks) * work / mesh.pp + sum(after.values())


def solve(errors: Callable[[Floats], Floats], weights: Floats) -> Floats:
    """The constants of least weighted errors."""
    low, high, x = np.log(LOW), np.log(HIGH), np.log(START)

    def cost(found: Floats) -> float:
        return float(np.sum(np.sqrt(1 + (found / SOFT) ** 2) - 1))

    damping, found = 1e-2, errors(np.exp(x)) * weights
    for _ in range(60):
        slopes = np.array([(errors(np.exp(x + h)) * weights - found) / 1e-2 for h in np.eye(len(x)) * 1e-2]).T
        soft = (1 + (found / SOFT) ** 2) ** -0.25
        matrix, vector = (slopes.T * soft**2) @ slopes, slopes.T @ (found * soft**2)
        for _ in range(8):
            tried = np.clip(x - np.linalg.solve(matrix + damping * np.diag(np.diag(matrix) + 1e-9), vector), low, high)
            after = errors(np.exp(tried)) * weights
            if cost(after) < cost(found):
                x, found, damping = tried, after, damping / 3
                break
            damping *= 3
        else:
            break
    return np.exp(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without", help="leave out vTrain's rows whose name begins so, and report them")
    without = parser.parse_args().without
    logging.disable(logging.WARNING)
    every = [row for table in FITTED for row in TIMES[table]()]
    half = [i % 2 == 0 and row.name not in OUTLIERS for i, row in enumerate(every)]
    left_out = [row.table == "vTrain" and bool(without) and row.name.startswith(without) for row in every]
    graphs = [graph_of(row) for row in every]
    fitted = [i for i, (taken, out) in enumerate(zip(half, left_out, strict=True)) if taken and not out]
    tables = [every[i].table for i in fitted]
    weights = np.array([tables.count(table) ** -0.5 for table in tables])

    def errors(constants: Floats, rows: list[int] = fitted) -> Floats:
        return np.log([step(every[i], *graphs[i], constants) / every[i].seconds for i in rows])

    constants = solve(errors, weights)
    print("efficiency, matmul seconds, memory, launch seconds, intra, inter:", ", ".join(f"{c:.3g}" for c in constants))
    others = [i for i in range(len(every)) if (left_out[i] if without else i not in fitted)]
    for table in dict.fromkeys(every[i].table for i in others):
        rows = [i for i in others if every[i].table == table]
        off = np.abs(np.expm1(errors(constants, rows)))
        told = ", ".join(f"{every[i].name} {e:.1%}" for i, e in zip(rows, off, strict=True))
        print(f"{table}: mean {off.mean():.1%} of {len(rows)} rows left out ({told})")


if __name__ == "__main__":
    main()
