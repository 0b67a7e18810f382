"""A plan says what tensor parallelism does to each block: kept in the file, printed, and told in the page's tips."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn

from merak_like.cli.decide import Question, decide
from merak_like.cli.models import Loaded
from merak_like.partitioner.hardware import hardware_named
from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.drawing import unit_tips
from merak_like.partitioner.report.page import page
from merak_like.partitioner.report.sharded import as_json, link_bytes, of_units, step_bytes
from merak_like.partitioner.report.sharding_table import render
from merak_like.partitioner.sharding import GroupBytes, ShardedBlock
from merak_like.partitioner.tensor_parallel import derive
from merak_like.partitioner.tracer.fine import fine_trace, steps
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
in a step of one replica 1.73 GB are summed over the ranks, 1.73 GB go over each rank's link

transformer.h.0 and 11 like it: transformer.h.1-11

 weight              dim  on the ranks
 ─────────────────────────────────────────────────────
 attn.c_attn.weight    1  768, 3 x 12/2 x 64
 attn.c_proj.weight    0  12/2 x 64, 768
 mlp.c_fc.weight       1  768, 3072/2
 mlp.norm.weight          whole: it meets something whole

90.0 % of 7.00 M matrix elements sharded, 17 values in parts
summed over 2 ranks: 12.0 MB forward and 6.00 MB backward a micro-batch, 3.07 kB of gradients a step
a step, each: 144 MB summed, 144 MB over a rank's link
operations without a rule: sinc (2)
probe: 3e-16, tiny

outside of blocks

 weight                  dim  on the ranks
 ──────────────────────────────────────────
 transformer.wte.weight    0  50304/2, 768

90.0 % of 7.00 M matrix elements sharded, 17 values in parts
summed over 2 ranks: 1.00 kB forward and 0 B backward a micro-batch
a step: 8.00 kB summed, 8.00 kB over a rank's link
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
    assert found["link_bytes"] == found["step_bytes"], "two ranks send each number once"
    assert found["blocks"][0]["share"] == pytest.approx(0.9)


def test_bytes_over_a_link_count_the_ring_and_what_is_gathered_again() -> None:
    four = replace(ATTENTION, groups=(GroupBytes(4, 1, 12_000_000, 6_000_000, 3_072),))
    assert link_bytes(PLAN, four) == 1.5 * (8 * 18_000_000 + 3_072)
    assert link_bytes(replace(PLAN, sequence_parallel=True), four) == 1.5 * (8 * 21_000_000 + 3_072)


def test_units_have_their_own_weights_and_those_of_equal_blocks_too() -> None:
    units = {unit.name: found for unit, found in zip(PLAN.units, of_units(PLAN), strict=True)}
    assert units[f"{BLOCK}.7.attn"][0] == {"c_attn.weight": "768, 3 x 12/2 x 64", "c_proj.weight": "12/2 x 64, 768"}
    assert units[f"{BLOCK}.7.mlp"] == ({"c_fc.weight": "768, 3072/2"}, {"norm.weight": "it meets something whole"})
    assert units["transformer.wte"][0] == {"weight": "50304/2, 768"}
    tips = {tip["name"]: tip["rows"] for tip in unit_tips(PLAN)}
    assert ["sharded", "c_fc.weight: 768, 3072/2"] in tips[f"{BLOCK}.3.mlp"]  # type: ignore[operator]
    assert ["on every rank", "norm.weight: it meets something whole"] in tips[f"{BLOCK}.3.mlp"]  # type: ignore[operator]


class Reader(HTMLParser):
    """The classes of each unit in the page, and every address that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.units: dict[int, set[str]] = {}
        self.options, self.addresses = list[str](), list[str]()
        self.feed(text)
        self.close()
        self.addresses += re.findall(r"url\(|@import|\b(?:https?|ftp|wss?)://[^\s\"'<]*", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "data-unit" in given:
            self.units[int(given["data-unit"])] = {*given["class"].split()}
        if tag == "option":
            self.options.append(given["value"])
        self.addresses += [given[name] for name in ("src", "href", "xlink:href", "srcset", "action") if name in given]


LIES = {"divided", "partly", "whole"}


def test_the_page_is_coloured_by_it() -> None:
    assert "tensor parallelism" in Reader(page(PLAN)).options
    assert "tensor parallelism" not in Reader(page(make_plan())).options
    lies = [classes & LIES for _, classes in sorted(Reader(page(PLAN)).units.items())]
    assert lies[:3] == [{"divided"}, {"divided"}, {"partly"}]
    assert lies[-2:] == [set(), {"divided"}], "the head has the table of words under another name"
    assert not any(classes & LIES for classes in Reader(page(make_plan())).units.values())


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


@pytest.fixture(scope="module")
def decided() -> Plan:
    asked = Question(Gpt(), hardware_named("a100-80gb"), dp=1, pp=2, tp=2, batch=8, micro_batch=2)  # type: ignore[arg-type]
    return decide(asked)[0]


def test_each_unit_of_the_page_has_the_colour_of_what_is_derived_for_its_weights(decided: Plan) -> None:
    loaded = Gpt().load(2)
    traced = fine_trace(loaded.model, loaded.example)
    derived = derive(traced.graph, steps(traced), 2, constants=traced.constants)
    read = Reader(page(decided))
    assert read.units.keys() == set(range(len(decided.units)))
    modules, seen = dict(loaded.model.named_modules()), list[set[str]]()
    for index, unit in enumerate(decided.units):
        module = modules.get(re.sub(r" \(\d+/\d+\)$", "", unit.name), nn.Module())  # the batch has none
        own = {f"{unit.name}.{name}" for name, _ in module.named_parameters()}
        first = {traced.graph.canonical.get(name, name) for name in own}
        divided = first & derived.weights.keys()
        wanted = {"divided"} if own and divided == first else {"partly"} if divided else {"whole"} if own else set()
        assert read.units[index] & LIES == wanted, unit.name
        seen.append(wanted)
    assert [kind for kind in sorted(LIES) if {kind} not in seen] == []


def test_the_page_of_a_real_plan_names_nothing_outside_of_it(decided: Plan) -> None:
    found = Reader(page(decided)).addresses
    assert [each for each in found if not each.startswith("data:image/svg+xml;base64,")] == []
    assert found, "the step over time is a picture in the page"


def test_the_command_derives_and_proves(decided: Plan) -> None:
    plan = decided
    first, outside = plan.sharding
    assert first.like == ("transformer.h.1",)
    assert first.weights["transformer.h.0.attn.c_attn.weight"] == "32, 3 x 4/2 x 8"
    assert (first.probe, outside.probe) == ("tiny", "tiny")
    assert max(first.error, outside.error) < 1e-8
    residual = 2 * 16 * 32 * 4
    assert first.groups == (GroupBytes(2, 1, 2 * residual, 2 * residual, 0),)
    whole = sum(4 * p.numel() for p in Gpt().load(1).model.parameters())
    assert sum(stage.memory.weights for stage in plan.stages) < 0.6 * whole  # the tied table is on both stages
