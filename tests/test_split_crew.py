"""A cloud half on several ranks: the numbers of one rank, whatever breaks on the way to the edge."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from merak_like.partitioner.cuts import live_values
from merak_like.partitioner.mesh import Coord, Mesh
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

NARROW = "bert.encoder.layer.0@6:bert.pooler.dense"
ADAM, LORA = {"name": "adamw", "lr": 0.01}, {"rank": 2}


TENTHS = [3, 5, 6, 8]

GROUPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sequential", {"turn": 1}), ("parallel", {"alpha": 0.5}), ("parallel", {"average": 2}),
    ("parallel", {"alpha": 0.5, "phi": 0.67}),
)  # fmt: skip


def differences(name: str, cut: str, steps: int, dp: int = 1, pp: int = 2, tp: int = 1, **more: Any) -> Call:
    facts = {"name": name, "cut": cut, "steps": steps, "dp": dp, "pp": pp, "tp": tp, **more}
    return Call("-".join(map(str, facts.values())), "tests.split_crew:differences", facts)


def nothing() -> Reducer:
    """Of a rank that sums with nobody."""
    return Reducer({}, {}, Watch(0, timedelta(seconds=5)))


def as_alone(found: Any, *others: Any) -> None:
    """What rank 0 found: a run on ranks and one without give the same, and weights did change."""
    assert not any(others)
    assert found["losses"] < 1e-10
    assert found["weights"] < 1e-10
    assert found["moved"] > 1e-4


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[Call], list[Any]]:
    return results_of(selected_calls(request), together=6)


@pytest.mark.ranks
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        differences("calm", CUTS["calm"], 2),
        differences("steady", CUTS["calm"], 2, 2, 1, 1, micro_batches=4),
        differences("steady", CUTS["calm"], 2, 1, 1, 2, micro_batches=4),
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                differences("bert", NARROW, 3),
                differences("bert", "bert.encoder.layer.0", 3),
                differences("gpt2", CUTS["gpt2"], 3, window=1),
                differences("bert", CUTS["bert"], 50),
                differences("calm", CUTS["calm"], 10, optimizer=ADAM, max_grad_norm=0.1),
                differences("bert", CUTS["bert"], 5, 2, 1, 1, micro_batches=6, window=3, max_grad_norm=0.1),
                differences("steady", CUTS["calm"], 10, 2, 1, 1, micro_batches=4, optimizer=ADAM, max_grad_norm=0.1),
                differences("llama", CUTS["llama"], 3, 2, 1, 1, micro_batches=2, window=1),
                differences("bert", NARROW, 3, 1, 1, 2),
                differences("bert", "bert.encoder.layer.0", 3, 1, 1, 2),
                differences("gpt2", CUTS["gpt2"], 3, 1, 1, 2, window=1),
                differences("llama", CUTS["llama"], 3, 1, 1, 2),
                differences("steady", CUTS["calm"], 10, 1, 1, 2, optimizer=ADAM, max_grad_norm=0.1),
                differences("steady", CUTS["calm"], 3, 1, 2, 1, lora=LORA),
                differences("steady", CUTS["calm"], 3, 2, 1, 1, micro_batches=4, lora=LORA),
                differences("steady", CUTS["calm"], 3, 1, 1, 2, lora=LORA),
                differences("steady", CUTS["calm"], 3, 2, 2, 1, micro_batches=4),
                differences("steady", CUTS["calm"], 3, 1, 2, 2),
                differences("steady", CUTS["calm"], 3, 2, 1, 2, micro_batches=2),
                differences("bert", "bert.encoder.layer.0", 3, 2, 2, 1, micro_batches=6),
                differences("steady", CUTS["calm"], 3, 1, 1, 2, binary_edge=True),
                differences("steady", CUTS["calm"], 3, 1, 2, 1, binary_edge=True),
            )
        ),
    ],
    ids=lambda call: call.name,
)
def test_ranks_compute_what_one_does(call: Call, results: Callable[[Call], list[Any]]):
    as_alone(*results(call))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        Call(" ".join(["ward", mode, name, *more]), "tests.split_ward:ward", {"mode": mode, **mesh, **more})
        for name, mesh in MESHES.items()
        for mode, more in GROUPS
    ],
    ids=lambda call: call.name,
)
def test_a_group_learns_what_it_does_in_one_process(call: Call, results: Callable[[Call], list[Any]]):
    as_alone(*results(call))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [
        Call(f"round {name}", "tests.split_ward:round_broken", {"tenths": TENTHS, **mesh})
        for name, mesh in MESHES.items()
    ],
    ids=lambda call: call.name,
)
def test_a_round_that_one_client_breaks_is_done_again_by_all(call: Call, results: Callable[[Call], list[Any]]):
    """Anywhere: between their first frames and their last."""
    assert results(call)[0] == dict.fromkeys(["sick", *map(str, TENTHS)], True)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "call",
    [Call(f"hearing {name}", "tests.split_ward:hearing", mesh) for name, mesh in MESHES.items()],
    ids=lambda call: call.name,
)
def test_a_group_that_chooses_whom_it_hears_learns_what_it_does_on_one_rank(
    call: Call, results: Callable[[Call], list[Any]]
):
    found, *others = results(call)
    assert not any(others)
    assert found < 1e-10


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
