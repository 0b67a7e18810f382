"""Pipeline schedules as data: builders here, passes that rewrite them in passes.py, the check in validate.py."""

from collections.abc import Callable

from merak_like.partitioner.schedules.action import Schedule, unknown
from merak_like.partitioner.schedules.gpipe import gpipe
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b

#: (stages, micro_batches) -> compute-only schedule
Builder = Callable[[int, int], Schedule]

BY_NAME: dict[str, Builder] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def builder(name: str) -> Builder:
    """Return the schedule builder of that name."""
    if name not in BY_NAME:
        raise unknown("schedule", name, BY_NAME)
    return BY_NAME[name]
