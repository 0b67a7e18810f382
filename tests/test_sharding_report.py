"""A plan says what tensor parallelism does to each block: kept in the file, printed, and told in the page's tips."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from merak_like.cli.decide import Question, decide
from merak_like.cli.models import Loaded
from merak_like.partitioner.hardware import hardware_named
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.drawing import unit_tips
from merak_like.partitioner.report.page import page
from merak_like.partitioner.report.sharded import as_json, of_units, step_bytes
from merak_like.partitioner.report.sharding_table import render
from merak_like.partitioner.sharding import GroupBytes, ShardedBlock
from tests.commands import refused, run
from tests.plans import make_plan

BLOCK = "transformer.h"
ATTENTION = ShardedBlock(
    name=f"{BLOCK}.0",
    like=tuple(f"{BLOCK}.{i}" for i in range(1, 12)),
    weights={
        f"{BLOCK}.0.attn.c_attn.weight": "768, 3 x 12/2 x 64",
        f"{BLOCK}.0.attn.c_proj.weight": "12/2 x 64, 768",
        f"{BLOCK}.0.mlp.c_fc.weight": "768, 3072/2",
    },
    whole={f"{BLOCK}.0.mlp.norm.weight": "it meets something whole"},
    values=17,
    matrix_elements=7_000_000,
    sharded_elements=6_300_000,
    groups=(GroupBytes(2, 1, 12_000_000, 6_000_000, 3_072),),
    unknown={"sinc": 2},
    error=3.4e-16,
    probe="tiny",
)
OUTSIDE = replace(
    ATTENTION, name="outside of blocks", like=(), weights={"transformer.wte.weight": "50304/2, 768"}, whole={},
    unknown={}, groups=(GroupBytes(2, 1, 1_000, 0, 0), GroupBytes(1, 2, 0, 0, 0)),
)  # fmt: skip
PLAN = make_plan(tp=2, sharding=(ATTENTION, OUTSIDE))

GOLDEN = """\
GPT2LMHeadModel over 2 tensor-parallel ranks: 90.0 % of its matrices are sharded
1.73 GB are summed over the ranks in a step of one replica

transformer.h.0 and 11 like it: transformer.h.1-11

 weight              dim  on the ranks
 ─────────────────────────────────────────────────────
 attn.c_attn.weight    1  768, 3 x 12/2 x 64
 attn.c_proj.weight    0  12/2 x 64, 768
 mlp.c_fc.weight       1  768, 3072/2
 mlp.norm.weight          whole: it meets something whole

90.0 % of 7.00 M matrix elements sharded, 17 values in parts
summed over 2 ranks: 12.0 MB forward and 6.00 MB backward a micro-batch, 3.07 kB of gradients a step
a step: 144 MB each
operations without a rule: sinc (2)
probe: 3e-16, tiny

outside of blocks

 weight                  dim  on the ranks
 ──────────────────────────────────────────
 transformer.wte.weight    0  50304/2, 768

90.0 % of 7.00 M matrix elements sharded, 17 values in parts
summed over 2 ranks: 1.00 kB forward and 0 B backward a micro-batch
a step: 8.00 kB
probe: 3e-16, tiny
"""


def test_it_is_printed() -> None:
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(render(PLAN))
    lines = [line.strip() for line in captured.get().splitlines() if line.strip(" ─")]
    assert lines == [line.strip() for line in GOLDEN.splitlines() if line.strip(" ─")]


def test_it_is_kept_in_the_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == PLAN
    assert again.sharding[0].groups[0].gradient_bytes == 3_072
    text = json.loads(PLAN.to_json())
    text["sharding"][0]["groups"][0].pop("degree")
    with pytest.raises(ValueError, match=r"plan.sharding\[0\].groups\[0\] lacks the fields \['degree'\]"):
        Plan.from_json(json.dumps(text))


def test_bytes_of_a_step_count_micro_batches_and_blocks() -> None:
    assert step_bytes(PLAN, ATTENTION) == 8 * 18_000_000 + 3_072
    found = as_json(PLAN)
    assert found["step_bytes"] == 12 * step_bytes(PLAN, ATTENTION) + 8_000
    assert found["blocks"][0]["share"] == pytest.approx(0.9)


def test_units_have_their_own_weights_and_those_of_equal_blocks_too() -> None:
    units = {unit.name: found for unit, found in zip(PLAN.units, of_units(PLAN), strict=True)}
    assert units[f"{BLOCK}.7.attn"][0] == {"c_attn.weight": "768, 3 x 12/2 x 64", "c_proj.weight": "12/2 x 64, 768"}
    assert units[f"{BLOCK}.7.mlp"] == ({"c_fc.weight": "768, 3072/2"}, {"norm.weight": "it meets something whole"})
    assert units["transformer.wte"][0] == {"weight": "50304/2, 768"}
    tips = {tip["name"]: tip["rows"] for tip in unit_tips(PLAN)}
    assert ["sharded", "c_fc.weight: 768, 3072/2"] in tips[f"{BLOCK}.3.mlp"]  # type: ignore[operator]
    assert ["on every rank", "norm.weight: it meets something whole"] in tips[f"{BLOCK}.3.mlp"]  # type: ignore[operator]


def test_the_page_can_be_coloured_by_it() -> None:
    whole, sharded = page(make_plan()), page(PLAN)
    assert "colour: sharded weights" in sharded
    assert "colour: sharded weights" not in whole
    heat = json.loads(re.search(r'"heat":(\{.*?\})', sharded)[1])["sharded weights"]  # type: ignore[index]
    assert heat[:3] == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("plan", "told"), [(make_plan(), "with tp = 1 nothing is sharded"), (make_plan(tp=2), "does not say how")]
)
def test_a_plan_that_shards_nothing_says_so(
    plan: Plan, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.save(tmp_path / "plan.json")
    assert told in refused(capsys, "show", str(tmp_path / "plan.json"), "--tp")


def test_the_command_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert "12/2 x 64, 768" in run(capsys, "show", str(tmp_path / "plan.json"), "--tp")
    assert json.loads(run(capsys, "show", str(tmp_path / "plan.json"), "--tp", "--json")) == json.loads(
        json.dumps(as_json(PLAN))
    )


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_it_is_shown_without_torch(tmp_path: Path, more: list[str]) -> None:
    PLAN.save(tmp_path / "plan.json")
    code = (
        "import sys; from merak_like.cli import main\n"
        f"try: main({['show', str(tmp_path / 'plan.json'), '--tp', *more]!r})\n"
        "finally: print(*(name for name in ('torch', 'numpy') if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert "12/2 x 64, 768" in done.stdout


class Gpt:
    """A source of a model."""

    def load(self, samples: int) -> Loaded:
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=96, use_cache=False)
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(config).train()
        return Loaded(model, {name: torch.zeros(samples, 16, dtype=torch.int64) for name in ("input_ids", "labels")})


def test_the_command_derives_and_proves() -> None:
    asked = Question(Gpt(), hardware_named("a100-80gb"), dp=1, pp=2, tp=2, batch=8, micro_batch=2)  # type: ignore[arg-type]
    plan, _ = decide(asked)
    first, outside = plan.sharding
    assert first.like == ("transformer.h.1",)
    assert first.weights["transformer.h.0.attn.c_attn.weight"] == "32, 3 x 4/2 x 8"
    assert (first.probe, outside.probe) == ("tiny", "tiny")
    assert max(first.error, outside.error) < 1e-8
    residual = 2 * 16 * 32 * 4
    assert first.groups == (GroupBytes(2, 1, 2 * residual, 2 * residual, 0),)
    whole = sum(4 * p.numel() for p in Gpt().load(1).model.parameters())
    assert sum(stage.memory.weights for stage in plan.stages) < 0.6 * whole  # the tied table is on both stages
