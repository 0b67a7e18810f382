"""``merak why`` in the terminal: what binds, where the step goes, and what other choices would cost."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from merak_like.partitioner.explain.losses import CAUSES
from merak_like.partitioner.explain.why import RESOURCES, SAME, Choice, NextCut, Why
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.text import bar, bytes_text, change_text, percent_text, seconds_text

TOLD = {
    "work": "computing, shared out evenly over the ranks",
    "bubble": "waiting that the schedule brings, were all stages equal",
    "imbalance": "the stages are not equal",
    "recompute": "computed again, because memory asks for it",
    "transfers": "values and gradients on their way",
    "outside": "outside the pipeline: optimizer, reduction of gradients",
}  # fmt: skip


def render(plan: Plan, found: Why) -> RenderableType:
    """Everything that was found."""
    parts: list[RenderableType] = [_head(plan, found), losses_table(found), path_table(found)]
    if found.next_cuts:
        parts.append(cuts_table(found))
    parts.append(choices_table(plan, found))
    if found.runners_up:
        parts.append(degrees_table(found))
    if found.untold:
        parts.append(Text(f"\n{found.untold}"))
    return Group(*parts)


def says(found: Why) -> Iterator[str]:
    """What binds, in two sentences."""
    stage = found.path[found.binding_stage]
    whole = found.losses.step - found.losses.outside
    yield (
        f"stage {stage.stage} on rank {stage.rank} binds: {seconds_text(stage.seconds)} "
        f"({percent_text(stage.seconds / whole if whole else 0)}) of the critical path are its own, "
        f"its rank idles {seconds_text(stage.idle)}"
    )
    lost = getattr(found.losses, found.losses.largest)
    share = percent_text(lost / found.losses.step if found.losses.step else 0)
    if found.resource == "work":
        yield f"nothing else takes much: the largest loss is {found.losses.largest}, {share} of the step"
    else:
        what = RESOURCES[found.resource]
        yield f"beside the work itself, {what} takes most: {seconds_text(lost)}, {share} of the step"


def _head(plan: Plan, found: Why) -> Text:
    text = Text()
    text.append(plan.model, style="bold")
    text.append(f" on {plan.mesh}, {plan.schedule}: a step takes ")
    text.append(seconds_text(found.step_seconds), style="bold")
    text.append(" (simulated)\n")
    for line in says(found):
        text.append(f"{line}\n")
    return text


def plain_table(title: str, *columns: str) -> Table:
    """A table of these columns; ``>`` in front of a name sets it right."""
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        name = column.removeprefix(">")
        table.add_column(name, justify="right" if name != column else "left", no_wrap=name != column)
    return table


def losses_table(found: Why) -> Table:
    """The step as a sum of its causes."""
    table = plain_table("Where the step goes", "cause", ">seconds", ">share", "", "what it is")
    for cause in CAUSES:
        seconds = getattr(found.losses, cause)
        share = seconds / found.losses.step if found.losses.step else 0.0
        if cause != "outside" or seconds:
            table.add_row(cause, seconds_text(seconds), percent_text(share), bar(share, 12), Text(TOLD[cause]))
    return table


def path_table(found: Why) -> Table:
    """Whose seconds make up the critical path."""
    table = plain_table(
        "The critical path, by stage", ">stage", ">rank", ">seconds", ">forward", ">backward", ">weights", ">again",
        ">rank idles",
    )  # fmt: skip
    for one in found.path:
        style = "bold" if one.stage == found.binding_stage else ""
        kinds = (one.seconds, one.forward, one.backward, one.weight, one.recompute, one.idle)
        table.add_row(str(one.stage), str(one.rank), *(seconds_text(s) if s else "" for s in kinds), style=style)
    over = sum(seconds for _, _, seconds in found.links)
    table.caption = f"and {seconds_text(over)} of transfers: what is not on the path could take longer for nothing"
    table.caption_justify = "left"
    return table


def cuts_table(found: Why) -> Table:
    """The next-best place of each border."""
    table = plain_table(
        "The next-best cut, every other cut staying (simulated again)", ">cut", "now before", "instead before", ">step",
        ">costs",
    )  # fmt: skip
    for cut in found.next_cuts:
        table.add_row(
            f"{cut.after}|{cut.after + 1}", Text(cut.now), Text(cut.instead or _nowhere(cut)), *_step(cut, found)
        )
    return table


def _nowhere(cut: NextCut) -> str:
    return f"no other place of {cut.tried} fits the memory" if cut.too_full else "there is no other place"


def _step(cut: NextCut, found: Why) -> tuple[str, str]:
    if cut.step_seconds is None:
        return "", ""
    return seconds_text(cut.step_seconds), _change(cut.step_seconds, found.step_seconds)


def _change(seconds: float, before: float) -> str:
    return "nothing" if abs(seconds - before) <= SAME * before else change_text(seconds, before)


def choices_table(plan: Plan, found: Why) -> Table:
    """Other choices beside the plan, the best throughput first; what does not fit last."""
    table = plain_table(
        "Other choices", "choice", "how known", ">step", ">samples/s", ">against the plan", ">fullest rank"
    )
    samples = plan.mesh.dp * plan.micro_batches * plan.micro_batch
    own = samples / found.step_seconds if found.step_seconds else 0.0
    for choice in sorted(found.choices, key=lambda one: (not one.fits, -_rate(one))):
        rate = _rate(choice)
        table.add_row(
            Text(choice.what),
            choice.how,
            seconds_text(choice.step_seconds) if choice.step_seconds is not None else "",
            f"{rate:.4g}" if rate else "",
            ("the same" if abs(rate - own) <= SAME * own else change_text(rate, own)) if rate and own else "",
            _fullest(choice),
            style="" if choice.fits else "dim",
        )
    table.caption = (
        f"the plan: {own:.4g} samples/s, {bytes_text(max(plan.rank_bytes))} of {bytes_text(plan.memory_limit)}"
    )
    table.caption_justify = "left"
    return table


def _rate(choice: Choice) -> float:
    return choice.samples / choice.step_seconds if choice.step_seconds else 0.0


def _fullest(choice: Choice) -> str:
    if choice.step_seconds is None:
        return "does not fit"
    return (bytes_text(choice.rank_bytes) if choice.rank_bytes else "") + ("" if choice.fits else ", too much")


def degrees_table(found: Why) -> Table:
    """Other degrees for as many ranks."""
    table = plain_table("Other degrees", ">dp", ">pp", ">tp", ">micro-batches", ">step", ">costs", "why")
    for one in found.runners_up:
        fits = one.step_seconds is not None
        table.add_row(
            str(one.dp), str(one.pp), str(one.tp), str(one.micro_batches) if one.micro_batches else "",
            seconds_text(one.step_seconds) if one.step_seconds is not None else "",
            _change(one.step_seconds, found.step_seconds) if one.step_seconds is not None else "",
            Text(one.why), style="" if fits else "dim",
        )  # fmt: skip
    return table
