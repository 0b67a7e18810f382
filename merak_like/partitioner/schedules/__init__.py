"""Pipeline schedules as data: builders here, passes that rewrite them in passes.py, the check in validate.py.

The engine carries out all of them. `auto`, which needs costs as well, is in auto/.
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

#: By name. These build the same orders whatever the costs.
AS_DATA: dict[str, Builder] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    **{name: rung(name) for name in LADDER},
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
    "dualpipe-v": dualpipe_v,
}

#: Schedules that are built for their costs: with one stage per rank, and with two in a V.
AUTO, AUTO_V = "auto", "auto-v"


def data_builder(name: str) -> Builder:
    """Return the builder of a schedule that needs no costs."""
    if name not in AS_DATA:
        raise unknown("schedule", name, [*AS_DATA, AUTO, AUTO_V])
    return AS_DATA[name]
