"""The simulator against closed forms, against a longest path over the whole graph of needs, and on what it refuses."""

import time
from dataclasses import replace
from random import Random

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merak_like.partitioner.schedules.action import RECEIVE_OF, USER_OF, Action, Edges, Kind, Schedule, chain
from merak_like.partitioner.schedules.gpipe import gpipe
from merak_like.partitioner.schedules.one_f_one_b import one_f_one_b
from merak_like.partitioner.schedules.passes import add_transfers
from merak_like.partitioner.simulator import Costs, Entry, StageCosts, simulate
from tests.schedule_cases import random_edges, random_schedule

PLAIN = {"gpipe": gpipe, "1f1b": one_f_one_b}
SECONDS = st.floats(0.01, 10)
SIZES = {"stages": st.integers(1, 6), "micro_batches": st.integers(1, 9)}
SEEDS = st.integers(0, 2**32 - 1)


def equal(stages: int, forward: float, backward: float, hop: float = 0.0) -> Costs:
    return Costs((StageCosts(forward, backward),) * stages, dict.fromkeys(chain(stages), hop))


# Closed forms.


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(PLAIN)), forward=SECONDS, backward=SECONDS, **SIZES)
def test_equal_stages_take_the_textbook_time(
    name: str, forward: float, backward: float, stages: int, micro_batches: int
) -> None:
    """Narayanan et al. 2021, section 2.2: a bubble of (p - 1) (f + b) beside m (f + b) of work, for either schedule."""
    timeline = simulate(PLAIN[name](stages, micro_batches), equal(stages, forward, backward))
    assert timeline.makespan == pytest.approx((micro_batches + stages - 1) * (forward + backward), rel=1e-9)
    bubble = (stages - 1) / (micro_batches + stages - 1)
    assert timeline.rank_bubble == pytest.approx([bubble] * stages, abs=1e-9)
    assert timeline.bubble == pytest.approx(bubble, abs=1e-9)


@settings(max_examples=40)
@given(seed=SEEDS, **SIZES)
def test_no_schedule_beats_its_busiest_stage(seed: int, stages: int, micro_batches: int) -> None:
    """max over s of (forwards before s) + m * (f + b) of s + (backwards before s): the fill, the work, the drain."""
    random = Random(seed)
    costs = Costs(tuple(StageCosts(random.random(), random.random()) for _ in range(stages)))
    per_stage = [stage.forward + stage.backward for stage in costs.stages]
    bound = max(sum(per_stage[:stage]) + micro_batches * per_stage[stage] for stage in range(stages))
    for build in PLAIN.values():
        assert simulate(build(stages, micro_batches), costs).makespan >= bound - 1e-9


def test_one_micro_batch_pays_every_hop_twice() -> None:
    for schedule in (one_f_one_b(4, 1), add_transfers(one_f_one_b(4, 1), chain(4))):
        assert simulate(schedule, equal(4, 1, 2, hop=0.25)).makespan == pytest.approx(4 * 3 + 2 * 3 * 0.25)


def test_gpipe_pays_a_hop_per_stage_each_way() -> None:
    assert simulate(gpipe(4, 8), equal(4, 1, 2, hop=0.25)).makespan == pytest.approx((8 + 3) * 3 + 2 * 3 * 0.25)


def test_recompute_in_full_before_each_backward() -> None:
    """Unit costs f = r = 1, b = 2, p = 4, m = 8: 1F1B takes 44, as (m + p - 1) * (f + r + b)."""
    compute_only = one_f_one_b(4, 8)
    recomputing = replace(
        compute_only,
        orders=tuple(
            tuple(
                step
                for action in order
                for step in ([action._replace(kind=Kind.R)] if action.kind is Kind.B else []) + [action]
            )
            for order in compute_only.orders
        ),
    )
    by_action_costs = Costs((StageCosts(1, 2, recompute=1),) * 4)
    by_action = simulate(recomputing, by_action_costs)
    inside_backward = simulate(compute_only, equal(4, 1, 3))
    assert inside_backward.makespan == 44
    assert simulate(replace(compute_only, recomputes=frozenset(range(4))), by_action_costs).makespan == 44
    # R needs no gradient, so it runs while the stage waits for one: hidden on all stages but the last, 44 - (p - 1) r.
    assert by_action.makespan == 41


# Qi et al., Zero Bubble Pipeline Parallelism, ICLR 2024 (arXiv 2401.10241): microseconds per micro-batch and stage of
# the authors' profiles on 8 A100 (tables 3 to 5), and the bubble they give for 1F1B.
ZERO_BUBBLE_PAPER = [  # micro-batches, forward, backward for inputs, backward for weights, hop, bubble
    (24, 18522, 18086, 9337, 601, 0.2431),
    (32, 18513, 18086, 9331, 626, 0.1985),
    (64, 18546, 18097, 9321, 762, 0.124),
    (24, 29718, 29444, 19927, 527, 0.2347),
    (32, 29802, 29428, 19530, 577, 0.1898),
    (64, 29935, 29621, 19388, 535, 0.1091),
]


@pytest.mark.parametrize(("micro_batches", "forward", "inputs", "weights", "hop", "bubble"), ZERO_BUBBLE_PAPER)
def test_published_bubbles_of_1f1b(
    micro_batches: int, forward: float, inputs: float, weights: float, hop: float, bubble: float
) -> None:
    schedule, costs = one_f_one_b(8, micro_batches), equal(8, forward, inputs + weights, hop)
    assert round(simulate(schedule, costs).bubble, 4) == bubble
    assert round(simulate(add_transfers(schedule, chain(8)), costs).bubble, 4) == bubble


# Against an independent account: the longest path through every need at once.


def longest_path(schedule: Schedule, costs: Costs, edges: Edges) -> float:
    """Seconds of the step: nodes are computations and transfers, a need is an arc as long as what it waits for."""
    seconds = {Kind.F: "forward", Kind.R: "recompute", Kind.B: "backward", Kind.W: "weight"}
    recomputed, weighed = schedule.apart(Kind.R), schedule.apart(Kind.W)
    graph: nx.DiGraph = nx.DiGraph()

    def length(node: Action) -> float:
        if node.kind in RECEIVE_OF:
            return costs.transfer.get((min(node.stage, node.peer), max(node.stage, node.peer)), 0.0)
        cost, at = costs.stages[node.stage], (node.micro_batch, node.stage)
        return (
            getattr(cost, seconds[node.kind])
            + (node.kind is Kind.B and at not in weighed) * cost.weight
            + (node.kind is Kind.B and node.stage in schedule.recomputes and at not in recomputed) * cost.recompute
        )

    def need(before: Action, after: Action, delay: float = 0.0) -> None:
        graph.add_edge(before, after, weight=length(before) + delay)

    previous_on: dict[tuple[int, int], Action] = {}
    for rank, order in enumerate(schedule.orders):
        previous: Action | None = None
        for action in order:
            node = action.match if action.kind in USER_OF else action  # both ends are one transfer, named by its send
            if previous is not None:
                need(previous, node)
            if action.peer < 0:
                previous = action
                graph.add_edge(action, "end", weight=length(action))
            elif action.kind in RECEIVE_OF:
                channel = rank, schedule.stage_rank[action.peer]
                if channel in previous_on:
                    need(previous_on[channel], action)
                previous_on[channel] = action
            else:
                need(node, Action(USER_OF[action.kind], action.micro_batch, action.stage))
    for source, target in edges:
        away = schedule.stage_rank[source] != schedule.stage_rank[target]
        if away and schedule.has_transfers:
            continue
        delay = costs.transfer.get((source, target), 0.0) if away else 0.0
        for i in range(schedule.micro_batches):
            need(Action(Kind.F, i, source), Action(Kind.F, i, target), delay)
            need(Action(Kind.B, i, target), Action(Kind.B, i, source), delay)
    return nx.dag_longest_path_length(graph)


@settings(max_examples=80)
@given(seed=SEEDS, stages=st.integers(1, 5), micro_batches=st.integers(1, 5), ranks=st.integers(1, 4))
def test_the_makespan_is_the_longest_path(seed: int, stages: int, micro_batches: int, ranks: int) -> None:
    random = Random(seed)
    edges = random_edges(random, stages)
    schedule = random_schedule(random, edges, stages, micro_batches, ranks)
    schedule = replace(schedule, recomputes=frozenset(range(random.randrange(stages + 1))))
    costs = Costs(
        tuple(StageCosts(random.random(), random.random(), random.random(), random.random()) for _ in range(stages)),
        {edge: random.uniform(0, 2) for edge in sorted(edges) if random.random() < 0.8},
    )
    transferred = add_transfers(schedule, edges, ahead=random.randrange(3))
    delay_only, with_channels = simulate(schedule, costs, edges), simulate(transferred, costs, edges)
    assert delay_only.makespan == pytest.approx(longest_path(schedule, costs, edges), rel=1e-12)
    assert with_channels.makespan == pytest.approx(longest_path(transferred, costs, edges), rel=1e-12)
    assert with_channels.makespan >= delay_only.makespan - 1e-9
    assert with_channels.peak_live == delay_only.peak_live


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(PLAIN)), seed=SEEDS, **SIZES)
def test_transfers_that_take_no_time_change_nothing(name: str, seed: int, stages: int, micro_batches: int) -> None:
    random = Random(seed)
    edges = random_edges(random, stages)
    costs = Costs(tuple(StageCosts(random.random(), random.random()) for _ in range(stages)))
    schedule = PLAIN[name](stages, micro_batches)
    transferred = simulate(add_transfers(schedule, edges), costs, edges)
    computed = tuple(tuple(entry for entry in entries if entry.action.peer < 0) for entries in transferred.entries)
    assert computed == simulate(schedule, costs, edges).entries


# What is on a timeline.


def test_a_timeline_says_when_everything_happens() -> None:
    timeline = simulate(add_transfers(one_f_one_b(2, 1), chain(2)), equal(2, 1, 2, hop=0.5))
    said = [[(str(entry.action), entry.start, entry.end) for entry in entries] for entries in timeline.entries]
    assert said == [
        [("RECV_B0.0<1", 0, 5.0), ("F0.0", 0, 1), ("SEND_F0.0>1", 1, 1.5), ("B0.0", 5.0, 7.0)],
        [("RECV_F0.1<0", 0, 1.5), ("F0.1", 1.5, 2.5), ("B0.1", 2.5, 4.5), ("SEND_B0.1>0", 4.5, 5.0)],
    ]
    assert isinstance(timeline.entries[0][0], Entry)
    assert timeline.rank_bubble == pytest.approx((4 / 7, 4 / 7))


def test_a_channel_carries_one_transfer_at_a_time() -> None:
    """Three sends of 4 s each, 1 s apart: as pure delays they overlap, on one wire they queue."""
    schedule = gpipe(2, 3)
    arrivals = [
        entry.start
        for entry in simulate(add_transfers(schedule, chain(2), ahead=9), equal(2, 1, 2, hop=4)).entries[1]
        if entry.action.kind is Kind.F
    ]
    assert arrivals == [5, 9, 13]
    assert [entry.start for entry in simulate(schedule, equal(2, 1, 2, hop=4)).entries[1][:3]] == [5, 6, 7]


def test_memory_is_held_from_forward_to_the_last_backward() -> None:
    f_f_b_b_w_w = tuple(map(Action.parse, "F0.0 F1.0 B0.0 W0.0 F2.0 B1.0 B2.0 W1.0 W2.0".split()))
    split = Schedule(1, 3, (f_f_b_b_w_w,), (0,))
    timeline = simulate(split, Costs((StageCosts(1, 1, weight=1, activation_bytes=10),)))
    assert (timeline.makespan, timeline.peak_live, timeline.peak_bytes) == (9, (2,), (20,))
    costs = Costs(tuple(StageCosts(1, 2, activation_bytes=stage + 1) for stage in range(4)))
    assert simulate(one_f_one_b(4, 8), costs).peak_bytes == (4, 6, 6, 4)


def test_a_backward_does_what_has_no_action_of_its_own() -> None:
    """One stage, one micro-batch: f = 1, r = 2, b = 4, w = 8."""
    costs = Costs((StageCosts(1, 4, recompute=2, weight=8),))
    for order, inside, apart in (("F0.0 B0.0", 15, 13), ("F0.0 R0.0 B0.0 W0.0", 15, 15), ("F0.0 B0.0 W0.0", 15, 13)):
        plain = Schedule(1, 1, (tuple(map(Action.parse, order.split())),), (0,))
        assert simulate(plain, costs).makespan == apart
        assert simulate(replace(plain, recomputes=frozenset({0})), costs).makespan == inside


def test_a_recompute_holds_little_before_it_and_a_put_off_weight_gradient_little_after() -> None:
    costs = Costs((StageCosts(1, 1, 1, 1, activation_bytes=10, kept_bytes=1, weight_bytes=4),))

    def held(order: str, recomputes: frozenset[int] = frozenset()) -> int:
        actions = tuple(map(Action.parse, order.split()))
        timeline = simulate(Schedule(1, 3, (actions,), (0,), recomputes), costs)
        assert timeline.rank_peak_bytes == timeline.peak_bytes
        return timeline.peak_bytes[0]

    assert held("F0.0 F1.0 F2.0 B0.0 B1.0 B2.0") == 30
    assert held("F0.0 F1.0 F2.0 R0.0 B0.0 R1.0 B1.0 R2.0 B2.0") == 12
    assert held("F0.0 F1.0 F2.0 B0.0 B1.0 B2.0", frozenset({0})) == 12
    assert held("F0.0 F1.0 F2.0 R0.0 R1.0 B0.0 B1.0 R2.0 B2.0") == 21
    assert held("F0.0 F1.0 B0.0 B1.0 F2.0 B2.0 W0.0 W1.0 W2.0") == 20
    assert held("F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 W0.0 W1.0 W2.0") == 18


def test_a_rank_holds_the_most_of_its_stages_together() -> None:
    """Both stages of the rank hold two micro-batches at their peak, but never at the same time."""
    order = tuple(map(Action.parse, "F0.0 F1.0 F0.1 B0.1 B0.0 F1.1 B1.1 B1.0".split()))
    costs = Costs((StageCosts(1, 1, activation_bytes=10), StageCosts(1, 1, activation_bytes=7)))
    timeline = simulate(Schedule(2, 2, (order,), (0, 0)), costs)
    assert (timeline.peak_bytes, timeline.rank_peak_bytes) == ((20, 7), (27,))
    interleaved = tuple(map(Action.parse, "F0.0 F0.1 B0.1 B0.0 F1.0 F1.1 B1.1 B1.0".split()))
    assert simulate(Schedule(2, 2, (interleaved,), (0, 0)), costs).rank_peak_bytes == (17,)


# What is refused.


def test_a_deadlock_names_rank_and_action() -> None:
    orders = tuple(tuple(map(Action.parse, order.split())) for order in ("F0.0 B0.0 F1.0 B1.0", "F0.1 F1.1 B0.1 B1.1"))
    stuck = Schedule(2, 2, orders, (0, 1))
    reason = r"deadlock: rank 0 waits in B0\.0 for B0\.1 of rank 1; rank 1 waits in F1\.1 for F1\.0 of rank 0"
    with pytest.raises(ValueError, match=reason):
        simulate(stuck, equal(2, 1, 2))


def test_a_wait_for_nothing_is_a_deadlock() -> None:
    sent = add_transfers(one_f_one_b(2, 1), chain(2))
    silent = tuple(action for action in sent.orders[0] if action.kind is not Kind.SEND_F)
    with pytest.raises(ValueError, match=r"rank 1 waits in F0\.1 for SEND_F0\.0>1 of rank 0, which never comes"):
        simulate(replace(sent, orders=(silent, sent.orders[1])), equal(2, 1, 2))


def test_swapped_and_unmatched_transfers_are_refused() -> None:
    first, second = (
        tuple(map(Action.parse, order.split()))
        for order in (
            "F0.0 F1.0 SEND_F1.0>1 SEND_F0.0>1 B0.0 B1.0",
            "RECV_F0.1<0 RECV_F1.1<0 F0.1 F1.1 B0.1 B1.1",
        )
    )
    with pytest.raises(ValueError, match=r"rank 0 sends SEND_F1\.0>1 where rank 1 receives RECV_F0\.1<0"):
        simulate(Schedule(2, 2, (first, second), (0, 1)), equal(2, 1, 2))
    extra = (tuple(map(Action.parse, ("F0.0", "SEND_F0.0>1", "B0.0"))), tuple(map(Action.parse, ("F0.1", "B0.1"))))
    with pytest.raises(ValueError, match="rank 0 starts 1 sends to rank 1, which posts 0 receives from it"):
        simulate(Schedule(2, 1, extra, (0, 1)), equal(2, 1, 2))


def test_costs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="3 stage costs for a schedule of 2 stages"):
        simulate(gpipe(2, 2), equal(3, 1, 2))
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite and not negative"):
            StageCosts(1.0, seconds)
    with pytest.raises(ValueError, match="cannot be 3 of 2 bytes"):
        StageCosts(1, 2, activation_bytes=2, kept_bytes=3)
    with pytest.raises(ValueError, match="transfer 1 -> 0"):
        Costs((StageCosts(1, 2),) * 2, {(1, 0): 1.0})


def test_a_big_schedule_is_simulated_in_an_instant() -> None:
    """A planner simulates hundreds of candidates. It takes some 10 ms: ten times that is no noise."""
    schedule, costs = one_f_one_b(16, 128), equal(16, 1, 2, hop=0.1)
    best = min(_seconds(schedule, costs) for _ in range(5))
    assert best < 0.1


def _seconds(schedule: Schedule, costs: Costs) -> float:
    start = time.process_time()
    simulate(schedule, costs)
    return time.process_time() - start
