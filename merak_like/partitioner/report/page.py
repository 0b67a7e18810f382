"""A plan as one HTML file: no network, no library, everything from the plan escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

from merak_like.partitioner.plan import Plan, StagePlan, Unit
from merak_like.partitioner.report import page_parts, summary
from merak_like.partitioner.report.drawing import cut_tips, svg, unit_tips
from merak_like.partitioner.report.page_script import SCRIPT
from merak_like.partitioner.report.page_style import STYLE
from merak_like.partitioner.report.text import (
    bytes_text,
    count_text,
    flops_text,
    percent_text,
    ranges,
    seconds_text,
    shape_text,
)

if TYPE_CHECKING:
    from merak_like.partitioner.explain.why import Why

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The browser itself refuses every request the page could make."""

_HEATS = {"time": "seconds", "parameters": "param_bytes", "activations": "activation_bytes"}
_LIES = {"divided": "weights divided", "partly": "some of them", "whole": "weights whole on every rank"}
"""What the colours of tensor parallelism say; see ``sharded.kinds``."""


def page(plan: Plan, found: Why | None = None) -> str:
    """The whole page; with ``found``, what ``explain.why`` says of the plan as well."""
    title = f"{plan.model} on {plan.mesh}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{"".join(_colours(len(plan.stages)))}</style>
</head>
<body>
<main>
<header>
<h1>{escape(plan.model)}</h1>
<p class="lead">{escape(f"{plan.mesh} on {plan.hardware}, schedule {plan.schedule}")}</p>
<dl class="facts">{"".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _facts(plan))}</dl>
</header>
<h2>Stages</h2>
<section class="cards">{"".join(_cards(plan))}</section>
<ul class="legend">{"".join(f'<li><i class="{kind}"></i>{kind}</li>' for kind in summary.MEMORY_KINDS)}
<li class="s0">time: <i class="forward"></i>forward, <i class="backward"></i>backward of one micro-batch</li></ul>
{page_parts.ranks(plan)}
{page_parts.losses(found) if found else ""}
{page_parts.cuts(plan, found)}
{_graph(plan)}
{page_parts.over_time(plan)}
{page_parts.choices(plan, found) if found else ""}
{"".join(_sections(plan))}
{page_parts.assumptions(plan)}
<footer>{"".join(_footer(plan))}</footer>
</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="tips">{_data(plan)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _colours(stages: int) -> Iterator[str]:
    """A hue for each stage: spread evenly while they are few, by the golden angle when they are many."""
    for stage in range(stages):
        hue = (255 + stage * (360 / max(stages, 3) if stages <= 8 else 137.508)) % 360
        yield (
            f".s{stage}{{--hue:{hue:.0f};--fill:oklch(var(--fill-l) var(--fill-c) {hue:.0f});"
            f"--line:oklch(var(--line-l) var(--line-c) {hue:.0f})}}\n"
        )


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "step (simulated)", seconds_text(plan.step_seconds)
    yield "bubble", percent_text(plan.bubble)
    yield "samples a step", f"{summary.samples(plan):,}".replace(",", " ")
    yield "micro-batches", f"{plan.micro_batches} of {plan.micro_batch}"
    yield "ranks", str(plan.mesh.size)
    yield "forward", flops_text(sum(stage.flops for stage in plan.stages))
    yield "fullest rank", f"{bytes_text(max(plan.rank_bytes))} of {bytes_text(plan.memory_limit)}"


def _cards(plan: Plan) -> Iterator[str]:
    slowest = max(summary.stage_seconds(stage) for stage in plan.stages) or 1.0
    for stage, share in zip(plan.stages, summary.shares(plan), strict=True):
        holds = ", ".join(ranges(summary.holds(plan, stage)))
        live = f"{stage.live_micro_batches} live micro-batch{'es' if stage.live_micro_batches > 1 else ''}"
        recompute = f"recomputes {summary.again(plan, stage)}" if stage.recompute else ""
        rank = f" on rank {stage.rank}" if summary.shared_ranks(plan) else ""
        yield (
            f'<article class="card s{stage.index}"><h3>Stage {stage.index}{rank}'
            f"<span>{escape(f'{count_text(stage.param_count)} params')}</span></h3>"
            f"<p>{escape(holds)}</p>"
            + _meter(
                f"time {seconds_text(summary.stage_seconds(stage))}",
                f"{percent_text(share)} of slowest",
                [("forward", stage.forward_seconds / slowest), ("backward", stage.backward_seconds / slowest)],
            )
            + _memory(plan, stage)
            + _row(live, recompute)
            + _row(*_traffic(plan, stage))
            + "</article>"
        )


def _memory(plan: Plan, stage: StagePlan) -> str:
    limit, total = plan.memory_limit or 1, stage.memory.total
    fits = plan.rank_bytes[stage.rank] <= plan.memory_limit
    whole = max(limit, total)
    parts = [(kind, getattr(stage.memory, kind) / whole) for kind in summary.MEMORY_KINDS]
    said = f"{percent_text(total / limit)} of {bytes_text(limit)}"
    return _meter(f"memory {bytes_text(total)}", said, parts, over=not fits)


def _traffic(plan: Plan, stage: StagePlan) -> tuple[str, str]:
    received, sent = summary.received_bytes(plan, stage.index), summary.sent_bytes(plan, stage.index)
    return f"receives {bytes_text(received)}" if received else "", f"sends {bytes_text(sent)}" if sent else ""


def _row(left: str, right: str) -> str:
    return f'<div class="meter"><div><span>{escape(left)}</span><span>{escape(right)}</span></div></div>' * bool(
        left or right
    )


def _meter(left: str, right: str, parts: Sequence[tuple[str, float]], over: bool = False) -> str:
    fill = "".join(
        f'<i class="{kind}" style="width:{100 * part:.2f}%" title="{kind}: {percent_text(part)}"></i>'
        for kind, part in parts
    )
    mark = ' class="over"' if over else ""
    return (
        f'<div class="meter"><div><span>{escape(left)}</span><span{mark}>{escape(right)}</span></div>'
        f'<div class="track">{fill}</div></div>'
    )


def _graph(plan: Plan) -> str:
    again = "<li>dashed box: computed again for the backward</li>" * any(s.recompute for s in plan.stages)
    kinds = [*_HEATS, *(["tensor parallelism"] if plan.sharding else [])]
    heats = "".join(f'<option value="{kind}">colour: {kind}</option>' for kind in kinds)
    lies = "".join(f'<li><i class="{kind}"></i>{said}</li>' for kind, said in _LIES.items() if plan.sharding)
    return f"""<div class="bar"><h2>Units</h2>
<output id="found" for="seek"></output>
<input id="seek" type="search" placeholder="find a unit or type" aria-label="find a unit or type">
<select id="colour" aria-label="colour"><option value="stage">colour: stage</option>{heats}</select>
<button id="out" title="smaller">&minus;</button><button id="in" title="larger">+</button>
<button id="fit">fit</button></div>
<div class="stand">{svg(plan)}</div>
<ul class="legend"><li>line under a unit: its time against the slowest unit's</li>
<li>dashed: a cut, with the values live across it (one micro-batch, forward)</li>
<li>coloured rails: values read further on than the next unit</li>{again}{lies}</ul>"""


def _sections(plan: Plan) -> Iterator[str]:
    if plan.crossings:
        yield f"<h2>Values that leave their stage</h2>{_crossings(plan)}"
    if plan.notes:
        yield f"<h2>Why</h2>{_list(plan.notes)}"
    if plan.ties:
        yield f"<h2>Tied weights</h2>{_list([_tie(plan, names) for names in plan.ties])}"
    if recompute := summary.recomputed(plan):
        yield f"<h2>Computed again for the backward</h2>{_list(recompute)}"
    if plan.orders:
        lines = [f"rank {rank}: {line}" for rank, line in enumerate(plan.orders)]
        yield f"<h2>Order, built for these stages</h2>{_list(lines)}"


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="why">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def _tie(plan: Plan, names: Sequence[str]) -> str:
    stages = plan.shared.get(names[0], ())
    where = f", on stages {', '.join(map(str, stages))}: gradients are summed" if len(stages) > 1 else ""
    return " = ".join(names) + where


def _crossings(plan: Plan) -> str:
    rows = "".join(
        f'<tr><td class="number">{c.source}</td><td>{", ".join(ranges(map(str, c.targets)))}</td>'
        f"<td><code>{escape(c.value)}</code></td><td>{escape(shape_text(c.shape, c.dtype))}</td>"
        f'<td class="number">{bytes_text(c.nbytes)}</td><td>{"comes back" if c.requires_grad else "none"}</td></tr>'
        for c in plan.crossings
    )
    return (
        '<div class="wide"><table><thead><tr><th class="number">from</th><th>to</th><th>value</th><th>shape</th>'
        f'<th class="number">bytes</th><th>gradient</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _footer(plan: Plan) -> Iterator[str]:
    yield f"<p>Plan <code>{plan.digest}</code></p>"
    if plan.signature:
        yield f"<p>Traced with {escape(', '.join(f'{name} {about}' for name, about in plan.signature.items()))}</p>"


def _data(plan: Plan) -> str:
    """The tips as JSON that cannot end its script element."""
    heat = {kind: _relative(plan.units, name) for kind, name in _HEATS.items()}
    text = json.dumps({"units": unit_tips(plan), "cuts": cut_tips(plan), "heat": heat}, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _relative(units: Sequence[Unit], name: str) -> list[float]:
    most = max((getattr(u, name) for u in units), default=0) or 1
    return [round(getattr(u, name) / most, 4) for u in units]
