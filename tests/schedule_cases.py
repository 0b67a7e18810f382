"""Schedules for tests: written out as words, or random and right by construction."""

from random import Random

from merak_like.partitioner.schedules.action import Action, Edges, Kind, Schedule, chain


def schedule_of(*orders: str, micro_batches: int, stage_rank: tuple[int, ...]) -> Schedule:
    parsed = tuple(tuple(Action.parse(word) for word in order.split()) for order in orders)
    return Schedule(len(stage_rank), micro_batches, parsed, stage_rank)


def random_edges(random: Random, stages: int) -> Edges:
    """The chain, and some edges that skip stages."""
    skips = {(a, b) for a in range(stages) for b in range(a + 2, stages) if random.random() < 0.4}
    return chain(stages) | skips


def random_schedule(random: Random, edges: Edges, stages: int, micro_batches: int, ranks: int) -> Schedule:
    """Stages on random ranks, some recomputing, some with a split backward, in any order that their needs allow.

    Each step runs one computation whose needs are met, so the orders cannot deadlock.
    """
    stage_rank = tuple(random.randrange(ranks) for _ in range(stages))
    recomputes = [random.random() < 0.3 for _ in range(stages)]
    splits = [random.random() < 0.3 for _ in range(stages)]
    needs: dict[Action, set[Action]] = {}
    for i in range(micro_batches):
        for stage in range(stages):
            forward, recompute = Action(Kind.F, i, stage), Action(Kind.R, i, stage)
            backward, weight = Action(Kind.B, i, stage), Action(Kind.W, i, stage)
            needs[forward] = {Action(Kind.F, i, source) for source, target in edges if target == stage}
            needs[backward] = {forward} | {Action(Kind.B, i, target) for source, target in edges if source == stage}
            if recomputes[stage]:
                needs[recompute] = {forward}
                needs[backward].add(recompute)
            if splits[stage]:
                needs[weight] = {backward}
    orders: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[Action] = set()
    while needs:
        action = random.choice(sorted(action for action, before in needs.items() if before <= done))
        del needs[action]
        done.add(action)
        orders[stage_rank[action.stage]].append(action)
    return Schedule(stages, micro_batches, tuple(map(tuple, orders)), stage_rank)
