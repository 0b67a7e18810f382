"""benchmarks/gpu without a GPU: it says so and ends well, and its rows run on a CPU at a tiny size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False
    )


def test_without_a_gpu_it_says_so_and_ends_well():
    before = (FOLDER / "README.md").read_text()
    said = run(str(FOLDER / "main.py"))
    assert said.returncode == 0, said.stderr
    assert "there is no CUDA device here" in said.stdout
    assert (FOLDER / "README.md").read_text() == before


pytest.importorskip("transformers")
QUICK = ("memory_llama", "codecs")


@pytest.mark.parametrize("row", QUICK)
def test_a_row_runs_on_a_cpu(row: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import questions  # type: ignore[import-not-found]

    lines = questions.ROWS[row].ask(questions.TINY)
    assert lines
    assert all(len(line) == 3 and line[0] for line in lines)


@pytest.mark.slow
@pytest.mark.ranks
def test_every_row_runs_on_a_cpu():
    """Compiled ones too; the row of two ranks starts two, and their losses are those of one process."""
    said = run(str(FOLDER / "main.py"), "--dry-run")
    assert said.returncode == 0, said.stdout + said.stderr
    assert "not measured" not in said.stdout
    off = re.search(r"differ from one process by at most \| 1e-5 \| (\S+) \|", said.stdout)
    assert off is not None
    assert float(off[1]) <= 1e-5


def test_the_models_of_the_full_run_have_the_sizes_that_are_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import questions  # type: ignore[import-not-found]

    counts = {
        name: sum(p.numel() for p in questions.model_of(questions.FULL, name, "meta").parameters())
        for name in questions.FULL.models
    }
    assert counts["GPT-2 XL"] == 1_557_611_200
    assert 1.0e9 < counts["Llama 1B"] < 1.3e9
    assert next(questions.model_of(questions.FULL, "Llama 1B", "meta").parameters()).dtype == torch.bfloat16
