"""Tables of split fine-tuning: what a cut costs in accuracy and time, what a group learns, what a host bears."""

from __future__ import annotations

import json

from engine_tables import ROOT, cell, setting_of


def learning() -> str:
    """Accuracy and bytes of a cut in the middle of an encoder, by codec and rank."""
    data = json.loads((ROOT / "benchmarks/split/learning.json").read_text())
    lines = [
        "| at the cut | bytes a sample, first visit | later | times fewer, later | accuracy, unseen "
        "| to `whole, identity` | error of what arrives, last visit | seeds |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    rows = {name: row for name, row in data["rows"].items() if row}
    first = rows["whole, identity"]
    for name, row in rows.items():
        accuracy = [run["accuracy"] for run in row]
        of = [run["accuracy"] for run in first[: len(row)]]
        spread = f" ({min(accuracy):.1%} to {max(accuracy):.1%})" if len(row) > 1 else ""
        numbers = f"{row[0]['first bytes']:,.0f} | {row[0]['bytes']:,.0f} | {first[0]['bytes'] / row[0]['bytes']:.1f}"
        mean = sum(accuracy) / len(row)
        change = 100 * (mean - sum(of) / len(of))
        lines.append(
            f"| {cell(name)} | {numbers} | {mean:.1%}{spread} | {change:+.1f} | "
            f"{sum(run['error'] for run in row) / len(row):.3f} | {len(row)} |"
        )
    return "\n".join([*lines, "", setting_of({k: v for k, v in data["setting"].items() if k != "seeds"})])


def groups() -> str:
    """Accuracy of clients that train one cloud half together."""
    data = json.loads((ROOT / "benchmarks/split/groups.json").read_text())
    kinds = list(data["rows"])
    lines = [f"| accuracy, unseen | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    for name in data["rows"][kinds[0]]:
        runs = [data["rows"][kind].get(name, []) for kind in kinds]
        cells = [f"{sum(r) / len(r):.1%} ({min(r):.1%} to {max(r):.1%}, {len(r)} seeds)" if r else "" for r in runs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", setting_of(data["setting"])])


def line() -> str:
    """Bytes and seconds of a step over an uplink, by codec; what it learns beside it."""
    data = json.loads((ROOT / "benchmarks/split/line.json").read_text())
    learned = json.loads((ROOT / "benchmarks/split/learning.json").read_text())["rows"]
    lines = [
        "| width | codec | under way | bytes up | bytes / rate | step, no limit | step at 20 Mbit/s | over the longer "
        "| predicted | to `identity` | accuracy |",
        "| ---: | --- | ---: |" + " ---: |" * 8,
    ]
    plain = {row["width"]: row for row in reversed(data["rows"]) if row["codec"] == "identity"}

    def accuracy(codec: str) -> float | None:
        runs = learned.get(f"whole, {codec}")
        return sum(run["accuracy"] for run in runs) / len(runs) if runs else None

    for row in data["rows"]:
        told, least = accuracy(row["codec"]), accuracy("identity")
        right = "" if told is None or least is None else f"{told:.1%} ({100 * (told - least):+.1f})"
        first = plain.get(row["width"])
        ratio = f"{row['held'] / first['held']:.2f}" if first else ""
        over = row["held"] / max(row["sending"], row["free"]) - 1
        codec = cell(row["codec"])
        lines.append(
            f"| {row['width']} | `{codec}` | {row['under way']} | {row['bytes']:,} | {row['sending']:.2f} s | "
            f"{row['free']:.2f} s | {row['held']:.2f} s | {over:+.0%} | {row['predicted']:.2f} s | {ratio} | {right} |"
        )
    return "\n".join([*lines, "", setting_of(data["setting"])])


def soak() -> str:
    """What a host holds under many clients, what each gets, and how long steps stand in line."""
    data = json.loads((ROOT / "benchmarks/split/soak.json").read_text())
    lines = ["| on the host | a quarter in | at the end | most |", "| --- | ---: | ---: | ---: |"]
    for name, row in data["held"].items():
        lines.append(f"| {name} | {row['early']:,.1f} | {row['late']:,.1f} | {row['most']:,.1f} |")
    lines += ["", "| milliseconds | half at most | 99% at most | longest |", "| --- | ---: | ---: | ---: |"]
    for name, row in data["seconds"].items():
        numbers = " | ".join(f"{1e3 * row[key]:,.0f}" for key in ("p50", "p99", "most"))
        lines.append(f"| {name} | {numbers} |")
    steps, setting = data["steps"], data["setting"]
    told = f"{steps['all']:,} steps, {steps['a second']:.1f} a second; each of {setting['clients']} clients did "
    told += f"{steps['least']} to {steps['most']} (Jain's index {steps['Jain']:.4f}). "
    told += f"{', '.join(data['grew']) or 'Nothing'} grew, {data['stopped'] or 'no'} client stopped."
    return "\n".join([*lines, "", told, "", setting_of(setting)])


def wire() -> str:
    """Bytes of a step on the socket, beside the plain cut's of the same kind."""
    data = json.loads((ROOT / "benchmarks/split/wire.json").read_text())
    lines = ["| cut | codec | bytes a step, both ways | times fewer |", "| --- | --- | ---: | ---: |"]
    plain = dict[bool, int]()
    for row in data["rows"]:
        first = plain.setdefault(":" in row["cut"], row["bytes"])
        codec = row["codec"].replace("|", chr(92) + "|")
        lines.append(f"| `{row['cut']}` | `{codec}` | {row['bytes']:,} | {first / row['bytes']:.1f} |")
    return "\n".join([*lines, "", setting_of(data["setting"])])
