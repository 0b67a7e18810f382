"""What tensor parallelism does to each block, for people: what is sharded, what is not and why, what is summed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.sharded import (
    block_share,
    check,
    dimensions,
    link_bytes,
    share,
    step_bytes,
    whole_model,
)
from merak_like.partitioner.report.text import bytes_text, count_text, percent_text, ranges
from merak_like.partitioner.sharding import ShardedBlock


def render(plan: Plan) -> RenderableType:
    """A table per distinct block, and the sum."""
    check(plan)
    parts: list[RenderableType] = [_head(plan)]
    for block in plan.sharding:
        parts += [_title(plan, block), *([_table(block)] if block.weights or block.whole else []), _below(plan, block)]
    return Group(*parts)


def _head(plan: Plan) -> Text:
    summed, moved = (bytes_text(whole_model(plan, of)) for of in (step_bytes, link_bytes))
    form = ", between its products on their rows" if plan.sequence_parallel else ""
    text = Text()
    text.append(plan.model, style="bold")
    text.append(
        f" over {plan.mesh.tp} tensor-parallel ranks{form}: {percent_text(share(plan))} of its matrices are sharded\n"
    )
    text.append(f"in a step of one replica {summed} are summed over the ranks, {moved} go over each rank's link\n")
    return text


def _title(plan: Plan, block: ShardedBlock) -> Text:
    text = Text()
    text.append(block.name, style="bold")
    if block.like:
        text.append(f" and {len(block.like)} like it: {', '.join(ranges(block.like))}")
    return text


def _table(block: ShardedBlock) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("weight", overflow="fold")
    table.add_column("dim", justify="right", no_wrap=True)
    table.add_column("on the ranks", overflow="fold")
    own = f"{block.name}."
    for name, layout in block.weights.items():
        table.add_row(name.removeprefix(own), ", ".join(map(str, dimensions(layout))), Text(layout, style="green"))
    for why, names in _by_reason(block.whole):
        table.add_row(" ".join(name.removeprefix(own) for name in names), "", Text(f"whole: {why}", style="yellow"))
    return table


def _by_reason(whole: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    ordered = sorted(whole.items(), key=lambda item: item[1])
    for why, items in groupby(ordered, key=lambda item: item[1]):
        yield why, [name for name, _ in items]


def _below(plan: Plan, block: ShardedBlock) -> Text:
    text = Text()
    text.append(f"{percent_text(block_share(block))} of {count_text(block.matrix_elements)} matrix elements sharded, ")
    text.append(f"{block.values} values in parts\n")
    for group in block.groups:
        if not (group.forward_bytes or group.backward_bytes or group.gradient_bytes):
            continue
        apart = f", {group.repeat} apart" if group.repeat > 1 else ""
        text.append(
            f"summed over {group.degree} ranks{apart}: {bytes_text(group.forward_bytes)} forward and "
            f"{bytes_text(group.backward_bytes)} backward a micro-batch"
        )
        text.append(f", {bytes_text(group.gradient_bytes)} of gradients a step\n" if group.gradient_bytes else "\n")
    summed, moved = bytes_text(step_bytes(plan, block)), bytes_text(link_bytes(plan, block))
    text.append(f"a step{', each' if block.like else ''}: {summed} summed, {moved} over a rank's link\n")
    if block.unknown:
        text.append(f"operations without a rule: {', '.join(f'{n} ({k})' for n, k in block.unknown.items())}\n")
    text.append(f"probe: {f'{block.error:.0e}, ' if block.weights else ''}{block.probe}\n", style="dim")
    return text
