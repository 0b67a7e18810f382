"""A cloud half on several ranks: the numbers of one rank, whatever breaks on the way to the edge."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from merak_like.partitioner.cuts import live_values
from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.partitioner.schedules.action import Action, Schedule, chain
from merak_like.partitioner.schedules.validate import validate
from merak_like.partitioner.tracer import trace
from merak_like.runtime.data_parallel import Reducer
from merak_like.runtime.initialize import World
from merak_like.runtime.links import NoLinks, Spec
from merak_like.runtime.watch import Watch
from merak_like.split import checkpoint
from merak_like.split.connection import Lost
from merak_like.split.crew import Crew
from merak_like.split.cut import Cut
from merak_like.split.enduring import Enduring, Together
from merak_like.split.halves import halve
from merak_like.split.order import dealt, orders, stage_rank
from merak_like.split.parts import borders
from merak_like.split.programs import HalfPrograms
from merak_like.split.wire import Key, Kind
from tests import split_models
from tests.ranks import Call, results_of, selected_calls
from tests.split_pair import CUTS

KINDS = (Kind.BEGIN, Kind.UP_FORWARD, Kind.DOWN_FORWARD, Kind.DOWN_BACKWARD, Kind.UP_BACKWARD, Kind.DONE)

MESHES: dict[str, dict[str, int]] = {
    "pp": {"dp": 1, "pp": 2, "tp": 1}, "dp": {"dp": 2, "pp": 1, "tp": 1}, "tp": {"dp": 1, "pp": 1, "tp": 2},
}  # fmt: skip


def differences(name: str, cut: str, steps: int, dp: int = 1, pp: int = 2, tp: int = 1, **more: Any) -> Call:
    facts = {"name": name, "cut": cut, "steps": steps, "dp": dp, "pp": pp, "tp": tp, **more}
    return Call("-".join(map(str, facts.values())), "tests.split_crew:differences", facts)


def nothing() -> Reducer:
    """Of a rank that sums with nobody."""
    return Reducer({}, {}, Watch(0, timedelta(seconds=5)))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    return results_of(selected_calls(request))


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        differences("calm", CUTS["calm"], 3),
        differences("steady", CUTS["calm"], 3, 2, 1, 1, micro_batches=4),
        differences("steady", CUTS["calm"], 3, 1, 1, 2),
        pytest.param(differences("bert", "bert.encoder.layer.0@6:bert.pooler.dense", 3), marks=pytest.mark.slow),
        pytest.param(differences("bert", "bert.encoder.layer.0", 3), marks=pytest.mark.slow),
        pytest.param(differences("gpt2", CUTS["gpt2"], 3, window=1), marks=pytest.mark.slow),
        pytest.param(differences("bert", CUTS["bert"], 50), marks=pytest.mark.slow),
        pytest.param(
            differences("calm", CUTS["calm"], 10, optimizer={"lr": 0.01}, max_grad_norm=0.1), marks=pytest.mark.slow
        ),
    ],
    ids=lambda call: call.name,
)
def test_ranks_compute_what_one_does(call: Call, results: Callable[[Call], list[Any]]):
    found, *others = results(call)
    assert not any(others)
    bar = 1e-5 if call.arguments["name"] == "gpt2" else 1e-10
    assert found["losses"] < bar
    assert found["weights"] < bar
    assert found["moved"] > 1e-4


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        Call(f"cut off {name}", "tests.split_crew:cut_off", {**mesh, "kinds": [int(k) for k in KINDS]})
        for name, mesh in MESHES.items()
    ],
    ids=lambda call: call.name,
)
def test_a_connection_cut_at_any_frame_changes_nothing(call: Call, results: Callable[[Call], list[Any]]):
    assert results(call)[0] == {kind.name: True for kind in KINDS}


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            Call(f"gone on {name}", "tests.split_crew:gone_on", mesh), marks=[pytest.mark.slow] if name != "dp" else []
        )
        for name, mesh in MESHES.items()
    ],
    ids=lambda call: call.name,
)
def test_a_host_that_ended_goes_on_with_what_its_codec_remembers(call: Call, results: Callable[[Call], list[Any]]):
    found, other = results(call)
    assert other is None
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_parts_are_balanced_and_cut_where_one_value_crosses():
    model, batch = split_models.calm()
    halves = halve(trace(model, batch), Cut.parse("layers.0:head"))
    graph, (first, last) = halves.trace.graph, halves.starts[1:3]
    (inner,) = borders(halves, 2)
    work = [sum(op.flops for op in graph.ops[a:b]) for a, b in ((first, inner), (inner, last))]
    assert max(work) < 0.7 * sum(work)
    assert len(live_values(graph, inner)) == 1
    assert borders(halves, 1) == ()
    with pytest.raises(ValueError, match="99 ranks need 98"):
        borders(halves, 99)


def test_a_weight_in_two_parts_is_refused_by_name():
    class Again(split_models.Tiny):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.layers[3] = self.layers[1]

    halves = halve(trace(Again(), split_models.tiny_batch(0)), Cut.parse("layers.0:head"))
    with pytest.raises(ValueError, match=r"layers\.1\..* is used in two parts"):
        borders(halves, 3)


def test_an_optimizer_finds_its_state_by_name_on_another_number_of_ranks():
    """What two ranks saved in parts, one goes on with, and the other way round."""
    a, b = (nn.Parameter(torch.randn(3)) for _ in range(2))

    def stepped(*parameters: nn.Parameter) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=0.1)
        for p in parameters:
            p.grad = torch.ones_like(p) * p.detach()
        optimizer.step()
        return optimizer

    one, other = (checkpoint.optimizer_state(stepped(p), [n]) for p, n in ((a, "x.a"), (b, "b")))
    whole = checkpoint.State({**one.tensors, **other.tensors}, {"groups": one.facts["groups"], "plain": {}})
    both = torch.optim.AdamW([b, a], lr=9.0)
    checkpoint.load_optimizer(both, ["b", "x.a"], whole)
    assert both.param_groups[0]["lr"] == 0.1
    assert torch.equal(both.state[a]["exp_avg"], one.tensors["x.a/exp_avg"])
    alone = torch.optim.AdamW([b], lr=9.0)
    checkpoint.load_optimizer(alone, ["b"], checkpoint.optimizer_state(both, ["b", "x.a"]))
    assert torch.equal(alone.state[b]["exp_avg_sq"], other.tensors["b/exp_avg_sq"])


def test_a_step_that_breaks_goes_on_with_zeros_to_its_end_and_fails_there():
    class Breaks:
        def __init__(self) -> None:
            self.asked: list[Key] = []

        def send(self, key: Key, body: bytes) -> None:
            self.asked.append(key)

        def receive(self, key: Key) -> bytes:
            self.asked.append(key)
            raise Lost("gone")

        def close(self, error: BaseException | None = None) -> None:
            raise AssertionError("nobody ends it from here")

    cpu = torch.device("cpu")
    crew = Crew(World(0, 1, cpu, timedelta(seconds=5)))
    exchange, channel = Enduring({"up": "identity", "down": "identity"}, 0, cpu), Breaks()
    links = Together(NoLinks(), crew, exchange, nothing())
    spec = Spec("x", (2, 3), torch.float32, True)
    exchange.begin(channel, 4, [])
    links.flush()
    (x,) = exchange.take("up", "forward", 0, [spec]).values()
    assert x.requires_grad
    assert x.equal(torch.zeros(2, 3))
    exchange.put("down", "forward", 0, {"x": x}, [spec])
    assert not exchange.take("down", "backward", 0, [spec])["x"].requires_grad
    assert len(channel.asked) == 1  # nothing more is sent or waited for
    with pytest.raises(Lost, match="gone"):
        links.flush()
    exchange.begin(channel, 4, [])
    links.flush()


@pytest.mark.parametrize("cut", ["a:c", "a"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("micro_batches", "window"), [(1, 1), (4, 1), (4, 2), (6, 4), (3, 8)])
def test_every_order_ends(cut: str, ranks: int, micro_batches: int, window: int):
    """Both sides as one pipeline: where the one sends, the other receives, and no order waits in a circle."""
    place = Cut.parse(cut)
    host = stage_rank("host", place, ranks)
    tailed = place.back is not None
    # head, edge's Leaves and host's Arrives, parts, host's Leaves and edge's Arrives, tail
    joint = {("edge", 0): 0, ("edge", 1): 1, ("host", 0): 2} | {("host", 1 + r): 3 + r for r in range(ranks)}
    if tailed:
        joint |= {("host", 1 + ranks): 3 + ranks, ("edge", 2): 4 + ranks, ("edge", 3): 5 + ranks}
    rank_of = {**{joint["host", s]: 1 + r for s, r in enumerate(host)}}
    stages = tuple(rank_of.get(s, 0) for s in range(len(joint)))

    def moved(side: str, line: str) -> tuple[Action, ...]:
        return tuple(a._replace(stage=joint[side, a.stage]) for a in map(Action.parse, line.split()))

    lines = [moved("edge", orders("edge", place, micro_batches, window)[0])]
    lines += [moved("host", line) for line in orders("host", place, micro_batches, window, ranks)]
    live = validate(Schedule(len(joint), micro_batches, tuple(lines), stages), chain(len(joint)))
    assert max(live) <= min(micro_batches, window) + 2


@pytest.mark.parametrize("cut", ["a:c", "a"])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_order_of_replicas_ends(cut: str, replicas: int, ranks: int):
    """Whatever the window, nobody waits in a circle: the edge takes micro-batches in their order, and all pass one
    desk in it, while each replica does its own in the order of its pipeline."""
    for micro_batches, window in product((replicas, 2 * replicas, 4 * replicas), range(1, 9)):
        assert stuck(Cut.parse(cut), micro_batches, window, ranks, replicas) == {}, (micro_batches, window)


def stuck(cut: Cut, micro_batches: int, window: int, ranks: int, replicas: int) -> dict[str, Any]:
    """Who does not come to the end of its order, and what it waits for."""
    leaves = ranks + 1 if cut.back is not None else None
    lines: dict[str, list[tuple[Any, list[Any]]]] = {}
    """Of each process what it makes, one after the other, and what it needs for that."""

    def of_edge(a: Action) -> tuple[Any, list[Any]]:
        makes = {("F", 1): "up forward", ("B", 2): "down backward"}.get((a.kind.name, a.stage))
        needs = {("F", 2): "down forward", ("B", 1): "up backward"}.get((a.kind.name, a.stage))
        return (makes or a, a.micro_batch), [(needs, a.micro_batch)] if needs else []

    def of_host(a: Action, m: int) -> tuple[Any, list[Any]]:
        match a.kind.name, a.stage:
            case "F", 0:
                return ("taken", m), [("up forward", m), ("taken", m - 1)]
            case "F", at if at == leaves:
                return ("down forward", m), [(f"F{ranks}", m), ("down forward", m - 1)]
            case "F", at:
                return (f"F{at}", m), [(f"F{at - 1}" if at > 1 else "taken", m)]
            case "B", at if at == leaves:
                return (f"B{leaves}", m), [("down backward", m), (f"B{leaves}", m - 1)]
            case "B", 0:
                return ("up backward", m), [("B1", m), ("up backward", m - 1)]
            case _, at:
                return (f"B{at}", m), [(f"B{at + 1}" if at < ranks or leaves else f"F{at}", m)]

    lines["edge"] = [of_edge(Action.parse(w)) for w in orders("edge", cut, micro_batches, window)[0].split()]
    for replica in range(replicas):
        mine = dealt(micro_batches, replica, replicas)
        for rank, line in enumerate(orders("host", cut, micro_batches, window, ranks, replicas)):
            each = [Action.parse(word) for word in line.split()]
            lines[f"{replica}.{rank}"] = [of_host(a, mine[a.micro_batch]) for a in each]
    done, moving = {(what, -1) for what in ("taken", "down forward", "up backward", f"B{leaves}")}, True
    while moving:
        moving = False
        for line in lines.values():
            while line and done.issuperset(line[0][1]):
                done.add(line.pop(0)[0])
                moving = True
    return {who: line[0] for who, line in lines.items() if line}


def test_a_batch_that_a_stage_cannot_take_breaks_the_step_and_no_more():
    """A label beyond the classes fails on the last rank alone; the others must hear of it in time."""
    model, batch = split_models.calm()
    cpu = torch.device("cpu")
    exchange = Enduring({}, 0, cpu)
    programs = HalfPrograms(
        "host", model, Cut.parse("layers.0"), exchange, cpu, None, mesh=Mesh(pp=2), at=Coord(0, 1, 0)
    )
    wrong = {**batch, "labels": batch["labels"] + 1000}
    half = programs.at(batch)
    (stage,) = half.stages.values()
    received = {
        s.name: torch.randn(s.shape).requires_grad_() if s.requires_grad else torch.zeros(s.shape, dtype=s.dtype)
        for edge, specs in half.forward.items() for s in specs if edge[1] == 2
    }  # fmt: skip
    assert stage.forward(0, wrong, received)["loss"].item() == 0.0
    assert isinstance(exchange.broken, IndexError)
    assert stage.backward(0, {"loss": torch.ones(())}) == {}
    with pytest.raises(IndexError):
        Together(NoLinks(), Crew(World(0, 1, cpu, timedelta(seconds=5))), exchange, nothing()).flush()
    assert stage.forward(1, batch, received)["loss"].item() > 0.0
    assert stage.backward(1, {"loss": torch.ones(())})
