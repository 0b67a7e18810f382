"""Pipeline schedules as data: builders here, passes that rewrite them in passes.py, the check in validate.py.

Two tables: the schedules that the engine carries out, and those that exist as data, to be simulated and drawn. `auto`,
which needs costs as well, is in auto/.
"""

from collections.abc import Callable

from merak_like.partitioner.schedules.action import Schedule, unknown
from merak_like.partitioner.schedules.dualpipe_v import dualpipe_v
from merak_like.partitioner.schedules.gpipe import gpipe
from merak_like.partitioner.schedules.interleaved import interleaved
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.scp import LADDER, rung
from merak_like.partitioner.schedules.zb_h1 import zb_h1
from merak_like.partitioner.schedules.zb_h2 import zb_h2
from merak_like.partitioner.schedules.zb_v import zb_v

#: (pipeline ranks, micro_batches) -> compute-only schedule
Builder = Callable[[int, int], Schedule]

#: What the engine carries out; each has one stage per rank.
BY_NAME: dict[str, Builder] = {"gpipe": gpipe, "1f1b": one_f_one_b}

#: What can be simulated and drawn. These build the same orders whatever the costs.
AS_DATA: dict[str, Builder] = {
    **BY_NAME,
    **{name: rung(name) for name in LADDER},
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
    "dualpipe-v": dualpipe_v,
}

#: Schedules that are built for their costs: with one stage per rank, and with two in a V.
AUTO, AUTO_V = "auto", "auto-v"


def builder(name: str) -> Builder:
    """Return the builder of a schedule that the engine carries out."""
    if name in BY_NAME:
        return BY_NAME[name]
    if name in (*AS_DATA, AUTO, AUTO_V):
        raise ValueError(
            f"schedule {name!r} is known and can be simulated (`merak simulate`), but it is not run yet: "
            f"run are {', '.join(BY_NAME)}"
        )
    raise unknown("schedule", name, BY_NAME)


def data_builder(name: str) -> Builder:
    """Return the builder of a schedule that exists as data."""
    if name not in AS_DATA:
        raise unknown("schedule", name, [*AS_DATA, AUTO, AUTO_V])
    return AS_DATA[name]
