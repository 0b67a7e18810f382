"""Which hosts run which blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Leg(NamedTuple):
    """Blocks ``first <= i < stop`` on a host."""

    host: int
    first: int
    stop: int


def route(first: int, stop: int, offers: Mapping[int, tuple[int, int]]) -> list[Leg]:
    """The fewest hosts that run these blocks, given the blocks that each has; of equal ones the first in the mapping.

    Raises ValueError naming the blocks that nobody has.
    """
    legs: list[Leg] = []
    at = first
    while at < stop:
        reach = {
            host: min(its_stop, stop) for host, (its_first, its_stop) in offers.items() if its_first <= at < its_stop
        }
        if not reach:
            ahead = [its_first for its_first, _ in offers.values() if its_first > at]
            raise ValueError(f"nobody has blocks {at}:{min([*ahead, stop])}")
        best = max(reach, key=lambda host: reach[host])
        legs.append(Leg(best, at, reach[best]))
        at = reach[best]
    return legs
