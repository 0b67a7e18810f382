"""Write the result tables of the benchmarks into the READMEs, from their JSON files.

    python benchmarks/tables.py          rewrite; `--check` only says whether they are up to date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys

from engine_tables import ROOT, alone, cell, overhead, pipeline, pipeline_deep, setting_of
from split_tables import groups, learning, line, soak, wire

PLACES = (
    "README.md", "benchmarks/pipeline/README.md", "benchmarks/paced/README.md", "benchmarks/planner/README.md",
    "benchmarks/tensor_parallel/README.md", "benchmarks/split/README.md", "benchmarks/zero/README.md",
    "benchmarks/overhead/README.md", "benchmarks/scaling/README.md", "benchmarks/whole/README.md",
)  # fmt: skip


def scaling() -> str:
    """CPU seconds by size, and the slope of their logarithms."""
    data = json.loads((ROOT / "benchmarks/scaling/results.json").read_text())
    blocks = list[str]()
    for kind, rows in data["rows"].items():
        if kind not in data["slopes"]:
            continue
        names = list(next(iter(rows.values())))
        lines = [f"| {kind} | " + " | ".join(f"{name}, s" for name in names) + " |", "|---:|" + "---:|" * len(names)]
        lines += [
            f"| {size} | " + " | ".join(f"{row[name]:.2f}" for name in names) + " |" for size, row in rows.items()
        ]
        slopes = data["slopes"][kind]
        lines.append("| slope | " + " | ".join(f"{slopes[name]:.2f}" for name in names) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, setting_of(data["setting"])])


def whole() -> str:
    """Every layout of eight paced ranks, as predicted and as measured."""
    data = json.loads((ROOT / "benchmarks/whole/results.json").read_text())
    lines = [
        "| dp x pp x tp | schedule | predicted, s | measured, s | to the best | cores: ranks | others |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    least = data["best"]["measured"]
    for row in sorted(data["rows"], key=lambda row: row["measured"]):
        mark = " (chosen)" if row == data["chosen"] else ""
        degrees = f"{row['dp']} x {row['pp']} x {row['tp']}"
        numbers = f"{row['predicted']:.2f} | {row['measured']:.2f} | {row['measured'] / least:.2f}"
        numbers += f" | {row['load']:.0%} | {row['others']:.0%}"
        lines.append(f"| {degrees} | {row['name']}{mark} | {numbers} |")
    lines += ["", f"The choice takes {data['chosen to best']:.3f} of the best step; predictions are off by "
              f"{data['mean error of the prediction']:.1%} in the mean."]  # fmt: skip
    if gains := data["merak's rules to ours"].values():
        lines[-1] += (
            f" On the same degrees Merak's rules take {min(gains):.2f} to {max(gains):.2f} of what the planner's"
        )
        lines[-1] += " best schedule takes."
    if ways := data["missing"]:
        lines[-1] += f" **{ways} ways have not been measured yet**, so this is not the answer."
    return "\n".join([*lines, "", setting_of(data["setting"])])


def whole_short() -> str:
    """Of all layouts the chosen, the best, and each one's best way beside Merak's rules."""
    data = json.loads((ROOT / "benchmarks/whole/results.json").read_text())
    least = data["best"]["measured"]
    lines = ["| dp x pp x tp | fastest way, s | to the best of all | Merak's rules to it |", "|---|---:|---:|---:|"]
    for degrees in dict.fromkeys((row["dp"], row["pp"], row["tp"]) for row in data["rows"]):
        same = {row["name"]: row for row in data["rows"] if (row["dp"], row["pp"], row["tp"]) == degrees}
        rules = same.pop("merak's rules")["measured"]
        best = min(same.values(), key=lambda row: row["measured"])
        mark = " (chosen)" if data["chosen"] in same.values() else ""
        numbers = f"{best['measured']:.2f} | {best['measured'] / least:.2f} | {rules / best['measured']:.2f}"
        lines.append(f"| {' x '.join(map(str, degrees))}{mark} | {numbers} |")
    chosen = data["chosen"]
    told = f"The planner's choice is {chosen['dp']} x {chosen['pp']} x {chosen['tp']} with {chosen['name']}: "
    told += f"{data['chosen to best']:.3f} of the best step that was measured of {len(data['rows'])} ways."
    lines += ["", told]
    return "\n".join([*lines, "", setting_of(data["setting"])])


def paced() -> str:
    """Simulated and measured steps of every schedule, on blocks that sleep."""
    data = json.loads((ROOT / "benchmarks/paced/results.json").read_text())
    unit, tables = data["setting"]["seconds of a rank's forward"], data["ranks"]
    heads = [f"{ranks} ranks: {what}" for ranks in tables for what in ("simulated, f", "measured, f", "ratio")]
    lines = ["| paced | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for rows in zip(*tables.values(), strict=True):
        times = ((row["simulated"] / unit, row["measured"] / unit, row["measured"] / row["simulated"]) for row in rows)
        cells = " | ".join(f"{a:.1f} | {b:.1f} | {c:.3f}" for a, b, c in times)
        lines.append(f"| {rows[0]['schedule']} | {cells} |")
    return "\n".join([*lines, "", setting_of(data["setting"])])


def slow() -> str:
    """Steps over two stages whose link is slow, by codec."""
    data = json.loads((ROOT / "benchmarks/pipeline/slow.json").read_text())
    links = data["links"]
    heads = " | ".join(f"{link}: step, ms | to none" for link in links)
    lines = [f"| codec | kB a step | {heads} |", "|---|" + "---:|" * (1 + 2 * len(links))]
    for name, row in next(iter(links.values())).items():
        cells = [f"{found[name]['milliseconds']:.0f} | {found[name]['to none']:.2f}" for found in links.values()]
        lines.append(f"| {cell(name)} | {row['kilobytes']:.0f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", setting_of(data["setting"])])


def tensor_parallel() -> str:
    """A pass beside peers, and steps on a link that is shaped and one that is not."""
    data = json.loads((ROOT / "benchmarks/tensor_parallel/results.json").read_text())
    own = data["mlp"]["CPU microseconds a pass"]
    lines = ["| MLP pass, 2 ranks, width 64 | CPU, microseconds | to by hand |", "|---|---:|---:|"]
    lines += [f"| {name} | {us} | {us / own['by hand']:.2f} |" for name, us in own.items()]
    if "overlap" in data:
        found = data["overlap"]
        plain, free = (
            found["shaped"]["rows"]["plain"]["milliseconds"],
            found["unshaped"]["rows"]["plain"]["milliseconds"],
        )
        share, rate = 1 - free / plain, found["megabits per second"]
        lines += ["", f"Communication is {share:.0%} of a plain step at {rate:.0f} Mbit/s.", ""]
        lines += ["| GPT-2 step, tp=2 | unshaped, ms | shaped, ms | to plain | hidden |", "|---|---:|---:|---:|---:|"]
        for name, row in found["shaped"]["rows"].items():
            step, loose = row["milliseconds"], found["unshaped"]["rows"][name]["milliseconds"]
            hidden = (plain - step) / (plain - free)
            lines.append(f"| {name} | {loose:.0f} | {step:.0f} | {step / plain:.2f} | {hidden:.0%} |")
    if "llama" in data:
        loose, held = (data["llama"][profile]["rows"] for profile in ("unshaped", "1 Gbit"))
        heads = ("ms", "to the best peer", "CPU, ms", "to it, CPU", "1 Gbit: ms", "to the best peer")
        lines += ["", f"| Llama step, tp=2, two hosts | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
        for name, row in loose.items():
            numbers = f"{row['milliseconds']:.0f} | {row['to the best peer']:.2f} | {row['CPU milliseconds']:.0f}"
            numbers += f" | {row['to the best peer, CPU']:.2f}"
            lines.append(
                f"| {name} | {numbers} | {held[name]['milliseconds']:.0f} | {held[name]['to the best peer']:.2f} |"
            )
    return "\n".join([*lines, "", setting_of(data["setting"])])


def zero() -> str:
    """Steps at each level beside the peers at it, and what a save costs."""
    data = json.loads((ROOT / "benchmarks/zero/results.json").read_text())
    lines = ["| 2 processes | step, ms | CPU, ms | ours to it | ours to it, CPU |", "|---|---:|---:|---:|---:|"]
    for name, row in data["rows"].items():
        ratios = (f"{row[key]:.2f}" if key in row else "" for key in ("ours to it", "ours to it, CPU"))
        lines.append(
            f"| {name} | {row['milliseconds']:.0f} | {row['CPU milliseconds']:.0f} | " + " | ".join(ratios) + " |"
        )
    lines += ["", "| saving, `zero=1` | ms |", "|---|---:|"]
    lines += [f"| {name.removesuffix(', ms')} | {value:.0f} |" for name, value in data["saving"].items()]
    return "\n".join([*lines, "", setting_of(data["setting"])])


PUBLISHED = {
    "sc21": ("Narayanan et al. 2021, Table 1", "10 %"), "korthikanti": ("Korthikanti et al. 2022, times", "10 %"),
    "h100": ("Megatron-LM README, H100", "10 %"), "vtrain": ("vTrain, A100 over 8 to 32 nodes", "8 %"),
    "zero_bubble": ("Zero Bubble 1F1B, from the model alone", "none"),
    "memory": ("Korthikanti et al. 2022, bytes", "3 %"),
    "schedules": ("Zero Bubble, four schedules, from profiles", "5 %"),
}  # fmt: skip


def published() -> str:
    """Mean and worst error of each published table, rows that were fitted and the others apart."""
    data = json.loads((ROOT / "benchmarks/planner/results.json").read_text())
    lines = [
        "| published | bar | rows left out: mean | worst | rows fitted to: mean | worst |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (told, bar) in PUBLISHED.items():
        cells = []
        for fitted in (False, True):
            errors = [abs(row["error"]) for row in data.get(name, ()) if row.get("fitted", False) is fitted]
            cells += [f"{sum(errors) / len(errors):.1%}", f"{max(errors):.1%}"] if errors else ["", ""]
        lines.append(f"| {told} | {bar} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chosen() -> str:
    """What a plan chosen by the predictions costs, on vTrain's measurements."""
    rows = json.loads((ROOT / "benchmarks/planner/results.json").read_text())["vtrain"]
    lines = [
        "| vTrain | layouts | Spearman | chosen is slower than best | best of the first three |",
        "|---|---:|---:|---:|---:|",
    ]
    for model in dict.fromkeys(row["name"].split()[0] for row in rows):
        own = [row for row in rows if row["name"].split()[0] == model]
        best = min(row["measured"] for row in own)
        order = sorted(own, key=lambda row: row["predicted"])
        first, three = order[0]["measured"], min(row["measured"] for row in order[:3])
        place = {row["name"]: i for i, row in enumerate(sorted(own, key=lambda row: row["measured"]))}
        n = len(own)
        rank = 1 - 6 * sum((i - place[row["name"]]) ** 2 for i, row in enumerate(order)) / (n * (n * n - 1))
        lines.append(f"| {model} | {n} | {rank:.3f} | {first / best - 1:.1%} | {three / best - 1:.1%} |")
    return "\n".join(lines)


def every() -> str:
    """Each row."""
    data = json.loads((ROOT / "benchmarks/planner/results.json").read_text())
    lines = ["| table | row | published | ours | error | fitted |", "|---|---|---:|---:|---:|---|"]
    for name in PUBLISHED:
        for row in data.get(name, ()):
            truth = row.get("measured", row.get("published"))
            mark = "yes" if row.get("fitted", False) else ""
            lines.append(
                f"| {name} | {row['name']} | {truth:.4g} | {row['predicted']:.4g} | {row['error']:+.1%} | {mark} |"
            )
    return "\n".join(lines)


def here() -> str:
    """Random layouts on the machine at hand, predicted and measured."""
    data = json.loads((ROOT / "benchmarks/planner/here.json").read_text())
    lines = ["| this machine | predicted, ms | measured, ms | error | rounds |", "|---|---:|---:|---:|---:|"]
    errors = list[float]()
    for name, row in data.get("rows", {}).items():
        if row["rounds"]:
            errors.append(abs(row["predicted"] / row["measured"] - 1))
            numbers = f"{1e3 * row['predicted']:.0f} | {1e3 * row['measured']:.0f} | {errors[-1]:.1%}"
            lines.append(f"| {name} | {numbers} | {len(row['rounds'])} |")
    if not errors:
        raise FileNotFoundError("only profiled so far")
    lines += ["", f"{len(errors)} rows: off by {sum(errors) / len(errors):.1%} in the mean."]
    return "\n".join([*lines, "", setting_of(data["setting"])])


TABLES = {
    "tensor_parallel": tensor_parallel, "zero": zero, "alone": alone, "scaling": scaling,
    "whole": whole, "whole_short": whole_short,
    "pipeline": pipeline, "pipeline_deep": pipeline_deep, "overhead": overhead, "paced": paced, "slow": slow,
    "learning": learning, "groups": groups, "line": line, "soak": soak, "wire": wire,
    "published": published, "chosen": chosen,
    "every": every, "here": here,
}  # fmt: skip


def filled(text: str) -> str:
    """The text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        try:
            made = TABLES[match[1]]()
        except FileNotFoundError:
            made = "No result is recorded yet."
        return f"<!-- table: {match[1]} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite, or say what is stale."""
    stale = []
    for place in PLACES:
        path = ROOT / place
        old = path.read_text()
        new = filled(old)
        if new != old:
            stale.append(place)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale:
        print("rewritten:" if "--check" not in sys.argv else "stale:", *stale)
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
