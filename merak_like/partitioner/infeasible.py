"""What to say when no partition fits the memory: how much is missing where, and changes that were tried and do fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from merak_like.partitioner.batches import divisors
from merak_like.partitioner.feasible import cut_fits, least_memory
from merak_like.partitioner.judge import Judge
from merak_like.partitioner.problem import Problem
from merak_like.partitioner.search import quick

Try = Callable[..., Problem]
"""The problem with other choices: ``micro_batches``, ``batch``, ``pp``, ``schedule``, ``recompute``."""
MORE_STAGES = 64
"""As many additional ranks are tried."""


def too_little_memory(problem: Problem, other: Try, samples: int) -> ValueError:
    """The error for a problem without a solution.

    ``other`` makes the problems of the changes that are tried, ``samples`` are those of one replica and step.
    """
    job = problem.job
    needed, starts = _least_needed(problem)
    unlimited = replace(problem, job=replace(job, memory_limit=needed))
    judged = Judge(unlimited)(starts)
    assert judged is not None, "that many bytes are what it needs"
    rank = max(range(job.mesh.pp), key=lambda r: judged.rank_bytes[r])
    stages = [s for s, of in enumerate(job.order.stage_rank) if of == rank]
    kinds: dict[str, int] = {}
    for stage in stages:
        for kind, nbytes in asdict(judged.memory(stage)).items():
            kinds[kind] = kinds.get(kind, 0) + nbytes
    kind = max(kinds, key=lambda name: kinds[name])
    changes = list(_changes(problem, other, samples))
    more = needed / job.memory_limit - 1
    changes.append(f"devices where a rank may use {needed / 1e9:.2f} GB, {more:.1%} more (memory_limit={needed})")
    alone = job.stages == job.mesh.pp
    where, found = (f"stage {rank}", "") if alone else (f"rank {rank}", " that was found")
    though = {
        "auto": ", even with everything recomputed that can be", "full": ", with everything recomputed",
        "blocks": ", with every block recomputed",
    }.get(job.recompute, "")  # fmt: skip
    return ValueError(
        f"no way{found} to cut {job.stages} stages fits the memory{though}: with the best, {where} needs "
        f"{needed / 1e9:.2f} GB of {job.memory_limit / 1e9:.2f} GB, {kinds[kind] / 1e9:.2f} GB of it {kind} "
        f"({max(job.live[s] for s in stages)} of {job.micro_batches} micro-batches alive, schedule {job.schedule}). "
        f"What fits: {'; or '.join(changes)}"
    )


def _least_needed(problem: Problem) -> tuple[int, tuple[int, ...]]:
    """Bytes of the fullest rank of the emptiest partition known, and that partition."""
    starts = least_memory(problem)[1]
    return problem.job.memory_limit + Judge(problem).over(starts), starts


def _fits(problem: Problem) -> bool:
    """Whether the planner would find a partition."""
    return cut_fits(problem) and (problem.job.stages == problem.job.mesh.pp or quick(problem) is not None)


def _changes(problem: Problem, other: Try, samples: int) -> Iterator[str]:
    """Single changes that were tried and fit, the nearest of each kind."""
    job = problem.job
    m = job.micro_batches
    if job.recompute == "none" and _fits(other(recompute="auto")):
        yield "recompute='auto'"
    if job.schedule != "1f1b" and _fits(other(schedule="1f1b")):
        yield "schedule='1f1b'"
    # More and smaller micro-batches never need more memory, so bisection finds the fewest.
    more = [number for number in divisors(samples) if number > m]
    if more and _fits(other(micro_batches=more[-1])):
        nearest = more[bisect_left(more[:-1], True, key=lambda number: _fits(other(micro_batches=number)))]
        yield f"micro_batches={nearest} (of {samples // nearest} samples instead of {samples // m})"
    if (batch := _smaller_batch(problem, other, samples)) is not None:
        fewer, whole = batch
        yield f"batch={whole} (micro_batches={fewer} of the same size, so that fewer are alive at once)"
    if (stages := _more_stages(problem, other)) is not None:
        yield f"pp={stages}"


def _smaller_batch(problem: Problem, other: Try, samples: int) -> tuple[int, int] | None:
    """The most micro-batches of the same size that fit, and the batch they make; None if even one is too much.

    Fewer micro-batches never have more of them alive, so bisection finds the most.
    """
    job, each = problem.job, samples // problem.job.micro_batches
    if max(job.live) <= 1:
        return None

    def fits(number: int) -> bool:
        try:
            return _fits(other(micro_batches=number, batch=number * each * job.mesh.dp))
        except ValueError:  # fewer than the schedule can do with
            return False

    fewer = range(job.micro_batches - 1, 0, -1)
    place = bisect_left(fewer, True, key=fits)
    return (fewer[place], fewer[place] * each * job.mesh.dp) if place < len(fewer) else None


def _more_stages(problem: Problem, other: Try) -> int | None:
    """The fewest ranks that are enough: first at the same places to cut, then for certain at their own."""
    pp = problem.job.mesh.pp
    try:
        base = problem if pp > 1 else other(pp=2)
        places = base.size // (base.job.stages // base.job.mesh.pp)
        for ranks in range(pp + 1, min(pp + MORE_STAGES, places) + 1):
            same = replace(base, job=replace(base.job, mesh=replace(base.job.mesh, pp=ranks)))
            if cut_fits(same) and _fits(other(pp=ranks)):
                return ranks
    except ValueError:  # more stages than places to cut
        pass
    return None
