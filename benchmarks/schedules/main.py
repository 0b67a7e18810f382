"""How long every schedule takes on four pipelines, simulated, and its picture: the blocks of docs/schedules.md.

python benchmarks/schedules/main.py            print them
python benchmarks/schedules/main.py --write    put them into the page; a test checks that it holds them
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from merak_like.cli.pipelines import parse_costs
from merak_like.partitioner.schedules import AS_DATA
from merak_like.partitioner.schedules.action import chain
from merak_like.partitioner.schedules.grid import picture
from merak_like.partitioner.schedules.scp import LADDER
from merak_like.partitioner.trial import NAMES, Pipeline, try_out

PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"

#: Block -> ranks, micro-batches, costs. The memory of auto is that of 1F1B on the first rank, on every rank.
PIPELINES = {
    "split": (4, 12, "F=1,B=1,W=1,C=0.1"),
    "recompute": (4, 8, "F=1,R=1,B=2"),
    "uneven": (4, 12, "F=1/1/1.2/1.6,B=1/1/1.2/1.6,W=0.8/0.9/1/1.3,C=0.1"),
    "profile": (8, 24, "F=18.522,B=18.086,W=9.337,C=0.601"),
}

#: Schedule -> ranks and micro-batches of its picture.
PICTURES = {
    "gpipe": (3, 4), "1f1b": (3, 4), "scp": (4, 5), "interleaved": (2, 4), "zb-h1": (3, 4), "zb-h2": (3, 6),
    "zb-v": (2, 3), "dualpipe-v": (2, 4),
}  # fmt: skip


def table(ranks: int, micro_batches: int, costs: str) -> str:
    """A row for each schedule."""
    pipeline = Pipeline(parse_costs(costs, ranks), micro_batches, chain(ranks), live=(ranks,) * ranks)
    rows = [
        f"p = {ranks}, m = {micro_batches}, `--costs {costs}`",
        "",
        "| schedule | makespan | bubble | peak | stages per rank |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in (each for each in NAMES if "R=" in costs or each not in LADDER):
        trial = try_out(name, pipeline)
        parts, timeline = trial.schedule.stages // ranks, trial.timeline
        full = " *" if trial.too_full(pipeline.live) is not None else ""
        peak = f"{max(trial.peak_live):g}{full}"
        rows.append(f"| `{name}` | {timeline.makespan:.5g} | {100 * timeline.bubble:.1f} % | {peak} | {parts} |")
    return "\n".join(rows)


def blocks() -> dict[str, str]:
    """Every generated block of the page."""
    drawn = {name: f"```\n{picture(AS_DATA[name](*size))}\n```" for name, size in PICTURES.items()}
    return drawn | {name: table(*pipeline) for name, pipeline in PIPELINES.items()}


def filled(page: str) -> str:
    """The page with its blocks replaced."""
    for name, text in blocks().items():
        marks = rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)"
        page, count = re.subn(marks, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} blocks {name!r}: it needs one")
    return page


def main() -> None:
    """Print the blocks, or write them."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n{text}" for name, text in blocks().items()))


if __name__ == "__main__":
    main()
