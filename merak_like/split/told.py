"""Forecasts for people: the ranked ways to split a training, and one of them beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from merak_like.split.choose import Choice, best_of_each
from merak_like.split.forecast import Forecast
from merak_like.split.means import Means

SHOWN, REFUSED = 12, 6


def table(choice: Choice, means: Means) -> str:
    """The ranked list: the best of each codec and rank, then the next best; what does not fit, and why."""
    best = best_of_each(choice.ranked)
    others = [one for one in choice.ranked if one not in best][: max(0, SHOWN - len(best))]
    up, down = (link.bandwidth * 8e-6 for link in (means.uplink, means.downlink))
    lines = [
        f"{up:g} Mbit/s up, {down:g} Mbit/s down, {means.uplink.latency * 1e3:g} ms; edge: {means.edge.name}, "
        f"{means.edge.memory_limit / 1e6:,.0f} MB to fill; host: {means.host.name}",
        "",
        "best of each codec and rank (codecs and narrow cuts cost accuracy: benchmarks/split)",
        *_rows(best),
    ]
    if others:
        lines += ["", "next best", *_rows(others)]
    if choice.refused:
        lines += ["", f"{len(choice.refused)} do not fit or cannot be cut:"]
        lines += [f"  {what}: {why}" for what, why in choice.refused[:REFUSED]]
    first = choice.ranked[0]
    lines += ["", f"fastest: {first.cut}, {first.codec}, {first.micro_batches} micro-batches"]
    return "\n".join(lines)


def _rows(forecasts: Sequence[Forecast]) -> list[str]:
    cells = [("cut", "codec", "micro-batches", "seconds", "sent", "received", "edge MB", "what binds")]
    cells += [
        (
            one.cut, one.codec, str(one.micro_batches), f"{one.seconds:.3f}", f"{one.sent:,}", f"{one.received:,}",
            f"{one.edge_bytes / 1e6:,.1f}", one.why,
        )
        for one in forecasts
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    left = (0, 1, 7)
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip()
        for row in cells
    ]  # fmt: skip


def beside(told: Forecast, steps: Sequence[Mapping[str, Any]]) -> str:
    """Predicted and measured, of the steps an edge has printed: cumulative seconds, and bytes sent and received.

    Measured are medians over all steps but the first, which traces; bytes of codecs with memory are of later visits.
    """

    def of_a_step(name: str) -> float:
        values = [float(line[name]) for line in steps]
        return median(after - before for before, after in pairwise(values))

    seconds = f"{told.seconds:12.3f}" if told.walked else f"{'no machines':>12}"
    lines = [
        f"{'a step':<16}{'predicted':>12}{'measured':>12}",
        f"{'seconds':<16}{seconds}{of_a_step('seconds'):12.3f}",
        f"{'bytes sent':<16}{told.sent:12,}{of_a_step('sent'):12,.0f}",
        f"{'bytes received':<16}{told.received:12,}{of_a_step('received'):12,.0f}",
    ]
    return "\n".join([*lines, f"binds: {told.why}"] if told.why else lines)
