"""Two stages per rank in the shape of a V, and orders written as little programs.

Rank r runs stage r on the way down and stage 2 p - 1 - r on the way up, so that the first rank also has the loss.
"""

from collections import Counter
from collections.abc import Iterable

from merak_like.partitioner.schedules.action import Action, Kind, Order


def v_stage_rank(ranks: int) -> tuple[int, ...]:
    """Return which rank runs each stage: 0 1 .. p - 1 p - 1 .. 1 0."""
    return (*range(ranks), *reversed(range(ranks)))


def v_order(rank: int, ranks: int, program: Iterable[tuple[int, str]]) -> Order:
    """Return the order that a program of (times, words) spells, each word with the next micro-batch.

    Fd is a forward on the way down, Fu on the way up; B is a whole backward, I one whose weights wait, W the oldest
    weight gradient that waits, and Wd or Wu the oldest of that stage.
    """
    stage_of = {"d": rank, "u": 2 * ranks - 1 - rank}
    turn = Counter[str]()
    waiting: list[tuple[int, int]] = []
    actions: list[Action] = []
    for word in (word for times, words in program for _ in range(times) for word in words.split()):
        what, way = word[0], word[1:]
        if what == "W":
            found = next((w for w in waiting if not way or w[1] == stage_of[way]), None)
            if found is not None:
                waiting.remove(found)
                actions.append(Action(Kind.W, *found))
            continue
        forward, stage = what == "F", stage_of[way]
        counted = way if forward else "B" + way
        micro_batch = turn[counted]
        turn[counted] = micro_batch + 1
        actions.append(Action(Kind.F if forward else Kind.B, micro_batch, stage))
        if what == "I":
            waiting.append((micro_batch, stage))
    return tuple(actions)
