"""SplitFed: at the end of a round the edges' own layers become their mean, once, whatever is lost.

The numbers are those of one process that does the same."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like.partitioner.tracer import trace
from merak_like.split import checkpoint
from merak_like.split.ahead import Ahead
from merak_like.split.averages import Averages
from merak_like.split.connection import Connection, Lost
from merak_like.split.cut import Cut
from merak_like.split.exchange import Exchange
from merak_like.split.group import Group
from merak_like.split.groups import Place, after, averages, due, group_of, saves
from merak_like.split.halves import halve
from merak_like.split.layers import layers_of, weighted
from merak_like.split.wire import FROM_EDGE, Kind
from tests import split_groups as groups
from tests.split_groups import Ward
from tests.split_killed import changes_nothing
from tests.split_process import Nursery

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return groups.made_keys(tmp_path_factory.mktemp("keys"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_averaged_is_one_process_that_averages(mode: str, certificates: Path, tmp_path: Path):
    """Batches of 8 and 6 samples; two rounds, a mean, a third round."""
    group = groups.text(mode, "ann", "bob", average=2)
    with Ward(tmp_path, certificates, group) as ward:
        for name in group.members:
            ward.edge(name)
        losses = ward.train(ann=3, bob=3)
        expected_losses, expected = groups.alone(group, 3 if mode == "parallel" else 6)
        assert groups.furthest(ward.weights, expected) < 1e-10
        for name in group.members:
            assert list(losses[name].values()) == pytest.approx(list(expected_losses[name].values()), abs=1e-10)
        assert ward.host is not None
        held = ward.host.registry.groups["ward"].averages
        assert held.of == 2
        assert not held._brought  # nothing of an edge is kept but the mean


@pytest.mark.slow
def test_the_last_step_of_a_round_ends_with_the_mean(certificates: Path, tmp_path: Path):
    """Both edges have the same layers when training ends there; and a connection that is cut before the mean comes is
    made again, without a step or a mean twice."""
    group = groups.text("parallel", "ann", "bob", average=1, phi=1.0)
    with Ward(tmp_path, certificates, group, even=True) as ward:
        for name in group.members:
            ward.edge(name)
        ann, cut = ward.edges["ann"], list[int]()
        own = ann.exchange.take

        def take(link: Any, *rest: Any) -> dict[str, Tensor]:
            if link == "own" and len(cut) < 2:
                cut.append(ann.step_number)
                assert ann._connection is not None
                ann._connection.close(Lost("cut by the test"))
            return own(link, *rest)

        ann.exchange.take = take  # type: ignore[method-assign]
        ward.train(ann=2, bob=2)
        assert cut == [1, 1]
        assert groups.furthest(ward.weights, groups.alone(group, 2, even=True)[1]) < 1e-10
        first, second = (edge.state_dict() for edge in ward.edges.values())
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_go_only_where_both_have_agreed(certificates: Path, tmp_path: Path):
    with Ward(tmp_path, certificates, groups.text("parallel", "ann", average=1)) as ward:
        with pytest.raises(ValueError, match="say average_edges: true"):
            ward.edge("ann", average_edges=False).step(groups.batch_of("ann", 0))
        ann = ward.edge("ann", folder="other")
        ann.step(groups.batch_of("ann", 0))
        assert ann.bytes[f"sent {Kind.OWN.name}"] > 0
        object.__setattr__(ann, "task", ann.task.model_copy(update={"average_edges": False}))
        with pytest.raises(ValueError, match="its task does not say average_edges"):
            ann.step(groups.batch_of("ann", 1))
    with Ward(tmp_path / "plain", certificates, groups.text("parallel", "ann")) as ward:
        with pytest.raises(ValueError, match="does not average the edges' own layers"):
            ward.edge("ann", average_edges=True).step(groups.batch_of("ann", 0))
        quiet = ward.edge("ann", folder="other")
        quiet.step(groups.batch_of("ann", 0))
        assert not quiet.bytes[f"sent {Kind.OWN.name}"]
    with pytest.raises(ValueError, match="average in turns waits for every member"):
        group_of({"mode": "sequential", "members": ["a"], "average": 1, "lost": "skip"}, "ward")


@pytest.mark.slow
def test_a_mean_goes_on_without_who_is_lost(certificates: Path, tmp_path: Path):
    """Bob has done its step and is gone before it gave its layers; ann's mean is its own."""
    group = groups.text("parallel", "ann", "bob", average=1, wait=1.0, lost="skip")
    with Ward(tmp_path, certificates, group) as ward:
        ann, bob = (ward.edge(name, patience=20) for name in group.members)
        bob._average = bob.close  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(edge.step, groups.batch_of(name, 0)) for name, edge in ward.edges.items()]
            both[0].result()
        alone = groups.text("parallel", "ann", "bob")
        expected = groups.alone(alone, 1)[1]
        assert max(float((t - expected[f"ann/{n}"]).abs().max()) for n, t in ann.state_dict().items()) < 1e-10
        assert ward.host is not None
        assert ward.host.registry.groups["ward"].rounds.away == {"bob"}


@pytest.mark.slow
def test_who_is_missing_for_a_mean_is_named(certificates: Path, tmp_path: Path):
    group = groups.text("sequential", "ann", "bob", average=1, wait=1.0)
    with Ward(tmp_path, certificates, group) as ward:
        with pytest.raises(ValueError, match="waits for bob before it averages the edges' layers of round 1"):
            ward.edge("ann", patience=1.0).step(groups.batch_of("ann", 0))
        ward.edges["ann"].patience = 60.0
        ward.edge("bob")
        ward.train(ann=1, bob=1)
        assert groups.furthest(ward.weights, groups.alone(group, 2)[1]) < 1e-10


PLACES: dict[str, tuple[type, str, bool]] = {
    "gathered": (Averages, "_put_together", True), "not on disk yet": (Group, "save", True),
    "on disk": (Group, "save", False), "said to one": (Exchange, "put", False),
}  # fmt: skip
"""Where a host is lost: before or behind a call that has to do with the mean of round 2."""


@pytest.mark.parametrize(
    ("mode", "place"),
    [
        pytest.param(mode, place, marks=[] if (mode, place) == ("parallel", "not on disk yet") else [pytest.mark.slow])
        for mode in ("parallel", "sequential")
        for place in PLACES
    ],
)
def test_a_host_that_is_gone_around_a_mean(
    mode: str, place: str, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From one call on the host says and writes nothing more; another takes its folder. No step and no mean twice: two
    rounds with batches of 8 and 6 samples, a mean, a third round, as one process does it."""
    group = groups.text(mode, "ann", "bob", average=2, checkpoint_every=100)
    gone, (kind, name, early) = Event(), PLACES[place]
    with Ward(tmp_path, certificates, group) as ward:
        assert ward.host is not None
        doomed = ward.host.registry.groups["ward"]
        own, send, save = getattr(kind, name), Connection.send, checkpoint.save

        def due(self: Any, *args: Any) -> bool:
            return (
                doomed.rounds.at.round == 2
                and (kind is not Exchange or args[0] == "own")
                and (kind is not Group or bool(args))
            )

        def fatal(self: Any, *args: Any) -> Any:
            if gone.is_set() or not due(self, *args) or isinstance(self, Ahead):
                return own(self, *args)
            if not early:
                own(self, *args)
            gone.set()
            raise Lost("the host is gone")

        def silent(self: Connection, key: Any, body: bytes) -> None:
            if gone.is_set() and self.assembler.allowed is FROM_EDGE and doomed is of_now():
                raise Lost("the host is gone")
            send(self, key, body)

        def lost(folder: Path, *args: Any, **kwargs: Any) -> Any:
            if gone.is_set() and folder == doomed.folder and doomed is of_now():
                raise Lost("the host is gone")
            return save(folder, *args, **kwargs)

        def of_now() -> Any:
            return ward.host.registry.groups["ward"] if ward.host is not None else None

        def again() -> None:
            assert gone.wait(200)
            assert ward.host is not None
            ward.host.close()
            monkeypatch.undo()
            ward.serve()

        monkeypatch.setattr(kind, name, fatal)
        monkeypatch.setattr(Connection, "send", silent)
        monkeypatch.setattr(checkpoint, "save", lost)
        for member in group.members:
            ward.edge(member, checkpoint_every=100)
        watcher = Thread(target=again)
        watcher.start()
        ward.train(ann=3, bob=3)
        watcher.join(60)
        assert gone.is_set()
        assert groups.furthest(ward.weights, groups.alone(group, 3 if mode == "parallel" else 6)[1]) < 1e-10


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("place", ["stepped", "gathered", "averaged", "mean saved", "mean said"])
def test_a_host_that_crashes_around_a_mean_changes_nothing(
    mode: str, place: str, certificates: Path, nursery: Nursery, tmp_path: Path
):
    """Killed with SIGKILL, and started again: to the last bit what a calm run gives."""
    changes_nothing(nursery, certificates, groups.text(mode, "ann", "bob", average=2), tmp_path, place)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_killed_edge_takes_the_group_back_over_a_mean(mode: str, certificates: Path, tmp_path: Path):
    """Ann's edge is lost at step 5 and starts from its checkpoint of the mean after step 3."""
    group = groups.text(mode, "ann", "bob", checkpoint_every=100, average=3)
    kept: list[dict[str, Tensor]] = []
    for lost in (False, True):
        with Ward(tmp_path / str(lost), certificates, group, dtype=torch.float32) as ward:
            for name in group.members:
                ward.edge(name, codec="aqsgd(4)|int8", checkpoint_every=100)
            ward.train(ann=5, bob=5)
            if lost:
                ward.edges["ann"].close()
                assert ward.edge("ann", codec="aqsgd(4)|int8", checkpoint_every=100).step_number == 3
            losses = ward.train(ann=6, bob=6)
            assert list(losses["bob"]) == ([3, 4, 5] if lost else [5])
            kept.append(ward.kept())
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


class Normed(nn.Module):
    """A head with running means and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.still = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.cloud, self.tail = nn.Linear(4, 700), nn.Linear(700, 500)
        self.still.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.tail(self.cloud(self.still(self.norm(x)))).sum()}


def test_what_travels_is_what_is_trained_and_what_runs_along():
    model = Normed().bfloat16()
    layers = layers_of(halve(trace(model, torch.zeros(3, 4, dtype=torch.bfloat16)), Cut.parse("still:tail")))
    assert list(layers.shapes) == ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "tail.weight",
                                   "tail.bias"]  # fmt: skip
    assert layers.dtype == torch.float32
    assert [piece.shape for piece in layers.pieces] == [(2**18,), (16 + 500 * 701 - 2**18,)]
    other = Normed().bfloat16()
    kept = {name: t.clone() for name, t in other.state_dict().items() if name not in layers.shapes}
    layers.put(other, layers.taken(model))
    assert all(torch.equal(other.state_dict()[name], model.state_dict()[name]) for name in layers.shapes)
    assert all(torch.equal(other.state_dict()[name], t) for name, t in kept.items())
    x = torch.randn(100)
    assert torch.equal(weighted([0.3, 0.3, 0.4], [x, x, x]), x)  # a constant stays what it is
    assert torch.allclose(weighted([0.25, 0.75], [x, 3 * x]), 2.5 * x)


def test_when_layers_are_averaged_is_a_pure_function():
    text = groups.text("sequential", "a", "b", turn=2, checkpoint_every=3, average=2)
    at, told, kept = Place(), "", list[int]()
    for update in range(24):
        who = (text.members[at.member],)
        told += str(averages(text, at, who)) + ("!" if saves(text, at, who) else "")
        now = after(text, at, who)
        assert now.pending == (update % 8 == 7)
        kept += [update + 1] if due(text, at, now) else []
        if now.pending:
            settled = Place(now.updates, now.round, now.member, now.done)
            kept += [update + 1] if due(text, now, settled) else []
            now = settled
        at = now
    assert told == "0000" + "02!02!" + "00!00!" + "04!04!" + "0000" + "06!06!"
    assert kept == [8, 12, 16, 24]
