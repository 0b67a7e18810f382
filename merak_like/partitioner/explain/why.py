"""Why a plan takes as long as it does, what binds, and what other choices would cost: simulated again, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from merak_like.partitioner.batches import divisors
from merak_like.partitioner.explain.again import Again
from merak_like.partitioner.explain.critical import WORDS, Path, critical_path
from merak_like.partitioner.explain.losses import Losses, Played
from merak_like.partitioner.explain.runners_up import RunnerUp, runners_up
from merak_like.partitioner.judge import Judged
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planned import named_schedule, recomputing
from merak_like.partitioner.schedules import AS_DATA, AUTO, AUTO_V
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.schedules.scp import LADDER
from merak_like.partitioner.simulator import simulate

SMALL = 0.05
"""Losses below this share of the step do not bind: the work itself does."""
SAME = 1e-9
"""Steps that differ by less take equally long."""
RESOURCES = {
    "bubble": "the pipeline's own waiting (few micro-batches for so many stages)",
    "imbalance": "the uneven cut",
    "recompute": "memory (activations are computed again to fit)",
    "transfers": "waiting for the links",
    "outside": "the optimizer and the reduction of gradients",
    "work": "computing",
}


@dataclass(frozen=True)
class OnPath:
    """A stage's part in the critical path."""

    stage: int
    rank: int
    seconds: float
    """By kind: forward, recompute, backward, weight."""
    forward: float
    recompute: float
    backward: float
    weight: float
    idle: float
    """Of its rank, in the step."""


@dataclass(frozen=True)
class NextCut:
    """The best place for a border but the plan's own, all others staying where they are."""

    after: int
    """The border between this stage and the next."""
    now: str
    """The unit, or op, that the next stage begins with."""
    instead: str
    """And with the next-best border; empty where no other place fits the memory."""
    moved: int
    """Places later (or, negative, earlier) in the model."""
    step_seconds: float | None
    tried: int
    """Places simulated; the others cannot be better, by the bound."""
    too_full: int
    """Of them, how many do not fit the memory."""


@dataclass(frozen=True)
class Choice:
    """Another choice, planned or simulated again."""

    what: str
    how: str
    """What was done to know: ``same stages`` or ``cut again``."""
    step_seconds: float | None
    """None where it does not fit the memory."""
    samples: int
    """Of a step."""
    rank_bytes: int
    """Of the fullest rank; 0 where unknown."""
    fits: bool


@dataclass(frozen=True)
class Why:
    """All of it."""

    plan: str
    model: str
    step_seconds: float
    binding_stage: int
    binding_rank: int
    resource: str
    losses: Losses
    path: tuple[OnPath, ...]
    links: tuple[tuple[int, int, float], ...]
    """Source stage, target stage and seconds on the path."""
    next_cuts: tuple[NextCut, ...]
    choices: tuple[Choice, ...]
    runners_up: tuple[RunnerUp, ...]
    untold: str = ""
    """What could not be asked, and why."""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def why(plan: Plan) -> Why:
    """Ask the plan. Where it does not hold what it was made from, only what its own stages tell is told."""
    again = Again.of(plan) if plan.basis is not None else None
    played = Played.of_plan(plan)
    if again is not None:
        outside = plan.step_seconds - again.judged.timeline.makespan
        played = Played.of_judged(again.judged, outside if abs(outside) > 1e-9 * plan.step_seconds else 0.0)
    path = critical_path(played.schedule, played.timeline, played.costs, played.edges)
    on_path = tuple(_on_path(plan, played, path))
    binding = max(on_path, key=lambda stage: stage.seconds)
    losses = played.losses
    heavy = getattr(losses, losses.largest) > SMALL * losses.step
    choices = [*_one_more_or_less(plan, played)]
    untold = "the plan does not hold what it was made from: other cuts, batches and degrees cannot be tried"
    if again is not None:
        choices += [*_micro_batches(again), *_recompute(again), *_schedules(again)]
        untold = ""
    return Why(
        plan=plan.digest,
        model=plan.model,
        step_seconds=plan.step_seconds,
        binding_stage=binding.stage,
        binding_rank=binding.rank,
        resource=losses.largest if heavy else "work",
        losses=losses,
        path=on_path,
        links=tuple((*edge, seconds) for edge, seconds in sorted(path.links().items())),
        next_cuts=tuple(next_cut(again, border) for border in range(1, len(plan.stages))) if again else (),
        choices=tuple(choices),
        runners_up=runners_up(plan, again),
        untold=untold,
    )


def _on_path(plan: Plan, played: Played, path: Path) -> Iterator[OnPath]:
    for stage in plan.stages:
        kinds = {what: path.seconds([what], stage.index) for what in WORDS.values()}
        idle = played.timeline.rank_bubble[stage.rank] * played.timeline.makespan
        yield OnPath(stage.index, stage.rank, sum(kinds.values()), **kinds, idle=idle)


def next_cut(again: Again, border: int) -> NextCut:
    """Try the other places of one border (1 is the first), the most promising first, until none can be better.

    Places that may cost nothing are tried by their distance; the first that costs nothing ends it.
    """
    starts = again.starts
    places = [p for p in range(starts[border - 1] + 1, starts[border + 1]) if p != starts[border]]
    best: float | None = None
    chosen, tried, too_full = 0, 0, 0
    own = again.stand_in.timeline.makespan
    bounds = zip(again.bound(border, places), places, strict=True) if places else ()
    for bound, place in sorted(bounds, key=lambda one: (max(one[0], own), abs(one[1] - starts[border]), one[1])):
        if best is not None and (bound >= best or best <= own * (1 + SAME)):
            break
        judged = again.judge((*starts[:border], place, *starts[border + 1 :]))
        tried += 1
        too_full += judged is None
        if judged is not None and (best is None or judged.timeline.makespan < best):
            best, chosen = judged.timeline.makespan, place
    if best is not None:  # in what the plan's step would be: an order built for its own stages is kept from others
        best += again.plan.step_seconds - again.stand_in.timeline.makespan
    at = again.problem.positions
    return NextCut(
        border - 1, _beginning(again, int(at[starts[border]])), _beginning(again, int(at[chosen])) if chosen else "",
        chosen - starts[border] if chosen else 0, best, tried, too_full,
    )  # fmt: skip


def _beginning(again: Again, position: int) -> str:
    """What people call the place before an op."""
    piece = next(p for p in again.setting.pieces if p.first <= position < p.stop)
    op = again.asked.graph.ops[position]
    return piece.name if piece.first == position else f"{op.scope or op.target} in {piece.name}"


def _one_more_or_less(plan: Plan, played: Played) -> Iterator[Choice]:
    """The same stages with one micro-batch more or less of the same size; the batch changes with it."""
    if plan.schedule in (AUTO, AUTO_V):
        return
    for m in (plan.micro_batches - 1, plan.micro_batches + 1):
        try:
            made = named_schedule(plan.schedule, plan.mesh.pp, m, len(plan.stages) // plan.mesh.pp)
        except ValueError:  # fewer than the schedule can do
            continue
        full = add_transfers(recomputing(made, played.schedule.recomputes), played.edges)
        seconds = simulate(full, played.costs, played.edges).makespan + played.step - played.timeline.makespan
        samples = plan.mesh.dp * m * plan.micro_batch
        yield Choice(f"{m} micro-batches of {plan.micro_batch}", "same stages", seconds, samples, 0, True)


def _micro_batches(again: Again) -> Iterator[Choice]:
    """The nearest other sizes of a micro-batch for the same batch."""
    plan = again.plan
    each = plan.micro_batches * plan.micro_batch
    numbers = divisors(each)
    at = numbers.index(plan.micro_batches)
    for m in (*numbers[max(at - 1, 0) : at], *numbers[at + 1 : at + 2]):
        try:
            yield _choice(again, f"{m} micro-batches of {each // m}", again.other_stages(micro_batches=m))
        except ValueError:  # the schedule cannot do with so few
            continue


def _recompute(again: Again) -> Iterator[Choice]:
    plan, none = again.plan, "nothing computed again"
    if any(stage.recompute for stage in plan.stages):
        kept = again.same_stages(recompute="none", memory_limit=2**62)
        assert kept is not None, "there is room for anything"
        fits = max(kept.rank_bytes) <= plan.memory_limit
        yield _choice(again, none, kept, how="same stages", fits=fits)
    full = again.same_stages(recompute="full")
    if full is not None and full.recompute != again.judged.recompute:
        yield _choice(again, "everything computed again", full, how="same stages")


def _schedules(again: Again) -> Iterator[Choice]:
    """The same stages where a schedule has as many, else cut again for it."""
    if again.plan.mesh.pp == 1:  # there is nothing to order
        return
    recomputes = any(stage.recompute for stage in again.plan.stages)
    for name in (*AS_DATA, AUTO):  # to build an order for a V is a search of seconds
        if name == again.plan.schedule or (name in LADDER and not recomputes):
            continue
        try:
            judged = again.same_stages(schedule=name)
            how = "same stages"
            if judged is None:
                judged, how = again.other_stages(schedule=name), "cut again"
        except ValueError:  # more stages than places to cut, or too few micro-batches
            continue
        yield _choice(again, f"schedule {name}", judged, how=how)


def _choice(
    again: Again, what: str, judged: Judged | None, *, how: str = "cut again", fits: bool = True
) -> Choice:  # fmt: skip
    plan = again.plan
    samples = plan.mesh.dp * plan.micro_batches * plan.micro_batch
    if judged is None:
        return Choice(what, how, None, samples, 0, False)
    outside = plan.step_seconds - again.judged.timeline.makespan
    return Choice(what, how, judged.timeline.makespan + outside, samples, max(judged.rank_bytes), fits)
