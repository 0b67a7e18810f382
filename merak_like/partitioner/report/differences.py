"""Two plans side by side in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from merak_like.partitioner.explain.difference import Difference, because
from merak_like.partitioner.explain.losses import CAUSES
from merak_like.partitioner.report.reasons import SAME, plain_table
from merak_like.partitioner.report.text import bytes_text, change_text, seconds_text


def render(found: Difference, names: tuple[str, str]) -> RenderableType:
    """What differs and what it does to the step and the memory."""
    if found.same:
        return Text(f"{names[0]} and {names[1]} decide the same: plan {found.plans[0][:12]}")
    parts: list[RenderableType] = [Text(line) for line in _head(found, names)]
    if found.decided:
        parts.append(_decided(found, names))
    parts += [_losses(found, names), _memory(found, names)]
    return Group(*parts)


def _head(found: Difference, names: tuple[str, str]) -> list[str]:
    lines = list[str]()
    for name, plan, model, step, rate, nbytes in zip(
        names, found.plans, found.models, found.step_seconds, found.samples_per_second, found.rank_bytes, strict=True
    ):
        lines.append(
            f"{name}: {model}, plan {plan[:12]}, a step in {seconds_text(step)}, {rate:.4g} samples/s, fullest rank "
            f"{bytes_text(nbytes)}"
        )
    before, after = found.samples_per_second
    why = "; ".join(because(found))
    rate = "samples/s the same" if abs(after - before) <= SAME * before else f"samples/s {change_text(after, before)}"
    lines.append(f"{names[1]} against {names[0]}: {rate}" + (f"; the step: {why}" if why else "; the step: the same"))
    return [*lines, ""]


def _decided(found: Difference, names: tuple[str, str]) -> Table:
    alone = any(one.alone is not None for one in found.decided)
    table = plain_table("What differs", "", *names, *([f">{names[0]} with this alone"] if alone else []))
    for one in found.decided:
        row = [one.what, Text(one.first, overflow="fold"), Text(one.second, overflow="fold")]
        if alone and one.alone is not None:
            row.append(f"{seconds_text(one.alone)} ({_change(one.alone, found.step_seconds[0])})")
        table.add_row(*row)
    return table


def _losses(found: Difference, names: tuple[str, str]) -> Table:
    table = plain_table("Where the step goes", "cause", *(f">{name}" for name in names), ">difference", ">of the step")
    first, second = found.losses
    for cause in (*CAUSES, "step"):
        before, after = getattr(first, cause), getattr(second, cause)
        if before or after:
            sign = "+" if after > before else "-"
            same = abs(after - before) <= SAME * found.step_seconds[0]
            table.add_row(
                cause, seconds_text(before), seconds_text(after),
                "" if same else f"{sign}{seconds_text(abs(after - before))}",
                "" if same else change_text(found.step_seconds[0] + after - before, found.step_seconds[0]),
                style="bold" if cause == "step" else "",
            )  # fmt: skip
    return table


def _memory(found: Difference, names: tuple[str, str]) -> Table:
    table = plain_table("Memory of the fullest rank", "kind", *(f">{name}" for name in names), ">difference")
    for kind, before, after in found.memory:
        sign = "+" if after > before else "-"
        change = f"{sign}{bytes_text(abs(after - before))}" if after != before else ""
        table.add_row(kind, bytes_text(before), bytes_text(after), change)
    return table


def _change(after: float, before: float) -> str:
    return "nothing" if abs(after - before) <= SAME * before else change_text(after, before)
