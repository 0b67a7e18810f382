"""The example that people copy does what it says, in a few steps: it trains, writes its files and judges itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def example(runs: Path, ranks: int, *asked: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launch, "examples/train_gpt2.py", "--runs", str(runs), "--device", "cpu", *asked],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_example_trains_writes_its_files_and_judges_itself(tmp_path: Path) -> None:
    run = example(tmp_path, 4, "--dp", "2", "--pp", "2", "--steps", "5")
    folder = tmp_path / "gpt2"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    valid = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert steps[0].keys() == {"step", "loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert valid[-1] < valid[0] < steps[0]["loss"] + 0.1

    # Five steps do not suffice, and it says so.
    assert run.returncode == 1, run.stderr[-3000:]
    assert f"a validation loss of {valid[-1]:.3f} is not clearly below the unigram entropy 6." in run.stderr
    assert "Stages (one micro-batch)" in run.stdout
    assert "the checkpoint, loaded by from_pretrained, writes" in run.stdout

    assert Plan.load(folder / "plan.json").mesh == Mesh(dp=2, pp=2)
    assert (folder / "plan.html").read_text().startswith("<!doctype html>")
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "checkpoint").parameters()) > 2e6
    words = "Return a new list"
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words

    # One process, with the text of the run before, starts from the same weights and sees the same batches.
    alone = example(tmp_path, 1, "--steps", "5")
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert alone.returncode == 1, alone.stderr[-3000:]
    for before, after in zip(lines, again, strict=True):
        for name in before.keys() - {"tokens_per_second"}:
            assert after[name] == pytest.approx(before[name], rel=1e-4), (before["step"], name)
