"""Choosing degrees, micro-batch, schedule and the rest together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from merak_like.partitioner.degrees import choose
from merak_like.partitioner.executable import ENGINE
from merak_like.partitioner.hardware import hardware_named
from merak_like.partitioner.layouts import Wanted, layouts
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.software import TORCH, Software
from merak_like.partitioner.states import STATES
from tests.commands import refused, run
from tests.graphs import TOY, encoder_decoder, gpt
from tests.test_one_rank import GPT2, sources

H100 = hardware_named("h100")
FUSED = Software("fused", "flash")


def test_the_first_is_the_fastest_of_those_planned_and_all_fit():
    ranked = choose(sources("gpt2"), Wanted(8, 64), H100, FUSED, states=STATES["adamw-megatron"])
    planned = [row for row in ranked if row.plan is not None]
    assert ranked[0].plan is not None
    assert len(ranked) > 4
    assert ranked[0].step_seconds == min(row.step_seconds for row in planned)
    assert all(row.layout.mesh.size == 8 and row.rank_bytes <= H100.memory_limit for row in ranked)


def test_the_choice_is_no_slower_than_any_layout():
    """Every layout of the small world is planned; the first of the list is the fastest."""
    made, wanted = sources("gpt2"), Wanted(4, 16, schedule="1f1b")
    every = list(layouts(made, wanted, H100))
    ranked = choose(made, wanted, H100, FUSED, judged=len(every), listed=len(every))
    assert all(row.plan is not None for row in ranked)
    few = choose(made, wanted, H100, FUSED)
    assert few[0].step_seconds <= min(row.step_seconds for row in ranked) * 1.05


def test_what_is_given_stays():
    wanted = Wanted(8, 64, pp=2, tp=2, micro_batch=4, schedule="1f1b", recompute="blocks", zero=0)
    best = choose(sources("gpt2"), wanted, H100, FUSED)[0]
    assert (best.layout.mesh.dp, best.layout.mesh.pp, best.layout.mesh.tp) == (2, 2, 2)
    assert (best.layout.micro_batch, best.layout.recompute, best.layout.zero) == (4, "blocks", 0)


def test_a_plan_for_the_engine_has_only_what_it_runs():
    device = replace(H100, kernels="torch")
    for row in choose(sources("gpt2"), Wanted(8, 64, executable=ENGINE), device, TORCH):
        assert row.layout.zero in ENGINE.zero
        assert row.layout.sequence_parallel is (row.layout.mesh.tp > 1)
        assert row.layout.recompute in ("none", "auto")


def test_no_layout_is_a_clear_error():
    with pytest.raises(ValueError, match=r"no layout .* on 8 devices with dp = 8.* divides the batch of 12"):
        choose(sources("gpt2"), Wanted(8, 12, dp=8), H100, FUSED)
    with pytest.raises(ValueError, match="fits their memory"):
        choose(sources("gpt2"), Wanted(8, 64, memory_limit=10**6), H100, FUSED)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    return tmp_path


def test_the_command_answers_for_a_layout_given_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = run(
        capsys, "plan", str(folder), "--dp", "4", "--pp", "1", "--tp", "8", "--micro-batch-size", "2", "--batch", "64",
        "--seq", "128", "--schedule", "1f1b", "--recompute", "full", "--hardware", "a100-80g", "--json",
    )  # fmt: skip
    data, plan = json.loads(text), Plan.from_json(text)
    assert data["step_seconds"] == plan.step_seconds > 0
    assert data["mfu"] == plan.mfu > 0
    kinds = {"weights", "gradients", "optimizer", "activations", "boundary", "logits", "workspace", "total"}
    assert [set(rank) for rank in data["memory_bytes"]] == [kinds]
    assert (plan.hardware, plan.micro_batches, plan.micro_batch) == ("a100-80gb", 8, 2)


def test_the_command_chooses_for_a_world(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "plan", str(folder), "--world", "8", "--hardware", "h100", "--batch", "64", "--seq", "128")
    assert "Layouts compared" in out
    assert Plan.load("plan.json").mesh.size == 8
    said = refused(capsys, "plan", str(folder), "--world", "8", "--dp", "2", "--pp", "2", "--tp", "1")
    assert "is 4 devices, but --world is 8" in said
    assert "give --world" in refused(capsys, "plan", str(folder), "--dp", "auto")


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "auto"])
@pytest.mark.parametrize(
    "layout",
    [
        ["--dp", "1", "--pp", "3", "--tp", "2", "--schedule", "1f1b"],
        ["--dp", "2", "--pp", "2", "--tp", "4", "--sequence-parallel", "--zero", "1", "--schedule", "interleaved"],
    ],
)
def test_every_choice_may_be_given(folder: Path, capsys: pytest.CaptureFixture[str], layout: list[str], recompute: str):
    text = run(capsys, "plan", str(folder), *layout, "--batch", "24", "--micro-batch", "2", "--recompute", recompute,
               "--seq", "128", "--json")  # fmt: skip
    assert Plan.from_json(text).step_seconds > 0


def test_a_cut_is_never_worse_than_equal_blocks_and_somewhere_much_better():
    """Large vocabularies on few layers, and encoder-decoders: by simulation."""
    gains: list[float] = []
    for graph in (gpt(4, d=8, vocabulary=2048), gpt(8, d=16, vocabulary=1024), encoder_decoder(4, d=16), gpt(12, d=32)):
        for pp in (2, 4):
            made = make_plan(graph, Mesh(1, pp), hardware=TOY, batch=16, micro_batches=8)
            (told,) = (note for note in made.notes if "with the same number of blocks on each stage" in note)
            gains.append(1 + float(told.rpartition("(")[2].rstrip("%)")) / 100)
    assert min(gains) >= 1.0
    assert max(gains) >= 1.25
