"""Tables of what the engine takes: a step beside the peers', and what it costs by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def pipeline() -> str:
    """Step times beside the peers."""
    return _pipeline(ROOT / "benchmarks/pipeline/results.json")


def pipeline_deep() -> str:
    """The same with the larger model."""
    return _pipeline(ROOT / "benchmarks/pipeline/deep.json")


def _pipeline(path: Path) -> str:
    data = json.loads(path.read_text())
    keys = ("to torch 1F1B", "to the best peer", "to half of one process + bubble")
    keys = tuple(key for key in keys if key in next(iter(data["rows"].values())))
    heads = " | ".join(key.replace("half of one process + bubble", "(one process / 2 + bubble)") for key in keys)
    lines = [f"| 2 processes | step, ms | CPU of the busier rank, ms | {heads} |", "|---|---|---|" + "---|" * len(keys)]
    for name, row in data["rows"].items():
        numbers = (f"{row['milliseconds']:.0f}", f"{row['CPU milliseconds']:.0f}")
        lines.append(f"| {name} | " + " | ".join([*numbers, *(f"{row[key]:.2f}" for key in keys)]) + " |")
    return "\n".join([*lines, "", setting_of(data["setting"])])


def overhead() -> str:
    """What the engine itself costs."""
    data = json.loads((ROOT / "benchmarks/pipeline/overhead.json").read_text())
    lines = ["| engine overhead, CPU microseconds | per micro-batch | per action |", "|---|---|---|"]
    for name, row in data["overhead, microseconds"].items():
        lines.append(f"| {name} | {row['per micro-batch']} | {row['per action']} |")
    return "\n".join(lines)


def alone() -> str:
    """What the engine costs where it has nothing to do, before it has begun, and in memory."""
    data = json.loads((ROOT / "benchmarks/overhead/results.json").read_text())
    lines = ["| one process, GPT-2 | step, CPU ms | to plain |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {row['CPU milliseconds']:.0f} | {row['to plain']:.3f} |" for name, row in data["steps"].items()
    ]
    parts = list(data["starts"]["plain"])
    lines += ["", f"| seconds from the start | {' | '.join(parts)} | in all |", "|---|" + "---:|" * (len(parts) + 1)]
    for name, row in data["starts"].items():
        lines.append(f"| {name} | {' | '.join(f'{row[part]:.1f}' for part in parts)} | {sum(row.values()):.1f} |")
    lines += ["", "| memory after a step, MB | weights | taken in all | to its weights |", "|---|---:|---:|---:|"]
    places = {"whole model, plain": data["memory"]["whole"]}
    places |= {f"rank {rank} of a pipeline": row for rank, row in enumerate(data["memory"]["ranks"])}
    for name, row in places.items():
        weights, held = row["weights"] / 1e6, row["held"] / 1e6
        lines.append(f"| {name} | {weights:.0f} | {held:.0f} | {held / weights:.2f} |")
    return "\n".join([*lines, "", setting_of(data["setting"])])


def setting_of(setting: dict[str, Any]) -> str:
    """What the numbers depend on, in a line."""
    shown = {key: round(value, 1) if key == "load average" else value for key, value in setting.items()}
    return "Setting: " + ", ".join(f"{key} {value}" for key, value in shown.items()) + "."


def cell(text: str) -> str:
    """As a cell of a table holds it."""
    return text.replace("|", chr(92) + "|")
