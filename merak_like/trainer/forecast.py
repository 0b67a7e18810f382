"""What a run was planned to cost beside what it does: said once, when a few steps have warmed everything up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.recorded import Step
from merak_like.partitioner.report.text import bytes_text, percent_text, seconds_text
from merak_like.runtime.engine import Engine
from merak_like.trainer.journal import Journal
from merak_like.trainer.speed import most_memory

AT = 3
"""The step that is measured, of those that a process makes: the first ones trace, and get memory."""


@contextmanager
def compared(engine: Engine, journal: Journal, step: int) -> Iterator[None]:
    """Measure the step inside, action by action, and say how it was planned. Every rank enters."""
    with engine.profile() as profile:
        yield
    memory = most_memory(engine)["peak_memory_bytes"]
    if profile.recorded is not None and profile.recorded.steps:
        measured = profile.recorded.step(0)
        journal.say(beside(engine.plan, measured, memory))
        journal.write(step, {"bubble": measured.bubble, "planned_bubble": engine.plan.bubble})


def beside(plan: Plan, step: Step, memory: float) -> str:
    """In words: seconds, the pipeline's idle share, and the memory of the fullest rank."""
    fullest = max(kinds["total"] for kinds in plan.memory_bytes)
    return (
        f"a step takes {seconds_text(step.seconds)} (planned for {plan.hardware}: {seconds_text(plan.step_seconds)}), "
        f"of it the pipeline idles {percent_text(step.bubble)} (planned: {percent_text(plan.bubble)}); the fullest "
        f"rank's process has had {bytes_text(memory)} (planned for the model: {bytes_text(fullest)})"
    )
