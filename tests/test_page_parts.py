"""The page's sections beside the units: ranks, cuts, the step over time, other choices and what was assumed."""

from __future__ import annotations

import re
from base64 import b64decode

from merak_like.partitioner.explain.why import why
from merak_like.partitioner.report.page import page
from merak_like.partitioner.report.page_parts import MOST_ACTIONS
from tests.explained import explained
from tests.plans import make_plan


def test_a_page_has_every_rank_every_cut_and_the_step_over_time():
    plan = make_plan()
    html = page(plan)
    for part in ("Memory of each rank", "Cuts", "The step over time", "What was assumed"):
        assert f"<h2>{part}</h2>" in html
    assert html.count("<span>rank ") == plan.mesh.pp
    assert all(f"<td>{cut}</td>" in html.replace(' class="number"', "") for cut in ("0|1", "1|2", "2|3"))
    assert "Other choices" not in html, "nothing was tried"


def test_the_step_over_time_is_a_picture_in_the_page():
    found = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', page(make_plan()))
    assert found is not None
    picture = b64decode(found[1]).decode()
    assert picture.startswith("<svg")
    assert picture.count("rank ") >= 4
    many = page(make_plan(micro_batches=MOST_ACTIONS))
    assert "data:image" not in many
    assert "are too many for this page" in many


def test_a_page_with_reasons_has_choices_and_what_they_cost():
    plan = explained(share=0.85)
    found = why(plan)
    html = page(plan, found)
    for part in ("Where the step goes", "Other choices", "Other degrees", "next best before"):
        assert part in html
    for choice in found.choices:
        assert f"<td>{choice.what}</td>" in html
    assert next(cut.instead for cut in found.next_cuts if cut.instead) in html


def test_every_figure_of_the_hardware_and_every_argument_is_told():
    html = page(explained(share=0.85))
    for figure in ("intra.bandwidth", "inter.latency", "efficiency", "source", "asked: batch", "asked: memory_limit"):
        assert f"<td>{figure}</td>" in html
    assert "<td>made up</td>" in html
