"""Sections of a plan's page: cuts, memory of each rank, the step over time, other choices, and what was assumed."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from typing import TYPE_CHECKING, Any, cast

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report import summary
from merak_like.partitioner.report.text import bytes_text, change_text, percent_text, seconds_text

if TYPE_CHECKING:
    from merak_like.partitioner.explain.why import Why

MOST_ACTIONS = 4000
"""A step of more actions is not drawn on the page: as a picture it is a smear of half a megabyte."""


def rows(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; ``>`` in front of a head sets its column right."""

    def kind(head: str) -> str:
        return ' class="number"' if head.startswith(">") else ""

    top = "".join(f"<th{kind(head)}>{escape(head.removeprefix('>'))}</th>" for head in heads)
    body = "".join(
        f"<tr>{''.join(f'<td{kind(h)}>{escape(c)}</td>' for h, c in zip(heads, line, strict=True))}</tr>"
        for line in lines
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def ranks(plan: Plan) -> str:
    """The memory of every pipeline rank at its fullest, by kind, as bars of one scale."""
    whole = max(plan.memory_limit, *plan.rank_bytes) or 1
    bars: list[str] = []
    for rank, total in enumerate(plan.rank_bytes):
        own = [stage for stage in plan.stages if stage.rank == rank]
        held = {kind: sum(getattr(s.memory, kind) for s in own) for kind in summary.MEMORY_KINDS}
        apart = sum(held.values())  # its stages need not be fullest together
        fill = "".join(
            f'<i class="{kind}" style="width:{100 * nbytes / (apart or 1) * total / whole:.2f}%" '
            f'title="{kind}: {bytes_text(nbytes)}"></i>'
            for kind, nbytes in held.items()
        )
        over = ' class="over"' if total > plan.memory_limit else ""
        bars.append(
            f'<div class="meter"><div><span>rank {rank}</span><span{over}>{bytes_text(total)}, '
            f'{percent_text(total / plan.memory_limit if plan.memory_limit else 0)} of {bytes_text(plan.memory_limit)}'
            f'</span></div><div class="track">{fill}</div></div>'
        )  # fmt: skip
    return f'<h2>Memory of each rank</h2><section class="card" id="ranks">{"".join(bars)}</section>'


def cuts(plan: Plan, found: Why | None) -> str:
    """Where the stages meet, what crosses there, and what the next-best place would cost."""
    heads = [">cut", "before", ">bytes", ">values"] + (["next best before", ">step", ">costs"] if found else [])
    begins = {unit.first: unit.name for unit in plan.units}
    lines: list[list[str]] = []
    for cut in summary.cuts(plan):
        start = plan.stages[cut.after + 1].start
        line = [f"{cut.after}|{cut.after + 1}", begins.get(start, f"op {start}"), bytes_text(cut.nbytes)]
        line.append(str(len(cut.crossings)))
        if found is not None:
            other = next((one for one in found.next_cuts if one.after == cut.after), None)
            seconds = None if other is None else other.step_seconds
            line += ["no other place fits" if other is None or not other.instead else other.instead]
            line += ["", ""] if seconds is None else [seconds_text(seconds), change_text(seconds, plan.step_seconds)]
        lines.append(line)
    return f'<h2>Cuts</h2><div id="cuts">{rows(heads, lines)}</div>' if lines else ""


def over_time(plan: Plan) -> str:
    """The simulated step, as a picture that keeps its own style."""
    from merak_like.partitioner.explain.losses import Played
    from merak_like.partitioner.report.timeline import to_svg

    try:
        played = Played.of_plan(plan)
    except ValueError:  # a plan by hand whose stages do not fit its schedule
        return ""
    actions = sum(len(order) for order in played.schedule.orders)
    if actions > MOST_ACTIONS:
        return (
            f"<h2>The step over time</h2><p class='lead'>{actions:,} actions are too many for this page: "
            "<code>merak timeline plan.json</code> draws them.</p>"
        )
    picture = to_svg(played.schedule, played.timeline, title="", number=seconds_text)
    data = b64encode(picture.encode()).decode()
    return (
        '<h2>The step over time</h2><div class="stand" id="time">'
        f'<img alt="the simulated step, a lane for each rank" src="data:image/svg+xml;base64,{data}"></div>'
    )


def losses(found: Why) -> str:
    """Where the step goes, and what binds."""
    from merak_like.partitioner.explain.losses import CAUSES
    from merak_like.partitioner.report.reasons import TOLD, says

    step = found.losses.step or 1.0
    lines = [
        (cause, seconds_text(seconds), percent_text(seconds / step), TOLD[cause])
        for cause, seconds in ((cause, getattr(found.losses, cause)) for cause in CAUSES)
    ]
    told = "".join(f"<li>{escape(line)}</li>" for line in says(found))
    table = rows(["cause", ">seconds", ">share", "what it is"], lines)
    return f'<h2>Where the step goes</h2><ul class="why">{told}</ul><div id="losses">{table}</div>'


def choices(plan: Plan, found: Why) -> str:
    """Other choices and other degrees, with what each would take."""
    own = summary.samples(plan) / plan.step_seconds if plan.step_seconds else 0.0
    lines: list[list[str]] = []
    for one in sorted(found.choices, key=lambda c: (not c.fits, -(c.samples / (c.step_seconds or float("inf"))))):
        rate = one.samples / one.step_seconds if one.step_seconds else 0.0
        lines.append([
            one.what, one.how, seconds_text(one.step_seconds) if one.step_seconds else "does not fit",
            f"{rate:.4g}" if rate else "", change_text(rate, own) if rate and own else "",
            bytes_text(one.rank_bytes) if one.rank_bytes else "",
        ])  # fmt: skip
    heads = ["choice", "how known", ">step", ">samples/s", ">against the plan", ">fullest rank"]
    told = f'<h2>Other choices</h2><div id="choices">{rows(heads, lines)}</div>' if lines else ""
    if found.runners_up:
        others = [
            (f"dp {o.dp} x pp {o.pp} x tp {o.tp}", str(o.micro_batches or ""),
             seconds_text(o.step_seconds) if o.step_seconds is not None else "does not fit", o.why)
            for o in found.runners_up
        ]  # fmt: skip
        told += f"<h2>Other degrees</h2>{rows(['degrees', '>micro-batches', '>step', 'why not'], others)}"
    return told


def assumptions(plan: Plan) -> str:
    """Every number that the estimate starts from, and where it comes from."""
    from merak_like.partitioner.planned import hardware_of

    hardware = hardware_of(plan)
    lines: list[tuple[str, str]] = []
    if hardware is not None:
        lines += [(name, told) for name, told in _figures(hardware) if told]
    if plan.basis is not None:
        asked = {name: item for name, item in plan.basis.options.items() if name not in ("hardware", "signature")}
        for name, item in asked.items():
            lines += [(f"asked: {inner}", told) for inner, told in _figures(item, name)]
    lines.append(("memory limit of a rank", bytes_text(plan.memory_limit)))
    return f'<h2>What was assumed</h2><div id="assumed">{rows(["number", "value"], lines)}</div>'


def _figures(item: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every number of frozen data by its dotted name."""
    if is_dataclass(item) and not isinstance(item, type):
        for f in fields(item):
            yield from _figures(getattr(item, f.name), f"{name}.{f.name}" if name else f.name)
    elif isinstance(item, Mapping):
        for key, value in cast(Mapping[str, Any], item).items():
            yield from _figures(value, f"{name}.{key}")
    elif item is not None:
        yield name, f"{item:.6g}" if isinstance(item, float) else str(item)
