"""Seconds that no order can beat."""

from __future__ import annotations

from math import ceil, inf

from merak_like.partitioner.schedules.action import Kind
from merak_like.partitioner.schedules.auto.job import Job


def lower_bound(job: Job) -> float:
    """Return the largest of: one micro-batch's way, each rank's work, and each rank's turns in its memory."""
    way = max(head + s + tail for head, s, tail in zip(job.heads, job.seconds, job.tails, strict=True))
    each = [max(_work(job, rank), _turns(job, rank)) for rank in range(len(job.of_rank)) if job.of_rank[rank]]
    return max([way, *each])


def _work(job: Job, rank: int) -> float:
    """Jackson's bound: any classes of the rank wait for their earliest start, run, and leave their least tail.

    A class takes its turns one by one, so the first cannot start before its head and after the last comes its tail. Of
    the subsets only those matter that hold all classes from one head and from one tail on.
    """
    classes = job.of_rank[rank]
    best = 0.0
    for head in {job.heads[c] for c in classes}:
        for tail in {job.tails[c] for c in classes}:
            chosen = [c for c in classes if job.heads[c] >= head and job.tails[c] >= tail]
            work = job.micro_batches * sum(job.seconds[c] for c in chosen)
            best = max(best, head + work + tail if chosen else 0.0)
    return best


def _turns(job: Job, rank: int) -> float:
    """A micro-batch holds its memory at least as long as its way from F to B and back; so many fit at once."""
    forwards = [c for c in job.of_rank[rank] if job.kinds[c] is Kind.F]
    best = 0.0
    for c in forwards:
        limit, size = job.limit[rank], job.during[c]
        if limit == inf or size <= 0:
            continue
        back = next(b for b in job.of_rank[rank] if job.kinds[b] is Kind.B and job.stages[b] == job.stages[c])
        stay = _way(job, c, back)
        rounds = ceil(job.micro_batches / max(1, limit // size))
        best = max(best, job.heads[c] + rounds * stay + job.tails[back])
    return best


def _way(job: Job, first: int, last: int) -> float:
    """Seconds from the start of an action to the end of one that needs it, on the longest way."""
    at = [-inf] * len(job.kinds)
    at[first] = 0.0
    for _ in range(2 * len(job.stage_rank) + 3):
        for c, needs in enumerate(job.needs):
            for of, delay in needs:
                at[c] = max(at[c], at[of] + job.seconds[of] + delay)
    return at[last] + job.seconds[last]
