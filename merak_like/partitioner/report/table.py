"""A plan in the terminal: stages, memory, cuts, reasons."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from merak_like.partitioner.plan import Plan, StageMemory, StagePlan
from merak_like.partitioner.report import summary
from merak_like.partitioner.report.text import (
    bar,
    bytes_text,
    bytes_unit,
    common_prefix,
    count_text,
    flops_text,
    percent_text,
    ranges,
    seconds_text,
    shape_text,
)

STAGE_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "bright_blue", "bright_cyan", "bright_magenta")
MEMORY_HEADS = {
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "boundary": "cuts",
    "workspace": "work",
}
SHOWN = tuple(kind for kind in summary.MEMORY_KINDS if kind != "logits")
"""A terminal is narrow: logits are shown as the activations that they are."""
MAX_ACTIONS = 30
"""Actions of an order that are printed; the plan file has all of them."""
MAX_CROSSINGS = 24
"""Rows of the table of crossings; the JSON and the page have all of them."""


def render(plan: Plan) -> RenderableType:
    """Everything about a plan that fits a terminal."""
    parts: list[RenderableType] = [_head(plan), stage_table(plan), memory_table(plan)]
    if len(plan.stages) > 1:
        parts.append(crossing_table(plan))
    parts.extend(_lists(plan))
    return Group(*parts)


def _head(plan: Plan) -> Text:
    mesh, ranks = plan.mesh, plan.mesh.size
    text = Text()
    text.append(plan.model, style="bold")
    text.append(f" on {mesh}: {ranks} rank{'s' if ranks > 1 else ''} of {plan.hardware}\n")
    text.append(f"{plan.schedule}, {plan.micro_batches} micro-batches of {plan.micro_batch}")
    text.append(f" = {summary.samples(plan)} samples a step in ")
    text.append(seconds_text(plan.step_seconds), style="bold")
    text.append(f" (simulated), bubble {percent_text(plan.bubble)}\n")
    text.append(f"plan {plan.digest[:12]}", style="dim")
    if plan.signature:
        text.append("  traced with " + ", ".join(f"{k} {v}" for k, v in plan.signature.items()), style="dim")
    text.append("\n")
    return text


def _shown(memory: StageMemory, kind: str) -> int:
    return getattr(memory, kind) + (memory.logits if kind == "activations" else 0)


def _stage_name(stage: StagePlan) -> Text:
    return Text(str(stage.index), style=f"bold {STAGE_COLOURS[stage.index % len(STAGE_COLOURS)]}")


def _table(title: str) -> Table:
    return Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )


def stage_table(plan: Plan) -> Table:
    """What each stage holds and how long it takes; the bar is its time against the slowest stage's."""
    table = _table("Stages (one micro-batch)")
    table.add_column("stage", justify="right", no_wrap=True)
    shared, again = summary.shared_ranks(plan), any(stage.recompute for stage in plan.stages)
    if shared:
        table.add_column("rank", justify="right", no_wrap=True)
    prefix = common_prefix(u.block for u in plan.units)
    table.add_column(f"holds ({prefix}*)" if prefix else "holds", overflow="fold")
    for head in ("params", "FLOP", "forward", "backward", *(["again"] if again else [])):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("balance", no_wrap=True)
    for stage, share in zip(plan.stages, summary.shares(plan), strict=True):
        table.add_row(
            _stage_name(stage),
            *([str(stage.rank)] if shared else []),
            Text(" ".join(ranges(name.removeprefix(prefix) for name in summary.holds(plan, stage)))),
            count_text(stage.param_count),
            flops_text(stage.flops).removesuffix("FLOP"),
            seconds_text(stage.forward_seconds),
            seconds_text(stage.backward_seconds),
            *([seconds_text(stage.recompute_seconds) if stage.recompute else ""] if again else []),
            Text(f"{bar(share, 6)} {percent_text(share)}", style="green" if share > 0.9 else "yellow"),
        )
    return table


def memory_table(plan: Plan) -> Table:
    """Bytes of each stage at its fullest moment, by kind, and of each rank against the limit."""
    limit, shared = plan.memory_limit, summary.shared_ranks(plan)
    unit, scale = bytes_unit(max(limit, *plan.rank_bytes))
    table = _table(f"Memory of one rank at its fullest, in {unit}; the limit is {bytes_text(limit)}")
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("live", justify="right", no_wrap=True)
    for kind in SHOWN:
        table.add_column(MEMORY_HEADS.get(kind, kind), justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("of limit", no_wrap=True)
    for stage in plan.stages:
        table.add_row(
            _stage_name(stage),
            str(stage.live_micro_batches),
            *(f"{_shown(stage.memory, kind) / scale:.2f}" for kind in SHOWN),
            Text(f"{stage.memory.total / scale:.2f}", style="" if shared else "bold"),
            "" if shared else _of_limit(plan, stage.rank),
        )
    if shared:
        table.add_section()
        for rank, total in enumerate(plan.rank_bytes):
            blank = [""] * (len(SHOWN) + 1)
            table.add_row(f"rank {rank}", *blank, Text(f"{total / scale:.2f}", style="bold"), _of_limit(plan, rank))
        table.caption = "stages of one rank need not be fullest at the same moment"
        table.caption_justify = "left"
    return table


def _of_limit(plan: Plan, rank: int) -> Text:
    share = plan.rank_bytes[rank] / plan.memory_limit if plan.memory_limit else 0.0
    style = "red" if share > 1 else "yellow" if share > 0.9 else "green"
    return Text(f"{bar(share, 6) if share <= 1 else 'OVER  '} {percent_text(share)}", style=style)


def crossing_table(plan: Plan) -> Table:
    """The values each stage sends on, with shapes and bytes of one micro-batch."""
    table = _table("Values that leave their stage (one micro-batch, forward)")
    table.add_column("from", justify="right", no_wrap=True)
    table.add_column("to", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("gradient", no_wrap=True)
    for crossing in plan.crossings[:MAX_CROSSINGS]:
        table.add_row(
            _stage_name(plan.stages[crossing.source]),
            ", ".join(ranges(map(str, crossing.targets))),
            Text(crossing.value),
            shape_text(crossing.shape, crossing.dtype),
            bytes_text(crossing.nbytes),
            "comes back" if crossing.requires_grad else "none",
        )
    table.caption = f"live across the cuts: {', '.join(_live(plan))}"
    if (hidden := len(plan.crossings) - MAX_CROSSINGS) > 0:
        table.caption += f"; {hidden} more rows are in the plan file"
    table.caption_justify = "left"
    return table


def _live(plan: Plan) -> Iterator[str]:
    """Bytes over each cut, cuts of equal bytes together: ``0|1 to 4|5 33.6 MB``."""
    for nbytes, alike in groupby(summary.cuts(plan), key=lambda cut: bytes_text(cut.nbytes)):
        names = [f"{cut.after}|{cut.after + 1}" for cut in alike]
        yield f"{names[0]}{f' to {names[-1]}' if names[1:] else ''} {nbytes}"


def _lists(plan: Plan) -> Iterator[RenderableType]:
    """Recompute, orders, ties and reasons: one line each, absent when there is nothing to say."""
    recompute = summary.recomputed(plan)
    orders = [f"rank {rank}: {_shortened(line)}" for rank, line in enumerate(plan.orders)]
    ties = [" = ".join(names) + _where(plan, names[0]) for names in plan.ties]
    lists = (
        ("Computed again for the backward", recompute),
        ("Order, built for these stages", orders),
        ("Tied weights", ties),
        ("Why", list(plan.notes)),
    )
    for head, lines in lists:
        if lines:
            table = Table.grid(padding=(0, 1))
            for line in lines:
                table.add_row("-", Text(line))
            yield Text(f"\n{head}", style="bold")
            yield table


def _shortened(order: str) -> str:
    actions = order.split()
    left = len(actions) - MAX_ACTIONS
    return " ".join(actions[:MAX_ACTIONS]) + (f" and {left} more" if left > 0 else "")


def _where(plan: Plan, name: str) -> str:
    stages = plan.shared.get(name, ())
    return f" (on stages {', '.join(map(str, stages))}: their gradients are summed)" if len(stages) > 1 else ""
