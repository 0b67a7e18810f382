"""Passes: functions from schedule to schedule. What a builder leaves open, a pass fills in."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from merak_like.partitioner.schedules.action import USER_OF, Action, Edges, Kind, Order, Schedule
from merak_like.partitioner.schedules.validate import validate


def forward_only(schedule: Schedule) -> Schedule:
    """Return the schedule for evaluation: its forwards and their transfers, in the order they have.

    Both ends of a channel lose the same actions, so their orders still agree.
    """
    kept = (Kind.F, Kind.SEND_F, Kind.RECV_F)
    orders = tuple(tuple(action for action in order if action.kind in kept) for order in schedule.orders)
    return replace(schedule, orders=orders)


def first_micro_batches(schedule: Schedule, micro_batches: int) -> Schedule:
    """Return the schedule with only the first so many micro-batches: what is left keeps its order, so nothing hangs."""
    orders = tuple(tuple(a for a in order if a.micro_batch < micro_batches) for order in schedule.orders)
    return replace(schedule, micro_batches=micro_batches, orders=orders)


def split_backward(schedule: Schedule) -> Schedule:
    """Return the schedule with every backward split, the weights right after the inputs: gradients leave earlier."""
    apart = schedule.apart(Kind.W)
    orders = tuple(
        tuple(
            step
            for action in order
            for step in (action, action._replace(kind=Kind.W))[
                : 2 if action.kind is Kind.B and (action.micro_batch, action.stage) not in apart else 1
            ]
        )
        for order in schedule.orders
    )
    return replace(schedule, orders=orders)


def add_transfers(schedule: Schedule, edges: Edges, *, ahead: int = 1) -> Schedule:
    """Return the schedule with the sends and receives of every edge between two ranks; 1F1B, p = 2, m = 2:

    rank 0  F0.0 SEND_F0.0>1 RECV_B0.0<1 F1.0 SEND_F1.0>1 RECV_B1.0<1 B0.0 B1.0
    rank 1  RECV_F0.1<0 F0.1 RECV_F1.1<0 B0.1 SEND_B0.1>0 F1.1 B1.1 SEND_B1.1>0

    Edges may skip stages: a value goes straight from the stage that makes it to each stage that uses it, its gradient
    straight back. A send starts right after the computation that makes the value. A receive is posted `ahead`
    computations before the one that uses it: early enough to overlap, late enough not to hold buffers.

    NCCL has no tags, so both ends of a channel (an ordered pair of ranks; forward values and gradients share it) must
    agree on the order. Both are made from one list, the sender's program order: where the receiver uses values in
    another order, a receive is posted earlier than it need be. Only the order inside a channel is fixed, so the two
    directions between two ranks need a communicator each.
    """
    if schedule.has_transfers:
        raise ValueError("the schedule already has transfers: add them once, after every other pass")
    if ahead < 0:
        raise ValueError(f"ahead = {ahead}: a receive cannot be posted after the computation that uses it")
    validate(schedule, edges)

    orders, rank_of = schedule.orders, schedule.stage_rank
    sends_after = _sends_after(schedule, edges)
    channels: defaultdict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, order in enumerate(orders):
        for action in order:
            for send in sends_after[action]:
                channels[rank, rank_of[send.peer]].append(send)

    place = {action: at for order in orders for at, action in enumerate(order)}
    posts_before: defaultdict[Action, list[Action]] = defaultdict(list)
    for (_, receiver), sends in sorted(channels.items()):
        for at, receive in _posts([send.match for send in sends], place, ahead):
            posts_before[orders[receiver][at]].append(receive)

    return replace(
        schedule,
        orders=tuple(
            tuple(step for action in order for step in (*posts_before[action], action, *sends_after[action]))
            for order in orders
        ),
    )


def _sends_after(schedule: Schedule, edges: Edges) -> dict[Action, Order]:
    """Return what each computation sends: a forward along the edges to other ranks, a backward against them."""
    rank_of = schedule.stage_rank
    remote = sorted((source, target) for source, target in edges if rank_of[source] != rank_of[target])
    peers: dict[Kind, list[list[int]]] = {kind: [[] for _ in rank_of] for kind in Kind}
    for source, target in remote:
        peers[Kind.F][source].append(target)
        peers[Kind.B][target].append(source)
    send_of = {Kind.F: Kind.SEND_F, Kind.B: Kind.SEND_B}
    return {
        action: tuple(
            Action(send_of[action.kind], action.micro_batch, action.stage, peer)
            for peer in peers[action.kind][action.stage]
        )
        for order in schedule.orders
        for action in order
    }


def _posts(receives: list[Action], place: dict[Action, int], ahead: int) -> list[tuple[int, Action]]:
    """Return before which computation to post each receive: as late as its user, and all later receives, allow."""
    posts: list[tuple[int, Action]] = []
    latest = len(place)
    for receive in reversed(receives):
        user = Action(USER_OF[receive.kind], receive.micro_batch, receive.stage)
        latest = max(0, min(latest, place[user] - ahead))
        posts.append((latest, receive))
    return posts[::-1]
