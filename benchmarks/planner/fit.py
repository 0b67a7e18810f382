"""Fit the constants of ``hardware.py`` to every other published step, then without each of vTrain's models.

    python -m benchmarks.planner.fit                    about a minute of one core

The step is the estimate of the planner in its simplest form: all work in equal stages, ``(m + (p - 1) / chunks)`` of
them, and what comes after. Blocks are alike, so a model is traced with ``DEPTH`` of them and counted with all. Damped
Gauss-Newton on the logarithms of constants and errors, large errors counted less. Within bounds that stay possible: a
constant at its bound is one that the rows do not tell. The rows of a model that is left out are asked of the planner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.planner.main import FITTED, OUTLIERS, TIMES
from benchmarks.planner.rows import Row, sources
from merak_like.partitioner.after import after_seconds
from merak_like.partitioner.balance import Floats
from merak_like.partitioner.blocks import repeated, units
from merak_like.partitioner.cost import op_cost, op_costs
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Hardware, hardware_named
from merak_like.partitioner.plan import StageMemory
from merak_like.partitioner.software import Software
from merak_like.partitioner.states import STATES

DEPTH = 4
START = (0.7, 5e-5, 0.9, 6e-6, 0.9)
LOW = (0.4, 1e-6, 0.4, 3e-6, 0.3)
HIGH = (0.95, 2e-4, 0.95, 3e-5, 0.95)
NAMES = "efficiency, matmul seconds, memory, launch seconds, inter:"
SOFT = 0.05
"""Relative error from which on it counts less."""


def hardware_of(row: Row, constants: Floats) -> Hardware:
    """The row's device with these constants."""
    efficiency, half, memory, launch, inter = map(float, constants)
    made = hardware_named(row.hardware)
    return replace(
        made, efficiency=efficiency, half_flops=half * made.peak("float32"), memory_efficiency=memory,
        launch_seconds=launch, inter_efficiency=inter, **row.cluster,
    )  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """A graph, and how often each kind of its ops occurs in the whole model."""

    graph: ProxyGraph
    whole: np.ndarray
    blocks: np.ndarray
    """In blocks alone."""
    weights: float
    """Bytes."""


def counted(row: Row) -> Counted:
    """The graph of one of the row's ranks."""
    device, (hidden, layers, *rest) = hardware_named(row.hardware), row.model
    selective = row.recompute == "selective" and device.attention == "math"
    software = Software("fused", device.attention, selective)
    made = sources(hidden, DEPTH, *rest)
    graph = made.rank(row.mesh.tp, software, sequence_parallel=row.sequence_parallel)
    kinds, alike = graph.alike
    first, *_, last = repeated(graph, units(graph, op_costs(graph, device), 64)).tolist()
    every, inside = (np.bincount(part, minlength=len(kinds)) for part in (alike, alike[first:last]))
    more = layers / DEPTH - 1
    own = sum(graph.parameter(name).nbytes for name in graph.params_of(graph.ops[first:last]))
    weights = sum(p.nbytes for p in graph.parameters if not p.buffer) + more * own
    return Counted(graph, every + more * inside, (more + 1) * inside, weights)


def step(row: Row, of: Counted, constants: Floats) -> float:
    """The estimate, in seconds."""
    device, mesh, graph = hardware_of(row, constants), row.mesh, of.graph
    costs = [op_cost(graph.ops[index], graph, device, scale=row.micro_batch) for index in graph.alike[0]]
    each = np.array([cost.forward_seconds for cost in costs])
    forward, again = float(of.whole @ each), float(of.blocks @ each) * (row.recompute == "blocks")
    backward = float(of.whole @ np.array([cost.backward_seconds for cost in costs]))
    work = forward + again + backward
    m, states = row.batch // mesh.dp // row.micro_batch, STATES[row.states]
    weights = of.weights / mesh.pp
    held = StageMemory(
        weights=int(weights), gradients=int(states.gradients * weights), optimizer=int(states.optimizer * weights)
    )
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
            if cost(after) < cost(found) - 1e-6:
                x, found, damping = tried, after, damping / 3
                break
            damping *= 3
        else:
            break
    return np.exp(x)


def main() -> None:
    logging.disable(logging.WARNING)
    every = [row for table in FITTED for row in TIMES[table]()]
    half = [i for i, row in enumerate(every) if i % 2 == 0 and row.name not in OUTLIERS]
    graphs = [counted(row) for row in every]

    def errors(constants: Floats, rows: Sequence[int]) -> Floats:
        return np.log([step(every[i], graphs[i], constants) / every[i].seconds for i in rows])

    for without in ("", "3.6B", "18.4B"):
        out = [i for i, row in enumerate(every) if without and row.table == "vTrain" and row.name.startswith(without)]
        fitted = [i for i in half if i not in out]
        tables = [every[i].table for i in fitted]
        weights = np.array([tables.count(table) ** -0.5 for table in tables])
        constants = solve(lambda constants, rows=fitted: errors(constants, rows), weights)
        print(f"\nwithout {without}" if without else "all", NAMES, ", ".join(f"{c:.3g}" for c in constants))
        others = out or [i for i in range(len(every)) if i not in fitted]
        for table in dict.fromkeys(every[i].table for i in others):
            rows = [i for i in others if every[i].table == table]
            off: Floats = np.expm1(errors(constants, rows)) if not out else planned([every[i] for i in rows], constants)
            print(f"{table}: mean {np.abs(off).mean():.1%} of {len(rows)} rows left out", flush=True)
            if out:
                print(chosen(np.array([every[i].seconds for i in out], float), off), flush=True)


def planned(rows: Sequence[Row], constants: Floats) -> Floats:
    """Relative errors of the planner itself, with these constants."""
    return np.array([row.plan(hardware_of(row, constants)).step_seconds / row.seconds - 1 for row in rows])


def chosen(truth: Floats, off: Floats) -> str:
    """How good a choice by predictions with these relative errors is."""
    order = np.argsort((1 + off) * truth)
    ranks = np.corrcoef(np.argsort(np.argsort(truth)), np.argsort(order))[0, 1]
    lost, three = truth[order[0]] / truth.min() - 1, truth[order[:3]].min() / truth.min() - 1
    return f"Spearman {ranks:.3f}, the chosen is {lost:.1%} slower than the best, the best of three {three:.1%}"


if __name__ == "__main__":
    main()
