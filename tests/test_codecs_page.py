"""The page about codecs names them all, its code runs, and the benchmark's table is the one that was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from merak_like.runtime.codecs import CODECS
from merak_like.runtime.codecs.codec import HEADER

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/codecs.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?<!ranks -->\n)```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_of_the_page_for_one_process_runs(block: str):
    exec(block, {})


@pytest.mark.ranks
@pytest.mark.slow
def test_code_of_the_page_for_two_ranks_runs(tmp_path: Path):
    (block,) = re.findall(r"<!-- run with 2 ranks -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "two.py").write_text(block)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", CODECS)
def test_the_page_has_every_codec_with_its_arguments(name: str):
    taken = [field for field in fields(CODECS[name]) if field.init]  # type: ignore[arg-type]
    said = ", ".join(f"{f.name}={f.default!r}" for f in taken).replace(str(2**30), "2**30")
    assert f"`{name}({said})`" in PAGE if taken else f"`{name}`" in PAGE


def test_the_page_has_the_header():
    assert HEADER.size == 2 + 1 + 1 + 4 + 4 + 2 + 4
    assert all(f"| {row} |" in PAGE for row in ("2 + 1", "1", "4", "4 + 2"))


def test_links_lead_somewhere():
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGE, flags=re.DOTALL)
    assert [link for link in re.findall(r"\]\(([^)#]+)", prose) if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.parametrize("name", ["main", "sft"])
def test_the_tables_come_from_the_results(name: str):
    script = ROOT / f"benchmarks/codecs/{name}.py"
    run = subprocess.run([sys.executable, script, "--table", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}run python benchmarks/codecs/{name}.py --table"


def test_what_was_measured_keeps_what_was_promised():
    rows = json.loads((ROOT / "benchmarks/codecs/results.json").read_text(encoding="utf-8"))["rows"]
    assert rows["aqsgd(2)|int8"]["text"]["error"] <= rows["int2|int8"]["text"]["error"] / 3
    assert rows["aqsgd(2)|int8"]["wire"]["ratio"] >= 15
    assert rows["sign|int8"]["wire"]["ratio"] >= 31
    exact = rows["identity"]["digits"]["accuracy"]
    assert exact - rows["sign|int8"]["digits"]["accuracy"] <= 0.03
    assert exact - rows["c3sl(4)"]["digits"]["accuracy"] <= 0.025
