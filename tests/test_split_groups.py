"""Clients of a group train one cloud half: the numbers are those of one process that trains the same, and a step is
applied once, whatever is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from merak_like.split.groups import Place, after, chosen, due, expected, group_of, read_groups, saves
from merak_like.split.host import Host
from merak_like.split.membership import require_fitting
from merak_like.split.rounds import Busy, Meeting, Rounds, Seat
from merak_like.split.row import Row
from merak_like.split.session import Refused
from tests import split_groups as groups
from tests.commands import refused
from tests.split_groups import Ward
from tests.split_killed import changes_nothing
from tests.split_process import Nursery

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return groups.made_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


def test_in_turns_is_one_process_that_trains_in_that_order(certificates: Path, tmp_path: Path):
    """Two steps of ann, two of bob, and again: the shared layers, Adam's moments and the running means go from one to
    the other."""
    group = groups.text("sequential", "ann", "bob", turn=2)
    with Ward(tmp_path, certificates, group) as ward:
        for name in group.members:
            ward.edge(name)
        losses = ward.train(ann=4, bob=4)
        assert ward.host is not None
        assert not ward.host.registry.groups["ward"].at_work  # no session is kept by what it did last
        expected_losses, expected = groups.alone(group, 8)
        assert groups.furthest(ward.weights, expected) < 1e-10
        for name in group.members:
            assert list(losses[name]) == [0, 1, 2, 3]
            assert list(losses[name].values()) == pytest.approx(list(expected_losses[name].values()), abs=1e-10)


@pytest.mark.parametrize(("alpha", "phi"), [pytest.param(0.0, 0.0, marks=pytest.mark.slow), (0.5, 0.67)])
def test_in_parallel_is_one_process_with_the_same_formulas(
    alpha: float, phi: float, certificates: Path, tmp_path: Path
):
    """Three clients at once, two of which get one gradient at the cut; without ``phi`` their batches differ in size."""
    group = groups.text("parallel", "ann", "bob", "eve", alpha=alpha, phi=phi)
    even = phi > 0
    with Ward(tmp_path, certificates, group, even=even) as ward:
        for name in group.members:
            ward.edge(name)
        losses = ward.train(ann=3, bob=3, eve=3)
        expected_losses, expected = groups.alone(group, 3, even=even)
        assert groups.furthest(ward.weights, expected) < 1e-10
        for name in group.members:
            assert list(losses[name].values()) == pytest.approx(list(expected_losses[name].values()), abs=1e-10)


CRASHES = ("begun", "stepped", "applied", "group saved")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("place", "mode"),
    [
        pytest.param(place, mode, marks=[] if (place, mode) == ("stepped", "parallel") else [pytest.mark.slow])
        for place in CRASHES
        for mode in ("sequential", "parallel")
    ],
)
def test_a_host_that_crashes_changes_nothing(
    mode: str, place: str, certificates: Path, nursery: Nursery, tmp_path: Path
):
    """Killed with SIGKILL in the middle of a round, and started again: to the last bit what a calm run gives."""
    changes_nothing(nursery, certificates, groups.text(mode, "ann", "bob"), tmp_path, place)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("mesh", "rank", "place"),
    [
        ((1, 2, 1), 0, "up backward"),
        ((2, 1, 1), 1, "stepped"),
        ((1, 1, 2), 0, "up backward"),
        ((1, 2, 1), 0, "applied"),
    ],
    ids=str,
)
def test_a_rank_that_dies_amid_steps_side_by_side_changes_nothing(
    mesh: tuple[int, ...], rank: int, place: str, certificates: Path, nursery: Nursery, tmp_path: Path
):
    """Three clients share gradients at the cut over several ranks, of which one is killed in their fourth round."""
    group = groups.text("parallel", *groups.NAMES, phi=0.67)
    changes_nothing(nursery, certificates, group, tmp_path, place, mesh, rank)


@pytest.mark.slow
def test_a_killed_edge_takes_the_group_back(certificates: Path, tmp_path: Path):
    """Ann's edge is lost at step 5 and starts from its checkpoint of step 3: bob, at 5 too, goes back with it."""
    group = groups.text("sequential", "ann", "bob", checkpoint_every=3)
    kept: list[dict[str, Tensor]] = []
    for lost in (False, True):
        folder = tmp_path / str(lost)
        with Ward(folder, certificates, group, dtype=torch.float32) as ward:
            for name in group.members:
                ward.edge(name, codec="aqsgd(4)|int8", checkpoint_every=3)
            ward.train(ann=5, bob=5)
            if lost:
                ward.edges["ann"].close()
                assert ward.edge("ann", codec="aqsgd(4)|int8", checkpoint_every=3).step_number == 3
            losses = ward.train(ann=6, bob=6)
            assert list(losses["bob"]) == ([3, 4, 5] if lost else [5])
            kept.append(ward.kept())
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.parametrize("mode", ["sequential", pytest.param("parallel", marks=pytest.mark.slow)])
def test_who_is_missing_is_named(mode: str, certificates: Path, tmp_path: Path):
    """Nothing is changed meanwhile, and when bob is there after all it goes on."""
    group = groups.text(mode, "bob", "ann", wait=0.5)
    with Ward(tmp_path, certificates, group) as ward:
        ann = ward.edge("ann", patience=1.0)
        with pytest.raises(ValueError, match="group ward waits for bob"):
            ann.step(groups.batch_of("ann", 0))
        assert ann.step_number == 0
        ann.patience = 60.0
        ward.edge("bob")
        ward.train(ann=1, bob=1)
        assert groups.furthest(ward.weights, groups.alone(group, 2 if mode == "sequential" else 1)[1]) < 1e-10


@pytest.mark.parametrize("mode", ["parallel", pytest.param("sequential", marks=pytest.mark.slow)])
def test_a_group_that_skips_goes_on_without_and_takes_back(mode: str, certificates: Path, tmp_path: Path):
    group = groups.text(mode, "bob", "ann", wait=0.5, lost="skip", alpha=0.5 if mode == "parallel" else 0)
    alone = group.model_copy(update={"members": ("ann",)})
    with Ward(tmp_path, certificates, group) as ward:
        ward.edge("ann")
        ward.train(ann=2)
        assert groups.furthest(ward.weights, groups.alone(alone, 2)[1]) < 1e-10
        assert ward.host is not None
        rounds = ward.host.registry.groups["ward"].rounds
        assert rounds.away == {"bob"}
        rounds.text = rounds.text.model_copy(update={"wait": 30.0})  # from here on nobody is passed over
        bob = ward.edge("bob")
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(bob.step, groups.batch_of("bob", 0))
            with rounds.change:
                assert rounds.change.wait_for(lambda: not rounds.away, 30)
            if mode == "parallel":
                ward.train(ann=3)
            first.result()
        assert rounds.at.updates == 3


def test_numbers_that_are_not_finite_or_too_large_reach_no_shared_weight(certificates: Path, tmp_path: Path):
    group = groups.text("sequential", "ann", most_norm=1e-9)
    with Ward(tmp_path, certificates, group) as ward:
        edge = ward.edge("ann")
        with pytest.raises(FloatingPointError, match="above 1e-09, the most that group ward takes"):
            edge.step(groups.batch_of("ann", 0))
        before = ward.weights
        sick = edge.training.made.model.get_parameter("token.weight")
        with torch.no_grad():
            kept, sick[:] = sick.clone(), float("nan")
        with pytest.raises(FloatingPointError, match="not finite"):
            edge.step(groups.batch_of("ann", 0))
        with torch.no_grad():
            sick.copy_(kept)
        assert groups.furthest(ward.weights, before) == 0.0


def sharing(rounds: Rounds, meeting: Meeting, name: str) -> None:
    rounds.pool(meeting, name, meeting.who, 0, {"x": torch.ones(1)})


def lining_up(rounds: Rounds, meeting: Meeting, name: str) -> None:
    rounds.line_up(meeting, name, Seat(None, {}, None), lambda _: Row(3, lambda _: True, 9.0), lambda: True)


@pytest.mark.parametrize("wait", [sharing, lining_up])
def test_who_waits_for_others_is_not_missing(wait: Callable[[Rounds, Meeting, str], None]):
    """Ann and bob have brought their gradients at the cut, or stand in line, and wait for eve: she is passed over."""
    text = groups.text("parallel", *groups.NAMES, phi=1.0, wait=0.4, lost="skip")
    rounds = Rounds("ward", text, lambda *_: None, lambda *_: None, lambda *_, **__: None, lambda: False)

    def step(name: str) -> None:
        with rounds.seat(name) as meeting:
            wait(rounds, meeting, name)

    with ThreadPoolExecutor(2) as pool:
        for one in [pool.submit(step, name) for name in ("ann", "bob")]:
            with pytest.raises(Busy, match="goes on without eve: do"):
                one.result()
    assert rounds.away == {"eve"}
    assert rounds.meeting.who == ("ann", "bob")


def test_steps_side_by_side_have_one_window():
    """On one rank each client goes its own way up to the cut; on several they take turns by their orders."""
    others = {"bobs": SimpleNamespace(owner="bob", task=groups.task(window=3))}
    for alone in (True, False):
        crew = SimpleNamespace(world=SimpleNamespace(alone=alone))
        group: Any = SimpleNamespace(name="ward", text=groups.text("parallel", "ann", "bob", phi=0.5), live=others)
        group.commons = SimpleNamespace(crew=crew)
        with nullcontext() if alone else pytest.raises(Refused, match="say window: 3, not 2"):
            require_fitting(groups.task(), "ann", group)
        with pytest.raises(Refused, match="say micro_batches: 2, not 4"):
            require_fitting(groups.task(micro_batches=4), "ann", group)


def test_who_may_join_is_the_operators_word(certificates: Path, tmp_path: Path):
    with Ward(tmp_path, certificates, groups.text("parallel", "ann", phi=0.5)) as ward:
        with pytest.raises(ValueError, match="There is no such group"):
            ward.edge("bob").step(groups.batch_of("bob", 0))
        with pytest.raises(ValueError, match="There is no such group"):
            ward.edge("ann", group="wards", folder="other").step(groups.batch_of("ann", 0))
        with pytest.raises(ValueError, match="say checkpoint_every: 2, not 7"):
            ward.edge("ann", checkpoint_every=7, folder="third").step(groups.batch_of("ann", 0))
        with pytest.raises(ValueError, match="leave frozen_edge away"):
            ward.edge("ann", frozen_edge=True, folder="fourth").step(groups.batch_of("ann", 0))
        ann = ward.edge("ann")
        ann.step(groups.batch_of("ann", 0))
        stolen = ward.edge("bob", folder="stolen")
        stolen.session = ann.session
        with pytest.raises(ValueError, match="There is no such group"):
            stolen.step(groups.batch_of("bob", 0))


def test_a_group_is_refused_where_it_cannot_be(tmp_path: Path):
    text = groups.text("parallel", "ann")
    with pytest.raises(ValueError, match="by their certificates"):
        Host(groups.Source(groups.model), groups.CUT, listen="127.0.0.1:0", folder=tmp_path, groups={"ward": text})
    for entry, said in (
        ({"mode": "sequential", "members": ["a"], "phi": 0.5}, "phi means nothing in a sequential group"),
        ({"mode": "parallel", "members": ["a", "a"]}, "named twice"),
        ({"mode": "parallel", "members": ["a"], "alpa": 1}, "ward.alpa"),
    ):
        with pytest.raises(ValueError, match=said):
            group_of(entry, "groups.yaml: ward")


def test_mistakes_in_groups_yaml_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "groups.yaml"
    file.write_text("ward: {mode: sequential, members: [ann, bob], optimizer: {name: adamw, lr: 2.0e-5}, wait: 60}")
    ward = read_groups(file)["ward"]
    assert ward.members == ("ann", "bob")
    assert ward.optimizer.lr == 2e-5
    serve = ["serve", "--model", "tests.split_models:calm", "--cut", groups.CUT, "--state", str(tmp_path / "host")]
    serve += ["--listen", "127.0.0.1:0", "--groups", str(file)]
    assert "give the host keys" in refused(capsys, *serve)
    file.write_text("ward: {mode: paralel, members: [ann]}")
    assert f"{file}: ward.mode" in refused(capsys, *serve)
    file.write_text("- ward")
    assert "groups by name" in refused(capsys, *serve)


def test_turns_rounds_and_checkpoints_are_a_pure_function():
    text = groups.text("sequential", "a", "b", "c", turn=2, checkpoint_every=2)
    at, order, kept = Place(), "", list[int]()
    for update in range(12):
        who = expected(text, at)
        now = after(text, at, who)
        order += who[0].upper() if saves(text, at, who) else who[0]
        kept += [update + 1] if due(text, at, now) else []
        at = now
    assert order == "aabbccaAbBcC"
    assert kept == [12]
    assert expected(text, Place(member=1), {"b"}) == ("c",)
    assert after(text, Place(member=2), ("a",)).round == 1  # c was passed over
    parallel = groups.text("parallel", "a", "b", "c", phi=0.67, checkpoint_every=3)
    drawn = {chosen(parallel, Place(updates=i), ("a", "b", "c")) for i in range(20)}
    assert drawn == {("a", "b"), ("a", "c"), ("b", "c")}
    assert [saves(parallel, Place(i, i), ("a",)) for i in range(4)] == [False, False, True, False]
