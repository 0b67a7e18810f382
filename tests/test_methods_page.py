"""The page about methods: what it says was measured is in the benchmark's table, and links lead somewhere."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
TABLE = (ROOT / "benchmarks/methods/README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e-\d+)?")


def cells(text: str) -> list[list[str]]:
    """Rows of tables, without backticks."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line] for line in lines]


def numbers(text: str) -> list[str]:
    return [found.replace(",", "") for found in NUMBER.findall(text)]


def measured() -> dict[str, list[float]]:
    """All numbers that the benchmark has of each method."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, *rest in cells(TABLE):
        found[name] += [float(n) for cell in rest for n in numbers(cell)]
    return found


SAID = {
    row[0]: row[1] for row in cells(PAGE.partition("## What was measured")[2].partition("\n## ")[0]) if len(row) == 2
}
HEADS = ("method", "---")


@pytest.mark.parametrize("name", [name for name in SAID if name not in HEADS])
def test_each_number_is_one_of_the_table(name: str):
    """Rounded as the page rounds it; bytes may be said in kilobytes."""
    known = measured()[name]
    for told in numbers(SAID[name]):
        half = 0.5000001 * 10.0 ** -len(told.partition(".")[2])
        assert any(abs(n / unit - float(told)) <= half for n in known for unit in (1, 1000)), f"{told} was not measured"


def test_every_measured_method_is_on_the_page():
    titles = {row[0] for row in cells(TABLE) if len(row) == 5} - set(HEADS)
    assert len(titles) > 10
    assert titles == set(SAID) - set(HEADS)


def test_a_number_that_nobody_measured_is_found():
    assert numbers("0.22 of 1,240 MB, two-20, v2") == ["0.22", "1240"]
    assert measured()["Compiled"]


def test_links_lead_somewhere():
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGE, flags=re.DOTALL)
    assert [link for link in re.findall(r"\]\(([^)#:]+)[)#]", prose) if not (ROOT / "docs" / link).exists()] == []
