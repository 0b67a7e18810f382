"""What a planner makes of a codec between stages: fewer bytes over the link, and seconds to code them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merak_like import Mesh, Plan, auto_parallel
from merak_like.deciding import alone
from merak_like.partitioner.coding import PASSES, Coding
from merak_like.partitioner.degrees import choose
from merak_like.partitioner.executable import ENGINE
from merak_like.partitioner.explain.again import Again, plan_again
from merak_like.partitioner.hardware import Link, hardware_named
from merak_like.partitioner.layouts import Wanted
from merak_like.partitioner.one_rank import Sources
from merak_like.partitioner.planned import costs_of
from merak_like.partitioner.planner import make_plan
from merak_like.partitioner.software import TORCH
from merak_like.runtime.coded_links import coding_of
from merak_like.trainer import assembly
from merak_like.trainer.deepspeed import engine_arguments
from merak_like.trainer.settings import Settings
from tests.commands import refused, run
from tests.graphs import gpt

SLOW = replace(hardware_named("a100-80gb"), kernels="torch", intra=Link(1e6, 1e-4), inter=Link(1e6, 1e-4))
QUARTER = Coding("int(8)", 0.25)
TOY = """
import torch
from torch import nn

def build():
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())))
    return model, torch.ones(4, 64), lambda out, batch: out.square().mean()
"""


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("identity", 1.0),
        ("fp16", 0.5),
        ("int8", (1 + 2 / 1024) / 4),  # 4 x 256 elements of each channel share a scale of two bytes
        ("int4|int8", (1.5 / 2 + 2 / 1024) / 4),
        ("int8|fp16", ((1 + 2 / 1024) / 4 + 0.5) / 2),
        ("aqsgd(4)|int8", (1.5 / 2 + 2 / 1024 + 50 / 2**21) / 4),  # and what says which samples are known, and how
    ],
)
def test_a_codecs_share_is_what_it_sends(text: str, share: float):
    coding = coding_of(text, nn.Linear(2, 2))
    assert coding is not None
    assert coding.share == pytest.approx(share)


def test_the_share_is_of_the_models_own_dtype():
    half = coding_of("int8", nn.Linear(2, 2, dtype=torch.bfloat16))
    assert half is not None
    assert half.share == pytest.approx(0.5, rel=0.01)
    assert coding_of(None, nn.Linear(2, 2)) is None


def test_a_plans_transfers_shrink_and_it_says_why(tmp_path: Path):
    plain, coded = (
        make_plan(gpt(4), Mesh(1, 2), hardware=SLOW, batch=8, micro_batches=4, coding=coding)
        for coding in (None, QUARTER)
    )
    nbytes = sum(crossing.nbytes for crossing in coded.crossings)
    each = 0.25 / 1e6 + 2 * PASSES / (SLOW.memory_bandwidth * SLOW.memory_efficiency)
    assert costs_of(coded).transfer == {(0, 1): pytest.approx(1e-4 + nbytes * each)}
    assert coded.pipeline_seconds < plain.pipeline_seconds
    assert any("go through int(8): 0.25 of their bytes travel" in note for note in coded.notes)
    assert not any("go through" in note for note in plain.notes)
    coded.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert costs_of(loaded) == costs_of(coded)
    assert plan_again(loaded) == coded
    assert Again.of(loaded).judged.timeline.makespan == coded.pipeline_seconds


def test_coding_costs_more_than_it_saves_where_links_are_fast():
    fast = replace(SLOW, intra=Link(1e12, 0.0), inter=Link(1e12, 0.0))
    assert QUARTER.over(fast.intra, fast).seconds(1e6) > fast.intra.seconds(1e6)
    assert QUARTER.over(SLOW.intra, SLOW).seconds(1e6) == pytest.approx(1e-4 + 0.25, rel=1e-3)


def test_the_search_for_degrees_counts_it():
    sources = Sources(gpt(4), gpt(4), ())
    asked = Wanted(4, 8, 1, 4, 1, executable=ENGINE)
    ranked = [choose(sources, replace(asked, coding=coding), SLOW, TORCH) for coding in (None, QUARTER)]
    estimated = [min(row.step_seconds for row in rows if row.plan is None) for rows in ranked]
    assert ranked[1][0].step_seconds < 0.7 * ranked[0][0].step_seconds  # the rest is latency
    assert estimated[1] < 0.7 * estimated[0]


def test_a_plan_that_counts_on_a_codec_is_obeyed_with_it_only():
    model, batch = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), {"input": torch.ones(4, 8)}
    plan = alone(model, Mesh(1, 2), batch, loss_fn=lambda out, _: out.mean(), hardware="a100-80gb", codec="int8")
    assert any("go through int(8)" in note for note in plan.notes)
    alone_on_it = make_plan(gpt(2), Mesh(), hardware=SLOW, batch=8, micro_batches=4, coding=QUARTER)
    assert any("int(8) has nothing to do" in note for note in alone_on_it.notes)
    counted = replace(plan, mesh=Mesh())  # of one rank, so that this process can be it
    with pytest.raises(ValueError, match=r"counts on codec='int\(8\)' between stages, asked for None: pass it too"):
        auto_parallel(model, "auto", "auto", "auto", example=batch, loss_fn=lambda out, _: out.mean(), plan=counted)


def test_a_runs_file_says_it(monkeypatch: pytest.MonkeyPatch):
    passed = dict[str, Any]()
    monkeypatch.setattr(assembly, "auto_parallel", lambda *_, **named: passed.update(named))
    settings = Settings.model_validate({"training": {"steps": 1}, "parallelism": {"pp": 2, "codec": "int4|int8"}})
    model, batch = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), {"input": torch.ones(4, 8)}
    assembly.assembled(model, settings, batch, None, None, engine_arguments(settings, 1), None)
    assert passed["codec"] == "int4|int8"
    plan = assembly.planned(model, settings, batch, lambda out, _: out.mean(), 1)
    assert any("go through int(4)|int(8)" in note for note in plan.notes)


def test_merak_plan_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("coded_toy.py").write_text(TOY)
    said = run(capsys, "plan", "coded_toy:build", "--pp", "2", "--batch", "8", "--codec", "int4|int8")
    assert "go through int(4)|int(8)" in " ".join(said.split())
    asked = ("plan", "coded_toy:build", "--pp", "2", "--batch", "8", "--codec")
    said = " ".join(run(capsys, *asked, "aqsgd(4)", "--verify").split())
    assert "go through aqsgd(4): 0.188 of their bytes travel, from the second epoch on (a first visit is whole)" in said
    assert "cannot know beforehand how long" in refused(capsys, *asked, "deflate")
    assert "use pp=2 or more" in refused(capsys, "plan", "coded_toy:build", "--batch", "8", "--codec", "int8")
