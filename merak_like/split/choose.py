"""Every way to split one training over given means, priced and ranked: where to cut, to how many numbers a token, with
which codec, in how many micro-batches.

fronts x ranks x codecs x micro-batches, with the tail that sends least; then by seconds, then bytes, then the edge's
memory. Seconds say nothing of accuracy: a narrow cut and a coarse codec cost some, see ``benchmarks/split``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merak_like.partitioner.graph import ProxyGraph
from merak_like.runtime.batches import rows, split
from merak_like.runtime.codecs import codec
from merak_like.split.coding import Measure, timed
from merak_like.split.cut import Cut
from merak_like.split.forecast import Forecast, changed, counted, traced
from merak_like.split.half import Source
from merak_like.split.halves import Halves, halve
from merak_like.split.means import Means
from merak_like.split.messages import Task

CODECS = ("identity", "fp16", "int8", "aqsgd(4)|int8")
MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Asked:
    """What may be chosen among."""

    tail: bool = True
    """Whether the loss, and with it the labels, stay on the edge."""
    fronts: tuple[str, ...] = ()
    """Module paths; none: every block of the model."""
    ranks: tuple[int, ...] = ()
    """Widths of a changed layer (SFT) to try besides the plain cut."""
    codecs: tuple[str, ...] = CODECS
    """For both links of the cut."""
    micro_batches: tuple[int, ...] = ()
    """None: those of 1, 2, 4, 8 and 16 that divide the batch."""
    samples: bool = False
    """Whether samples have ids; codecs with memory need them."""


@dataclass(frozen=True)
class Choice:
    """What was found."""

    ranked: tuple[Forecast, ...]
    """What fits, best first."""
    refused: tuple[tuple[str, str], ...]
    """What does not, and why."""


def choose(
    source: Source, task: Task, batch: Any, means: Means, asked: Asked | None = None, *, measure: Measure = timed
) -> Choice:
    """Rank the ways. ``task`` gives what is not chosen: optimizer, window, whether the edge is frozen.

    Raises ValueError where nothing fits, with what would.
    """
    asked = asked or Asked()
    total = rows(batch)
    counts = asked.micro_batches or tuple(n for n in MICRO_BATCHES if total % n == 0)
    if odd := [n for n in counts if total % n]:
        raise ValueError(f"a batch of {total} samples does not divide into {odd[0]} equal micro-batches")
    known = {text: codec(text) for text in asked.codecs}
    found, refused = list[Forecast](), dict[str, str]()
    for count in counts:
        for cut, halves in _cuts(source, task, split(batch, count)[0], asked, refused):
            for text, made in known.items():
                if made.remembers and not asked.samples:
                    refused[text] = "it remembers samples: let data return (batch, sample ids)"
                    continue
                this = task.model_copy(
                    update={"cut": cut, "codec": text, "back_codec": text if asked.tail else task.back_codec,
                            "micro_batches": count}
                )  # fmt: skip
                parts = [halves] * count
                way = counted(parts, this, batch, samples=asked.samples)
                if why := _too_much(way.told, means):
                    refused[f"{cut}, {text}, {count} micro-batches"] = why
                else:
                    found.append(way.walked(means, measure))
    if not found:
        least = "; ".join(f"{what}: {why}" for what, why in list(refused.items())[:3]) or "the model has no blocks"
        raise ValueError(f"no way to split fits: {least}")
    order = sorted(found, key=lambda one: (one.seconds, one.sent + one.received, one.edge_bytes))
    return Choice(tuple(order), tuple(refused.items()))


def best_of_each(ranked: Sequence[Forecast]) -> tuple[Forecast, ...]:
    """The best for each rank and codec, in the order given: what a choice of accuracy is made among."""
    seen: dict[tuple[int | None, str], Forecast] = {}
    for one in ranked:
        seen.setdefault((Cut.parse(one.cut).rank, one.codec), one)
    return tuple(seen.values())


def _too_much(one: Forecast, means: Means) -> str | None:
    for who, needs, has in (
        ("edge", one.edge_bytes, means.edge.memory_limit), ("host", one.host_bytes, means.host.memory_limit)
    ):  # fmt: skip
        if needs > has:
            return f"the {who} would need {needs / 1e6:,.0f} MB, it may fill {has / 1e6:,.0f} MB"
    return None


def _cuts(source: Source, task: Task, part: Any, asked: Asked, refused: dict[str, str]) -> Iterator[tuple[str, Halves]]:
    """Every cut of a micro-batch like this one, and its halves."""
    plain = traced(changed(source, task.model_copy(update={"frozen_edge": False}), Cut("none"), part), part, source)
    fronts = asked.fronts or blocks(plain.graph)[:-1]
    backs = tails(plain.graph) if asked.tail else (None,)
    for front in fronts:
        for rank in (None, *asked.ranks):
            cut = Cut(front, None, rank)
            try:
                with_cut = task.model_copy(update={"cut": str(cut), "frozen_edge": task.frozen_edge})
                own = rank is not None or task.frozen_edge
                halfway = Cut(front, backs[0], rank) if task.frozen_edge else cut
                trace = traced(changed(source, with_cut, halfway, part), part, source) if own else plain
            except ValueError as error:
                refused[str(cut)] = str(error)
                continue
            if (made := _narrowest(trace, front, backs, rank, refused)) is not None:
                yield made


def _narrowest(
    trace: Any, front: str, backs: Sequence[str | None], rank: int | None, refused: dict[str, str]
) -> tuple[str, Halves] | None:
    """The cut with the tail to which least returns; among equals the longest tail."""
    found, why = list[tuple[int, str, Halves]](), dict[str, str]()
    for back in backs:
        cut = Cut(front, back, rank)
        try:
            halves = halve(trace, cut)
        except ValueError as error:
            why[str(cut)] = str(error)
            continue
        values = trace.graph.values
        found.append((sum(values[spec.name].nbytes for spec in halves.returned), str(cut), halves))
    if not found:
        refused.update(list(why.items())[:1])
        return None
    _, cut_text, halves = min(found, key=lambda one: one[0])
    return cut_text, halves


def blocks(graph: ProxyGraph) -> tuple[str, ...]:
    """Paths of the model's repeated blocks, outermost, in the order they run: ``transformer.h.0`` and so on."""
    paths = [call.path for call in sorted(graph.calls, key=lambda call: call.first)]
    numbered = [path for path in dict.fromkeys(paths) if path.rpartition(".")[2].isdigit() and paths.count(path) == 1]
    outer = [path for path in numbered if not any(path.startswith(f"{other}.") for other in numbered)]
    lists = [path.rpartition(".")[0] for path in outer]
    return tuple(path for path, above in zip(outer, lists, strict=True) if lists.count(above) > 1)


def tails(graph: ProxyGraph) -> tuple[str, ...]:
    """Paths of the modules that run once after the last block, in the order they run: where a tail can begin."""
    paths = [call.path for call in graph.calls]
    inner = blocks(graph)
    last = max((call.stop for call in graph.calls if call.path in inner), default=0)
    after = sorted((call for call in graph.calls if call.first >= last), key=lambda call: (call.first, -call.stop))
    return tuple(dict.fromkeys(call.path for call in after if call.path and paths.count(call.path) == 1))
