"""What a plan says to people: numbers, tables, the summary, and where things stand in the picture."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from rich.console import Console

from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Crossing, Plan
from merak_like.partitioner.report import summary, text
from merak_like.partitioner.report.drawing import shortened
from merak_like.partitioner.report.layout import arrange
from merak_like.partitioner.report.page import page
from merak_like.partitioner.report.routing import Box, pack
from merak_like.partitioner.report.table import MAX_CROSSINGS, render
from tests.plans import GB, make_plan

PLANS = {
    "4 stages": make_plan(),
    "1 stage": make_plan(pp=1),
    "a hub read by all": make_plan(blocks=20, pp=3, hub=True),
    "80 blocks on 8 stages": make_plan(blocks=80, pp=8, hub=True),
    "80 blocks on 1 stage": make_plan(blocks=80, pp=1, hub=True),
    "no units": replace(make_plan(), units=()),
    "16 stages": make_plan(blocks=16, pp=16),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def printed(plan: Plan, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(plan))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1.00 MB"), (12_345_678, "12.3 MB"), (8e10, "80.0 GB"),
     (128_849_018_880, "129 GB"), (3.2e12, "3.20 TB")],
)  # fmt: skip
def test_bytes_have_three_digits_and_decimal_units(nbytes: float, said: str):
    assert text.bytes_text(nbytes) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.2e-5, "42.0 µs"), (3e-9, "3.00 ns"), (1e-12, "<1 ns"),
     (float("inf"), "unknown"), (float("nan"), "unknown")],
)  # fmt: skip
def test_seconds_find_their_unit(seconds: float, said: str):
    assert text.seconds_text(seconds) == said


def test_other_amounts():
    assert text.flops_text(1.234e12) == "1.23 TFLOP"
    assert text.count_text(124_439_808) == "124 M"
    assert text.count_text(7) == "7"
    assert [text.percent_text(f) for f in (0, 1e-5, 0.123, 0.9999, 1.5)] == [
        "0.0 %",
        "<0.1 %",
        "12.3 %",
        "100 %",
        "150 %",
    ]
    assert text.shape_text((8, 512), "bfloat16") == "8 x 512 bf16"
    assert text.shape_text((), "float32") == "scalar f32"
    assert [text.dtype_text(d) for d in ("int64", "bool", "float8_e4m3fn")] == ["i64", "bool", "float8_e4m3fn"]


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [("40GB", 40 * GB), ("40 gb", 40 * GB), ("40g", 40 * GB), ("16GiB", 16 * 2**30), ("1.5 MB", 1_500_000),
     ("80_000_000_000", 80 * GB), ("512", 512), ("512 B", 512), (" 2TiB ", 2 * 2**40)],
)  # fmt: skip
def test_sizes_are_read_kindly(written: str, nbytes: int):
    assert text.parse_bytes(written) == nbytes


@pytest.mark.parametrize("written", ["", "GB", "-4GB", "0", "0.0GB", "4 XB", "40GBs", "4e9", "nan"])
def test_what_is_no_size_is_refused_with_an_example(written: str):
    with pytest.raises(ValueError, match="such as 40GB"):
        text.parse_bytes(written)


def test_numbered_siblings_become_ranges():
    assert text.ranges(["wte", "h.0", "h.1", "h.2", "ln_f"]) == ("wte", "h.0-2", "ln_f")
    assert text.ranges(["h.3", "h.5", "h.6", "g.7"]) == ("h.3", "h.5-6", "g.7")
    assert text.ranges(["0", "1", "2", "4"]) == ("0-2", "4")
    assert text.ranges(["h.1", "h.1"]) == ("h.1",)
    assert text.ranges([]) == ()


def test_the_common_prefix_is_that_of_most_names():
    assert text.common_prefix(["m.a", "m.b", "m.c.d", "lm_head"]) == "m."
    assert text.common_prefix(["encoder.a", "encoder.b", "decoder.a", "decoder.b"]) == ""
    assert text.common_prefix(["0.a", "0.b"]) == ""
    assert text.common_prefix([]) == ""


def test_a_bar_keeps_its_width():
    assert text.bar(0.5, 4) == "██  "
    assert [len(text.bar(f, 6)) for f in (-1, 0, 0.01, 0.33, 0.999, 1, 7)] == [6] * 7


def test_a_cut_counts_each_value_live_across_it_once():
    """x: stage 0 -> 1, y: stage 0 -> 2: y crosses both cuts, and its stage sends it once."""
    x = Crossing("x", (1,), "float32", 4, 0, (1,), True)
    y = Crossing("y", (2,), "float32", 8, 0, (2,), True)
    plan = make_plan(pp=3, crossings=(x, y))
    assert [(c.after, c.nbytes, [v.value for v in c.crossings]) for c in summary.cuts(plan)] == [
        (0, 12, ["x", "y"]), (1, 8, ["y"])
    ]  # fmt: skip
    assert [summary.sent_bytes(plan, s) for s in range(3)] == [12, 0, 0]
    assert [summary.received_bytes(plan, s) for s in range(3)] == [0, 4, 8]


def test_a_stage_holds_the_blocks_with_parameters():
    plan = make_plan(pp=2)
    first = replace(plan.stages[0], blocks=("inputs", "h.1", "head"), params=("h.1.mlp.weight", "wte.weight"))
    tied = replace(plan, stages=(first, plan.stages[1]), ties=(("wte.weight", "head.weight"),))
    assert summary.holds(tied, first) == ("h.1", "head")
    bare = replace(first, params=())
    assert summary.holds(tied, bare) == bare.blocks


@every_plan
def test_the_tables_name_everything(plan: Plan):
    said = printed(plan)
    for part in (plan.model, str(plan.mesh), plan.schedule, plan.hardware, plan.digest[:12], *plan.notes):
        assert part in said
    for stage in plan.stages:
        assert text.flops_text(stage.flops).removesuffix("FLOP") in said
        assert f"{stage.memory.total / GB:.2f}" in said
    for crossing in plan.crossings[:MAX_CROSSINGS]:
        assert crossing.value in said
        assert text.shape_text(crossing.shape, crossing.dtype) in said
    assert "transformer.wte.weight = lm_head.weight" in said


@every_plan
def test_the_tables_fit_80_columns(plan: Plan):
    said = printed(plan, 80)
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said


def in_a_v(plan: Plan) -> Plan:
    """The stages of four ranks on two, with an order of their own."""
    stages = tuple(replace(s, rank=rank) for s, rank in zip(plan.stages, (0, 1, 1, 0), strict=True))
    held = [s.memory.live for s in stages]
    return replace(
        plan,
        mesh=Mesh(1, 2),
        stages=stages,
        schedule="auto-v",
        rank_activation_bytes=(held[0] + held[3] - 1, held[1] + held[2] - 1),
        orders=(" ".join(f"F{i}.0" for i in range(40)), "F0.1 W0.1"),
    )


def test_what_is_computed_again_is_shown():
    plan = make_plan()
    said, drawn = printed(plan), page(plan)
    assert re.search(r"forward +backward +again +balance", said)
    assert "stage 0, 4 of 7 units: transformer.wte" in said
    assert "recomputes 4 of 7 units" in drawn
    assert drawn.count('class="unit s0 again"') == 4
    assert drawn.count(', computed again"') == 2 * 4, "on the box and in its tip"
    kept = replace(plan, stages=tuple(replace(s, recompute=()) for s in plan.stages))
    assert "again" not in printed(kept)
    assert 'class="unit s0 again"' not in page(kept)


def test_ranks_of_several_stages_are_shown_with_what_they_hold_together():
    plan = in_a_v(make_plan())
    assert list(plan.rank_bytes) == [
        plan.stages[a].memory.total + plan.stages[b].memory.total - 1 for a, b in ((0, 3), (1, 2))
    ]
    said = printed(plan)
    assert re.search(r"stage +rank +holds", said)
    for rank, total in enumerate(plan.rank_bytes):
        assert re.search(rf"rank {rank} .*{total / GB:.2f}", said)
    assert "rank 0: F0.0 F1.0" in said
    assert "and 10 more" in said
    assert "rank 1: F0.1 W0.1" in said
    assert "Stage 2 on rank 1" in page(plan)
    assert not re.search(r"stage +rank +holds", printed(make_plan()))
    data = summary.as_json(plan)
    assert data["rank_bytes"] == plan.rank_bytes
    assert data["orders"] == plan.orders
    tight = replace(plan, memory_limit=max(plan.rank_bytes) - 1)
    assert not summary.fits(tight)
    assert "OVER" in printed(tight)


def test_too_much_memory_is_marked():
    assert "OVER" in printed(make_plan(memory_limit=GB))
    assert "OVER" not in printed(make_plan())
    assert summary.fits(make_plan())
    assert not summary.fits(make_plan(memory_limit=GB))


def test_markup_in_names_is_printed_as_it_is():
    plan = make_plan(model="[red]Net[/red]", notes=("a [bold]note",))
    assert "[red]Net[/red]" in printed(plan)
    assert "a [bold]note" in printed(plan)


@every_plan
def test_the_summary_is_json_with_the_totals(plan: Plan):
    data = json.loads(json.dumps(summary.as_json(plan)))
    assert data["digest"] == plan.digest
    assert len(data["stages"]) == len(plan.stages)
    assert max(stage["share_of_slowest"] for stage in data["stages"]) == 1
    for stage, found in zip(plan.stages, data["stages"], strict=True):
        assert found["memory"]["total"] == stage.memory.total


def overlap(a: Box, b: Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


@every_plan
def test_boxes_stand_in_their_panels_and_apart(plan: Plan):
    scene = arrange(plan)
    assert [box.index for box in scene.units] == list(range(len(plan.units)))
    assert [panel.index for panel in scene.panels] == list(range(len(plan.stages)))
    assert not any(overlap(a, b) for a, b in combinations(scene.units, 2))
    assert not any(overlap(a, b) for a, b in combinations(scene.panels, 2))
    for box, unit in zip(scene.units, plan.units, strict=True):
        panel = scene.panels[unit.stage]
        assert panel.x < box.x
        assert box.x + box.width < panel.x + panel.width <= scene.width
        assert panel.y < box.y
        assert box.y + box.height < panel.y + panel.height <= scene.height


@every_plan
def test_values_are_listed_on_their_cut_and_apart(plan: Plan):
    scene = arrange(plan)
    assert [card.index for card in scene.cards] == [gap.index for gap in scene.gaps] == [*range(len(plan.stages) - 1)]
    for gap, card in zip(scene.gaps, scene.cards, strict=True):
        assert gap.x < card.x < card.x + card.width < gap.x + gap.width <= scene.width
        assert gap.y < card.y < card.y + card.height < gap.y + gap.height <= scene.height
    assert not any(overlap(card, panel) for card in scene.cards for panel in scene.panels)


def test_many_values_on_a_cut_make_room_on_their_shelf():
    values = tuple(Crossing(f"v{i}", (2,), "float32", 8, 0, (1,), True) for i in range(30))
    plan = make_plan(blocks=2, pp=2, crossings=values)
    test_values_are_listed_on_their_cut_and_apart(plan)
    assert "and 24 more" in page(plan)


@every_plan
def test_every_read_has_a_line_that_ends_at_the_reader(plan: Plan):
    scene = arrange(plan)
    drawn = {(edge.source, target) for edge in scene.edges for target in edge.targets}
    assert drawn == {(read, index) for index, unit in enumerate(plan.units) for read in unit.reads}
    for edge in scene.edges:
        for target, (x, y, down) in zip(edge.targets, edge.tips, strict=True):
            box = scene.units[target]
            assert y == box.y if down else x == box.x
            assert box.x <= x <= box.x + box.width
            assert box.y <= y <= box.y + box.height


@every_plan
def test_lines_run_beside_boxes_never_through_them(plan: Plan):
    scene = arrange(plan)
    for edge in scene.edges:
        verticals: list[tuple[float, float, float]] = []
        for part in edge.path.split("M")[1:]:
            points = [(float(a), float(b)) for a, b in re.findall(r"(?:^|[LQ ])(-?[\d.]+) (-?[\d.]+)", part)]
            verticals += [(x, min(y, v), max(y, v)) for (x, y), (u, v) in pairwise(points) if x == u]
        ends = {edge.source, *edge.targets}
        for x, low, high in verticals:
            for box in scene.units:
                inside = box.x < x < box.x + box.width and low < box.y + box.height and box.y < high
                assert not inside or box.index in ends


def test_spans_share_a_track_only_when_apart():
    assert pack([(0, 5), (6, 9), (5, 7), None]) == [0, 0, 1, -1]
    assert pack([]) == []


def test_many_units_stay_a_picture_not_a_ribbon():
    scene = arrange(PLANS["80 blocks on 1 stage"])
    assert scene.height < 1400
    assert scene.width < 2000


def test_long_names_lose_their_middle():
    assert shortened("short", 9) == "short"
    assert shortened("encoder.block.17.attention", 13) == "encode…ention"


def test_the_page_escapes_what_the_plan_says():
    evil = "</script><img src=x onerror=alert(1)>&\"'"
    plan = make_plan(model=evil, hardware=evil, notes=(evil,), signature={evil: evil}, ties=((evil, "b"),))
    plan = replace(
        plan,
        units=tuple(replace(u, name=evil + str(i), type=evil, block=evil) for i, u in enumerate(plan.units)),
        stages=tuple(replace(s, blocks=(evil,), recompute=(evil,)) for s in plan.stages),
        crossings=tuple(replace(c, value=evil, dtype=evil) for c in plan.crossings),
    )
    html = page(plan)
    assert html.count("<img") == html.count('<img alt="the simulated step') == 1
    assert html.count("</script>") == 2


@every_plan
def test_the_page_asks_for_nothing_from_outside(plan: Plan):
    html = page(plan)
    asking = r"https?:|//[a-z]|url\(|@import|<link|<iframe|src=(?!.data:image/svg)|fetch\(|XMLHttp|WebSocket"
    assert not re.search(asking, html)
    assert "default-src 'none'" in html
    for unit in plan.units:
        assert unit.name in html
