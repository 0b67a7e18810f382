"""The dry run: what the ranks of a plan call fits together, at any size; and whatever does not is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import activations

from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.schedules import AS_DATA
from merak_like.runtime.coded_links import coding_of
from merak_like.runtime.dry_run import whole
from merak_like.runtime.dry_run.alike import same
from merak_like.runtime.dry_run.echo import SEND
from merak_like.runtime.dry_run.rank import Cast, Did
from merak_like.runtime.dry_run.whole import dry_run
from merak_like.runtime.tensor_parallel.sharding import sharding
from tests import golden
from tests.commands import refused, run
from tests.graphs import TOY
from tests.skips import ROWS, WIDTH, Skips, planned, proved, squares

QUICK = {("1f1b", "full"), ("zb-h1", "none"), ("zb-v", "full"), ("interleaved", "none")}


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [
        pytest.param(name, recompute, marks=[pytest.mark.slow] * ((name, recompute) not in QUICK))
        for name in (*AS_DATA, "auto", "auto-v")
        for recompute in ("none", "full")
    ],
)
def test_every_schedule_fits_together(schedule: str, recompute: str):
    found = proved(planned(schedule=schedule, recompute=recompute))
    assert found.problems == ()
    assert found.acted == (0, 1, 2, 3)
    assert found.transfers > 0
    assert found.collectives > 2, "gradients of own and shared weights, and the step's numbers"


def test_a_thousand_ranks_in_one_process():
    found = proved(planned(pp=8, dp=128))
    assert found.holds
    assert (found.world, len(found.acted), found.grouped, found.alike) == (1024, 10, 32, 1014)
    assert proved(planned(pp=8, dp=1)).transfers == found.transfers


@pytest.mark.parametrize(("text", "each"), [("int8", [32, 32]), ("aqsgd(4)", [8 + 16 + 28, 32])])
def test_what_goes_through_a_codec_has_its_length(text: str, each: list[int]):
    """A value of 2 x 8 has a byte or half of one an element, and a bf16 scale a channel; 28 bytes tell of samples."""
    plain, coding = proved(planned(dp=1)), coding_of(text, Skips())
    found = proved(planned(dp=1, coding=coding))
    assert (found.problems, found.transfers) == ((), plain.transfers)
    whole = 2 * 8 * 4
    assert plain.nbytes - found.nbytes == 4 * sum(whole - one for one in each)


class Block(nn.Module):
    """A feed-forward that can be shared out, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


BLOCKS = 2


def blocks() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


@pytest.mark.parametrize(
    "schedule", ["1f1b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpipe", "zb-h1", "zb-v", "scp"))]
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_tensor_parallel_ranks_talk_inside_their_stages(schedule: str, recompute: str):
    parts = sharding(blocks(), 2, squares)
    graph = parts.graph(parts.trace(torch.ones(ROWS, WIDTH), "cpu"))
    plan = make_plan(
        graph, Mesh(2, 2, 2), hardware=TOY, batch=ROWS * 8, micro_batches=4, schedule=schedule, recompute=recompute
    )
    found = dry_run(plan, blocks(), torch.ones(ROWS, WIDTH), squares)
    assert found.problems == ()
    assert len(found.acted) == 8
    inside = BLOCKS * 4 * (2 if recompute == "none" else 3)  # blocks, micro-batches, in F and B, and once more in R
    assert found.collectives >= 2 * inside
    one = dry_run(plan, blocks(), torch.ones(ROWS, WIDTH), squares, all_ranks=False)
    assert (one.problems, one.collectives) == ((), found.collectives)


class Spelt(Block):
    """With an activation in several calls, for which one kernel can stand."""

    def __init__(self) -> None:
        super().__init__()
        self.act = activations.NewGELUActivation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def test_a_plan_of_a_model_that_is_not_fused_is_known_by_its_ops():
    sizes: set[int] = set()
    for fuse in (True, False):
        parts = sharding(nn.Sequential(*(Spelt() for _ in range(BLOCKS))), 2, squares, fuse=fuse)
        graph = parts.graph(parts.trace(torch.ones(ROWS, WIDTH), "cpu"))
        plan = make_plan(graph, Mesh(1, 2, 2), hardware=TOY, batch=ROWS * 4, micro_batches=4)
        found = dry_run(plan, nn.Sequential(*(Spelt() for _ in range(BLOCKS))), torch.ones(ROWS, WIDTH), squares)
        assert found.problems == ()
        sizes.add(plan.starts[-1])
    assert len(sizes) == 2


@pytest.mark.parametrize(("dp", "pp"), [(1, 1), (3, 1), (1, 3)])
def test_small_meshes(dp: int, pp: int):
    found = proved(planned(dp=dp, pp=pp))
    assert found.holds
    assert (found.transfers > 0) == (pp > 1)


def test_one_replica_stands_for_all():
    """What is said to differ in nothing but its replica does not, wherever it is run after all."""
    plan = planned(pp=2, dp=4)
    one, every = proved(plan, all_ranks=False), proved(plan, all_ranks=True)
    assert one.holds
    assert every.holds
    assert (one.transfers, one.collectives, one.groups) == (every.transfers, every.collectives, every.groups)


def test_the_model_and_the_process_are_left_as_they_were():
    model = Skips()
    before = {name: p.clone() for name, p in model.named_parameters()}
    dry_run(planned(), model, torch.ones(ROWS, WIDTH), squares)
    assert not dist.is_initialized()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert model.layers[7].weight is model.layers[0].weight


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="name the model and the size the plan was made from"):
        dry_run(planned(), nn.Linear(WIDTH, WIDTH), torch.ones(ROWS, WIDTH), squares)


# The command.

BUILD = """
from tests.skips import ROWS, WIDTH, Skips, squares
import torch

def build():
    return Skips(), torch.ones(ROWS, WIDTH), squares
"""


def test_the_words_and_numbers_of_verify(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "skips_for_merak.py").write_text(BUILD)
    asked = ["skips_for_merak:build", "--dp", "2", "--pp", "2", "--batch", "16", "--micro-batches", "4"]
    told = run(capsys, "plan", *asked, "--hardware", "h100", "--verify", "-o", "skips.json")
    assert "each send has its receive" in told
    golden.same_as("verify.txt", run(capsys, "verify", "skips.json"))
    golden.same_numbers("verify.json", json.loads(run(capsys, "verify", "skips.json", "--json")))
    assert "no model 'nowhere'" in refused(capsys, "verify", "skips.json", "nowhere")
    assert "does not say which model" in refused(capsys, "verify", "plan.json")


def test_tensor_parallel_ranks_between_the_first_and_the_last_are_proven_by_these():
    parts = sharding(blocks(), 4, squares)
    graph = parts.graph(parts.trace(torch.ones(ROWS, WIDTH), "cpu"))
    plan = make_plan(graph, Mesh(2, 2, 4), hardware=TOY, batch=ROWS * 4, micro_batches=2)
    every, few = (dry_run(plan, blocks(), torch.ones(ROWS, WIDTH), squares, all_ranks=a) for a in (True, False))
    assert every.problems == few.problems == ()
    assert (len(every.acted), len(few.acted)) == (16, 6)
    for name in ("groups", "channels", "transfers", "nbytes", "collectives", "waits"):
        assert getattr(every, name) == getattr(few, name), name


def test_record_of_a_rank_that_was_not_run_is_the_one_it_would_have_left(monkeypatch: pytest.MonkeyPatch):
    """Call by call, with shapes, peers and groups; and one that would do something else is run itself."""
    parts = sharding(blocks(), 4, squares)
    graph = parts.graph(parts.trace(torch.ones(ROWS, WIDTH), "cpu"))
    plan = make_plan(graph, Mesh(1, 2, 4), hardware=TOY, batch=ROWS * 2, micro_batches=2)
    cast = Cast(plan, blocks(), torch.ones(ROWS, WIDTH), squares)
    with cast():
        acted = {rank: cast.act(rank) for rank in range(8)}
        for rank in (1, 2, 5, 6):
            told = whole._alike(cast, acted, rank)
            assert told is not None
            assert any(event.peer >= 0 for event in told.events)
            assert same(told, acted[rank]), rank
    act = Cast.act

    def lacking(did: Did) -> Did:
        first = next(event for event in did.events if event.what == SEND)
        return replace(did, events=tuple(event for event in did.events if event is not first))

    monkeypatch.setattr(Cast, "act", lambda self, rank: (lacking if rank == 3 else lambda did: did)(act(self, rank)))
    found = dry_run(plan, blocks(), torch.ones(ROWS, WIDTH), squares, all_ranks=False)
    assert {1, 2} <= set(found.acted), "the first and the last of their group differ"
    assert not {5, 6} & set(found.acted)
    assert found.problems
