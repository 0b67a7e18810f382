"""The scene as SVG, and what the page tells about each unit and cut when it is pointed at."""

from __future__ import annotations

from html import escape
from typing import Any

from merak_like.partitioner.plan import Plan, Unit
from merak_like.partitioner.report.layout import BOX_HEIGHT, BOX_WIDTH, CARD_HEAD, CARD_ROW, LISTED, arrange
from merak_like.partitioner.report.routing import Box, Edge
from merak_like.partitioner.report.sharded import kinds, of_units
from merak_like.partitioner.report.summary import Cut, cuts, stage_seconds
from merak_like.partitioner.report.text import (
    bytes_text,
    common_prefix,
    count_text,
    flops_text,
    percent_text,
    seconds_text,
    shape_text,
)

Tip = dict[str, object]
"""What is shown on pointing at something: ``name``, ``kind``, ``rows`` of (label, text)."""


def svg(plan: Plan) -> str:
    """The proxy graph of a plan at the level of units, coloured by stage."""
    scene = arrange(plan)
    prefix = common_prefix(u.block for u in plan.units)
    slowest = max((u.seconds for u in plan.units), default=0.0) or 1.0
    width, height = scene.width + 2, scene.height + 2
    parts = [
        f'<svg id="graph" viewBox="-1 -1 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="group" aria-label="Units of {escape(plan.model)} by stage">'
    ]
    parts += [_panel(plan, box) for box in scene.panels]
    parts += [f'<rect class="block" {_rect(box)} rx="6"/>' for box in scene.blocks]
    parts += [_line(gap) for gap in scene.gaps]
    parts += [_edge(plan, edge) for edge in scene.edges]
    parts += [_cut(card, cut) for card, cut in zip(scene.cards, cuts(plan), strict=True)]
    again = {name for stage in plan.stages for name in stage.recompute}
    lies = kinds(plan)
    for box in scene.units:
        unit = plan.units[box.index]
        parts.append(_unit(unit, box, prefix, slowest, unit.name in again, lies[box.index]))
    parts += ["</svg>"]
    return "\n".join(parts)


def unit_tips(plan: Plan) -> list[Tip]:
    """For each unit what its tooltip says."""
    tips = [_unit_tip(plan, unit) for unit in plan.units]
    for tip, (parts, whole) in zip(tips, of_units(plan), strict=True) if plan.sharding else ():
        rows: Any = tip["rows"]
        rows += [["sharded", f"{name}: {layout}"] for name, layout in parts.items()]
        rows += [["on every rank", f"{name}: {why}"] for name, why in whole.items()]
    return tips


def cut_tips(plan: Plan) -> list[Tip]:
    """For each cut what its tooltip says: every value over it."""
    return [
        {
            "name": f"Cut between stage {cut.after} and stage {cut.after + 1}",
            "kind": f"{bytes_text(cut.nbytes)} in {_values(len(cut.crossings))}, one micro-batch, forward",
            "rows": [[c.value, f"{shape_text(c.shape, c.dtype)}, {bytes_text(c.nbytes)}"] for c in cut.crossings],
        }
        for cut in cuts(plan)
    ]


def _unit_tip(plan: Plan, unit: Unit) -> Tip:
    total = stage_seconds(plan.stages[unit.stage]) or 1.0
    again = ", computed again" if unit.name in plan.stages[unit.stage].recompute else ", kept"
    rows = [
        ["forward", flops_text(unit.flops)],
        ["forward and backward", f"{seconds_text(unit.seconds)} ({percent_text(unit.seconds / total)} of its stage)"],
        ["parameters", bytes_text(unit.param_bytes)],
        ["activations", f"{bytes_text(unit.activation_bytes)} a micro-batch{again}"],
        ["ops", f"{unit.first} to {unit.stop - 1}"],
    ]
    if unit.block != unit.name:
        rows.append(["block", unit.block])
    if unit.reads:
        far = [f"{plan.units[r].name}{_from(plan, r, unit)}" for r in unit.reads[:5]]
        rows.append(["reads", ", ".join(far) + (f" and {len(unit.reads) - 5} more" if len(unit.reads) > 5 else "")])
    return {"name": unit.name, "kind": f"{unit.type}, stage {unit.stage}", "rows": rows}


def _from(plan: Plan, read: int, reader: Unit) -> str:
    stage = plan.units[read].stage
    return f" (stage {stage})" if stage != reader.stage else ""


def _rect(box: Box) -> str:
    return f'x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}"'


def _panel(plan: Plan, box: Box) -> str:
    stage = plan.stages[box.index]
    about = f"{count_text(stage.param_count)} params, {bytes_text(stage.memory.total)}"
    time = seconds_text(stage_seconds(stage))
    return (
        f'<g class="panel s{box.index}"><rect {_rect(box)} rx="10"/>'
        f'<text class="stage" x="{box.x + 14:g}" y="{box.y + 20:g}">Stage {box.index}</text>'
        f'<text class="time" x="{box.x + box.width - 14:g}" y="{box.y + 20:g}">{escape(time)}</text>'
        f'<text class="about" x="{box.x + 14:g}" y="{box.y + 36:g}">{escape(about)}</text></g>'
    )


def _unit(unit: Unit, box: Box, prefix: str, slowest: float, again: bool, lies: str) -> str:
    label = shortened(unit.name.removeprefix(prefix), 21)
    said = f"{unit.name}, {unit.type}, stage {unit.stage}, {seconds_text(unit.seconds)}, {flops_text(unit.flops)}"
    said += ", computed again" * again
    bar = max(0.0, (BOX_WIDTH - 8) * unit.seconds / slowest)
    return (
        f'<g class="unit s{unit.stage}{" again" * again}{f" {lies}" if lies else ""}" id="unit-{box.index}" '
        f'data-unit="{box.index}" tabindex="0" role="img" '
        f'aria-label="{escape(said)}" transform="translate({box.x:g} {box.y:g})">'
        f'<rect class="box" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="4"/>'
        f'<rect class="cost" x="4" y="{BOX_HEIGHT - 4}" width="{bar:.1f}" height="2" rx="1"/>'
        f'<text x="8" y="14">{escape(label)}</text>'
        f'<text class="amount" x="{BOX_WIDTH - 7}" y="14">{escape(seconds_text(unit.seconds))}</text></g>'
    )


def _edge(plan: Plan, edge: Edge) -> str:
    stage = plan.units[edge.source].stage
    tips = "".join(f"M{x:g} {y:g}l-3.5-5h7z" if down else f"M{x:g} {y:g}l-5-3.5v7z" for x, y, down in edge.tips)
    kind = "skip" if edge.skip else "chain"
    return (
        f'<g class="edge {kind} s{stage}" data-from="{edge.source}" data-to="{" ".join(map(str, edge.targets))}">'
        f'<path class="way" d="{edge.path}"/><path class="tip" d="{tips}"/></g>'
    )


def _line(gap: Box) -> str:
    x = gap.x + gap.width / 2
    return f'<line class="cut-line" x1="{x:g}" y1="{gap.y:g}" x2="{x:g}" y2="{gap.y + gap.height:g}"/>'


def _cut(card: Box, cut: Cut) -> str:
    """The label on a cut: bytes, then its values, each with its shape."""
    x, listed = card.x + card.width / 2, cut.crossings[:LISTED]
    rows: list[str] = []
    for n, crossing in enumerate(listed):
        y = card.y + CARD_HEAD + 12 + CARD_ROW * n
        rows.append(f'<text class="value" x="{x:g}" y="{y:g}">{escape(shortened(crossing.value, 21))}</text>')
        about = shape_text(crossing.shape, crossing.dtype)
        rows.append(f'<text class="about" x="{x:g}" y="{y + 13:g}">{escape(shortened(about, 25))}</text>')
    if hidden := len(cut.crossings) - len(listed):
        rows.append(f'<text class="about" x="{x:g}" y="{card.y + card.height - 8:g}">and {hidden} more</text>')
    said = f"Cut {cut.after} to {cut.after + 1}: {_values(len(cut.crossings))}, {bytes_text(cut.nbytes)}"
    return (
        f'<g class="cut" data-cut="{cut.after}" tabindex="0" role="img" aria-label="{escape(said)}">'
        f'<rect {_rect(card)} rx="8"/>'
        f'<text class="sum" x="{x:g}" y="{card.y + 17:g}">{escape(bytes_text(cut.nbytes))}</text>{"".join(rows)}</g>'
    )


def _values(number: int) -> str:
    return "1 value" if number == 1 else f"{number} values"


def shortened(text: str, most: int) -> str:
    """At most ``most`` characters; what is left out stands in the middle, where names differ least."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
