"""The page in a real browser: all is there, pointing tells, searching finds, nothing fails, nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from merak_like.partitioner.plan import Plan
from merak_like.partitioner.report.page import page
from tests.plans import make_plan

pytestmark = pytest.mark.browser

QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
PLANS = {
    "4 stages": make_plan(),
    "1 stage": make_plan(pp=1),
    "161 units on 8 stages": make_plan(blocks=80, pp=8, hub=True),
    "no units": replace(make_plan(), units=()),
}


def browse(plan: Plan, folder: Path, script: str = "", *flags: str) -> tuple[str, list[str]]:
    """The page's DOM after a script has run in it, and what the browser's console said."""
    file = folder / "plan.html"
    errors = "addEventListener('error', e => document.body.dataset.error = e.message);"
    html = page(plan).replace("<main>", f"<script>{errors}</script><main>", 1)
    file.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    browser = shutil.which("chromium") or shutil.which("google-chrome") or ""
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={folder / 'profile'}",
         "--enable-logging=stderr", "--window-size=1600,1000", *flags, "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def point(selector: str) -> str:
    return (
        f"document.querySelector('{selector}').dispatchEvent(new MouseEvent('mouseenter', {{clientX: 9, clientY: 9}}));"
    )


def tip(dom: str) -> str:
    """The text of the tooltip, empty while it is hidden."""
    found = re.search(r'<div id="tip"([^>]*)>(.*?)</div>', dom, re.DOTALL)
    assert found
    return "" if "hidden" in found[1] else unescape(re.sub(r"<[^>]*>", " ", found[2]))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_all_units_are_drawn_and_the_console_is_silent(plan: Plan, tmp_path: Path):
    dom, console = browse(plan, tmp_path)
    assert console == []
    assert "data-error" not in dom
    assert len(re.findall(r'<g class="unit s\d', dom)) == len(plan.units)
    assert len(re.findall(r'<article class="card', dom)) == len(plan.stages)
    assert len(re.findall(r'<g class="cut"', dom)) == len(plan.stages) - 1
    assert tip(dom) == ""


def test_pointing_at_a_unit_tells_its_cost_and_shows_its_neighbours(tmp_path: Path):
    dom, console = browse(make_plan(), tmp_path, point("#unit-1"))
    assert console == []
    for part in (
        "transformer.h.0.attn",
        "GPT2Attention, stage 0",
        "6.00 GFLOP",
        "620 µs",
        "9.00 MB",
        "transformer.wte",
    ):
        assert part in tip(dom)
    near = re.findall(r'<g class="unit s\d(?: again)? near" id="unit-(\d+)"', dom)
    assert near == ["0", "1", "2"]


def test_the_keyboard_does_the_same(tmp_path: Path):
    focus = "document.getElementById('unit-1').focus();"
    assert "transformer.h.0.attn" in tip(browse(make_plan(), tmp_path, focus)[0])
    escape = focus + "dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}));"
    assert tip(browse(make_plan(), tmp_path, escape)[0]) == ""


def test_pointing_at_a_cut_lists_its_values(tmp_path: Path):
    said = tip(browse(make_plan(), tmp_path, point('[data-cut="1"]'))[0])
    for part in ("between stage 1 and stage 2", "8.39 MB in 2 values", "attention_mask", "8 x 1 x 512 x 512 bool"):
        assert part in said


def test_searching_finds_by_name_and_type(tmp_path: Path):
    search = (
        "const box = document.getElementById('seek'); box.value = 'h.1 mlp'; box.dispatchEvent(new Event('input'));"
    )
    script = search + "document.body.dataset.found = document.getElementById('found').value;"
    dom, _ = browse(make_plan(), tmp_path, script)
    assert re.findall(r'class="unit s\d found" id="unit-(\d+)"', dom) == ["4", "22", "24"]
    assert 'data-found="3 of 27"' in dom


def test_colours_and_zoom_answer(tmp_path: Path):
    script = (
        "const kind = document.getElementById('colour'); kind.value = 'time'; kind.dispatchEvent(new Event('change'));"
        "const wide = graph.getAttribute('width'); document.getElementById('in').click();"
        "document.body.dataset.grew = graph.getAttribute('width') > Number(wide);"
    )
    dom, console = browse(make_plan(), tmp_path, script)
    assert console == []
    assert 'class="heat"' in dom
    assert 'data-grew="true"' in dom
    assert dom.count("--heat:") == len(make_plan().units)


def test_names_cannot_become_markup(tmp_path: Path):
    evil = "</script><img src=x onerror=\"document.body.dataset.error='ran'\">"
    units = tuple(replace(unit, name=f"{evil}{index}") for index, unit in enumerate(make_plan().units))
    dom, console = browse(make_plan(units=units, model=evil), tmp_path, point("#unit-1"))
    assert console == []
    assert "data-error" not in dom
    assert evil in tip(dom)


def test_the_browser_itself_refuses_the_network(tmp_path: Path):
    script = "new Image().src = 'http://127.0.0.1:9/x'; fetch('http://127.0.0.1:9/y').catch(() => 0);"
    _, console = browse(make_plan(), tmp_path, script)
    assert len([line for line in console if "Content Security Policy" in line]) >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(scheme: str, tmp_path: Path):
    script = (
        "const seen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});"
        "const light = colour => { seen.clearRect(0, 0, 1, 1); seen.fillStyle = colour; seen.fillRect(0, 0, 1, 1);"
        "  const [r, g, b] = [...seen.getImageData(0, 0, 1, 1).data].map(c => (c / 255) ** 2.2);"
        "  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };"
        "const ratio = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));"
        "const css = (e, name) => getComputedStyle(e)[name];"
        "document.body.dataset.worst = Math.min(...[...document.querySelectorAll('.unit')].map(u =>"
        "  ratio(css(u.querySelector('text'), 'fill'), css(u.querySelector('.box'), 'fill'))),"
        "  ratio(css(document.body, 'color'), css(document.body, 'backgroundColor')),"
        "  ratio(css(document.querySelector('.lead'), 'color'), css(document.body, 'backgroundColor')));"
    )
    flag = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    dom, console = browse(make_plan(blocks=16, pp=8), tmp_path, script, flag)
    assert console == []
    worst = re.search(r'data-worst="([\d.]+)"', dom)
    assert worst
    assert float(worst[1]) > 4.5  # WCAG AA
