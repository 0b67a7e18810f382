"""Scenarios of a group on a host of several ranks: on rank 0 the edges run beside the host, the others help."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from merak_like.partitioner.mesh import Mesh
from merak_like.runtime.initialize import join
from merak_like.split import checkpoint
from merak_like.split.crew import Crew
from merak_like.split.cut import Cut
from merak_like.split.groups import group_of
from merak_like.split.half import Source
from merak_like.split.helper import Helper
from merak_like.split.order import stage_rank
from tests import split_groups as groups
from tests import test_split_adasplit as adasplit
from tests.split_proxy import Raw


def crew_of(cut: str, mesh: Mesh, build: Callable[[], nn.Module]) -> Crew | None:
    """All ranks of a host, on the first one; elsewhere None, when it is over."""
    world = join(mesh, timeout=60, device="cpu")
    crew = Crew(world, stage_rank("host", Cut.parse(cut), mesh.pp), mesh)
    if not world.rank:
        return crew
    Helper(Source(build), crew, world.device).run()
    return None


def ward(mode: str, dp: int = 1, pp: int = 2, tp: int = 1, **more: Any) -> dict[str, float] | None:
    """How far a group's losses and weights, shared and of its edges, are from one process over two lives of the host on
    all ranks, in float64."""
    even = "phi" in more
    group = groups.text(mode, *groups.NAMES[: 3 if even else 2], **more)
    steps = 4 if mode == "parallel" else 4 * len(group.members)
    found, losses = dict[str, Tensor](), {name: dict[int, float]() for name in group.members}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for life in (2, 4):
            if (crew := crew_of(groups.CUT, Mesh(dp, pp, tp), groups.model)) is None:
                continue
            certificates = folder / "keys" if life == 4 else groups.made_keys(folder / "keys")
            with groups.Ward(folder, certificates, group, crew=crew, even=even) as it:
                for member in group.members:
                    it.edge(member)
                for member, its in it.train(**dict.fromkeys(group.members, life)).items():
                    losses[member] |= its
                found = {
                    f"{k}/{n}": t.clone() for k, edge in it.edges.items() for n, t in edge.state_dict().items()
                }  # fmt: skip
        if not found:
            return None
        kept = folder / "host/groups/ward"
        found |= checkpoint.of("weights/", checkpoint.load(kept, checkpoint.whole(kept)[-1]).tensors)
    expected_losses, expected = groups.alone(group, steps, even=even)
    buffers = {n for n, _ in groups.model().named_buffers()}
    assert found.keys() == expected.keys() - buffers, sorted(found.keys() ^ expected.keys())
    assert {k: list(its) for k, its in losses.items()} == {k: [0, 1, 2, 3] for k in group.members}
    return {
        "losses": max(abs(x - expected_losses[k][step]) for k, its in losses.items() for step, x in its.items()),
        "weights": max(float((t - expected[n]).abs().max()) for n, t in found.items()),
        "moved": max(float((t - groups.model().state_dict()[n.split("/")[-1]]).abs().max()) for n, t in found.items()),
    }


class Whole(adasplit.Model):
    """Of whose cut every tensor-parallel rank has all."""

    def __init__(self) -> None:
        super().__init__()
        self.edge.append(nn.Softmax(1))


def hearing(dp: int = 1, pp: int = 2, tp: int = 1) -> float | None:
    """How far weights, masks and their optimizers of a group that chooses whom it hears are from a host's on one rank,
    over two lives of both."""
    mesh = Mesh(dp, pp, tp)
    task, group = adasplit.TASK.model_copy(update={"micro_batches": 2}), group_of(adasplit.GROUP, "ward")
    found: list[dict[str, Tensor]] = []
    build = lambda: Whole().double()  # noqa: E731
    with tempfile.TemporaryDirectory() as name:
        certificates = Path(name) / "keys"
        for several in (True, False):
            folder = Path(name) / str(several)
            for rounds in (2, 4):
                crew = crew_of(adasplit.TASK.cut, mesh, build) if several else None
                if crew is None and (several or join(mesh, timeout=60, device="cpu").rank):
                    continue
                made = certificates if certificates.exists() else groups.made_keys(certificates)
                it = adasplit.Ward(folder, made, group, task, crew, build)
                it.train(adasplit.ALONE + rounds)
                it.close()
            kept = folder / "host/groups/ward"
            if kept.exists():
                state = checkpoint.load(kept, checkpoint.whole(kept)[-1])
                kinds = ("weights/", "optimizer/", "mask/", "learner/")
                found.append({n: t for n, t in state.tensors.items() if n.startswith(kinds)})
                assert state.facts["place"]["round"] == 4
    if not found:
        return None
    ours, expected = found
    assert ours.keys() == expected.keys()
    assert any((t < 1).any() for n, t in ours.items() if n.startswith("mask/"))
    return max(float((ours[n] - t).abs().max()) for n, t in expected.items())


def round_broken(tenths: list[int], dp: int = 1, pp: int = 2, tp: int = 1) -> dict[str, bool] | None:
    """A client of a round whose steps go side by side sends what is not finite, or is cut off after so many tenths of
    what it sends: whether all is as where nothing broke, to the last bit."""
    group = groups.text("parallel", *groups.NAMES, phi=0.67)
    found: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    sent = 0
    with tempfile.TemporaryDirectory() as name:
        certificates = Path(name) / "keys"
        for broken in ("nothing", "sick", *map(str, tenths)):
            if (crew := crew_of(groups.CUT, Mesh(dp, pp, tp), groups.model)) is None:
                continue
            made = certificates if certificates.exists() else groups.made_keys(certificates)
            tap = Raw(1 + int(broken) * sent // 10 if broken.isdigit() else None)
            with groups.Ward(Path(name) / broken, made, group, crew=crew, even=True) as it:
                tap.target, it.ways["ann"] = it.port, tap.port
                for member in group.members:
                    it.edge(member, codec="aqsgd(4)|int8")
                losses = _sick(it) if broken == "sick" else it.train(ann=4, bob=4, eve=4)
                assert {k: list(its) for k, its in losses.items()} == {k: [0, 1, 2, 3] for k in group.members}
                found[broken] = losses, it.kept()
            tap.close()
            assert tap.cuts == broken.isdigit()
            sent = sent or len(tap.seen["up"])
    if not found:
        return None
    losses, weights = found.pop("nothing")
    return {
        broken: losses == its and weights.keys() == own.keys() and all(own[n].equal(t) for n, t in weights.items())
        for broken, (its, own) in found.items()
    }


def _sick(it: groups.Ward) -> dict[str, dict[int, float]]:
    """Ann's first step is not finite: she is told, the others wait until it is."""
    weight = it.edges["ann"].training.made.model.get_parameter("token.weight").detach()
    kept = weight.clone()
    with ThreadPoolExecutor(1) as pool:
        weight[:] = float("nan")
        others = pool.submit(it.train, bob=4, eve=4)
        with pytest.raises(FloatingPointError, match="not finite"):
            it.train(ann=4)
        assert not others.done()
        weight.copy_(kept)
        return it.train(ann=4) | others.result()
