"""The command line as a stranger types it: what comes out, how fast, and how it says no."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from merak_like.cli import main
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Crossing, Plan, StageMemory, StagePlan, Unit
from tests.commands import refused, run
from tests.plans import make_plan

MERAK = [sys.executable, "-m", "merak_like.cli"]
ROOT = Path(__file__).resolve().parents[1]

TOY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(6)])
    def forward(self, x):
        return self.layers(x)

def build():
    return Net(), torch.ones(4, 16), lambda out, batch: out.square().mean()

def no_tuple():
    return Net()

def no_loss():
    return Net(), torch.ones(4, 16), "mse"

def broken():
    raise KeyError("weights.pt")

number = 3
"""


@pytest.fixture
def gpt2(folder: Path) -> Path:
    """A small GPT-2 as its config.json, beside it a model of one's own."""
    sizes = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "vocab_size": 100}
    (folder / "gpt2").mkdir()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **sizes}
    (folder / "gpt2/config.json").write_text(json.dumps(config))
    (folder / "toy_for_merak.py").write_text(TOY)
    sys.modules.pop("toy_for_merak", None)
    return folder / "gpt2"


def test_version_and_help(capsys: pytest.CaptureFixture[str]):
    assert run(capsys, "--version").startswith("merak 0.")
    assert "plan" in run(capsys)
    for command in ("plan", "show", "html"):
        assert command in run(capsys, "--help")
        assert "--help" in run(capsys, command, "--help")


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["show", "plan.json"], ["show", "plan.json", "--json"]]
)
def test_reading_starts_without_torch_in_half_a_second(folder: Path, arguments: list[str]):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from merak_like.cli import main\n"
        f"try: main({arguments!r})\n"
        "finally: print(*(name for name in ('torch', 'numpy', 'transformers') if name in sys.modules), file=sys.stderr)"
    )
    took: list[float] = []  # of the CPU: a busy machine must not fail this
    for _ in range(5):
        begin = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        end = os.times()
        took.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
        assert done.stderr.strip() == ""
        assert done.stdout
        if took[-1] < 0.5:
            break
    assert min(took) < 0.5, f"best of {len(took)} runs"


def test_html_is_written_without_torch(folder: Path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from merak_like.cli import main\n"
        "try: main(['html', 'plan.json'])\nfinally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (folder / "plan.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_show_prints_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "show", "plan.json")
    for part in ("GPT2LMHeadModel", "Stages", "Memory", "attention_mask", "Why", "Tied weights"):
        assert part in out
    assert run(capsys, "show", str(folder)) == out


def test_show_json_is_for_scripts(folder: Path, capsys: pytest.CaptureFixture[str]):
    data = json.loads(run(capsys, "show", "plan.json", "--json"))
    assert data["digest"] == Plan.load("plan.json").digest
    assert data["fits"] is True


def test_show_survives_an_ascii_terminal(folder: Path):
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*MERAK, "show", "plan.json"], env=environment, capture_output=True, check=True)
    assert b"GPT2LMHeadModel" in done.stdout
    assert done.stderr == b""


def test_show_stops_quietly_with_its_reader(folder: Path):
    show = subprocess.Popen(
        [*MERAK, "show", "plan.json", "--json"],
        cwd=folder, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert show.stdout is not None
    assert show.stderr is not None
    show.stdout.close()
    assert show.stderr.read() == b""
    show.wait()


def test_an_edited_plan_is_refused_unless_meant(folder: Path, capsys: pytest.CaptureFixture[str]):
    Path("plan.json").write_text(Path("plan.json").read_text().replace('"a100-80gb"', '"h100"'))
    assert "--edited" in refused(capsys, "show", "plan.json")
    assert "h100" in run(capsys, "show", "plan.json", "--edited")


def test_what_is_no_plan_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert "but there is 'plan.json'" in refused(capsys, "show", "plam.json")
    assert "perhaps 'show'" in refused(capsys, "shwo", "plan.json")
    assert "--json" in refused(capsys, "show", "--jsn", "plan.json")
    assert "merak show --help" in refused(capsys, "show")
    for content in (
        b"{",
        b"[]",
        b"{}",
        b'{"version": 9, "stages": []}',
        b"\xff\xfe\x00",
        b'{"version": 1, "stages": 3}',
    ):
        Path("other.json").write_bytes(content)
        assert "other.json" in refused(capsys, "show", "other.json")
    assert "folder" in refused(capsys, "html", "plan.json", "-o", ".")


def test_html_names_the_file_it_wrote(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert "wrote" in run(capsys, "html", "plan.json", "-o", "new/deep/page.html")
    assert "GPT2LMHeadModel" in Path("new/deep/page.html").read_text(encoding="utf-8")


def test_plan_a_config_and_show_it(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    out = run(capsys, "plan", "gpt2", "--pp", "2", "--batch", "8", "--micro-batches", "4", "--memory", "2GB")
    assert "GPT2LMHeadModel on dp=1 x pp=2 x tp=1" in out
    assert "merak show plan.json" in out
    plan = Plan.load("plan.json")
    assert (len(plan.stages), plan.micro_batches, plan.micro_batch) == (2, 4, 2)
    assert plan.memory_limit == 2_000_000_000
    assert plan.signature == {"input_ids": "int64[2, 64]", "labels": "int64[2, 64]"}
    assert run(capsys, "show", "plan.json") in out


def test_plan_json_prints_the_plan_and_writes_only_when_asked(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    Path("plan.json").unlink()
    asked = ("plan", "gpt2", "--pp", "2", "--batch", "4", "--micro-batch", "1", "--json")
    printed = Plan.from_json(run(capsys, *asked))
    assert not Path("plan.json").exists()
    assert Plan.from_json(run(capsys, *asked, "-o", "p.json")) == Plan.load("p.json") == printed


def test_plan_traces_at_the_micro_batch_it_chose(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    plan = Plan.from_json(run(capsys, "plan", "gpt2", "--pp", "2", "--batch", "64", "--seq", "16", "--json"))
    assert plan.signature["input_ids"] == f"int64[{plan.micro_batch}, 16]"
    assert not any("costs are scaled" in note for note in plan.notes)


def test_plan_a_function_of_ones_own(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    plan = Plan.from_json(run(capsys, "plan", "toy_for_merak:build", "--pp", "3", "--batch", "12", "--json"))
    assert plan.model == "Net"
    assert len(plan.stages) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt3"], "no model 'gpt3'"),
        (["meta-llama/Llama-3-8B"], "nothing is downloaded"),
        (["."], "in its folders gpt2"),
        (["gpt2", "--dp", "0"], "dp=0 is not a degree"),
        (["gpt2", "--pp", "two"], "pp=two is not a degree"),
        (["gpt2", "--memory", "lots"], "such as 40GB"),
        (["gpt2", "--hardware", "a1000"], "a100"),
        (["gpt2", "--hardware", "mine.json"], "there is no hardware file"),
        (["gpt2", "--schedule", "1f1c"], "1f1b"),
        (["gpt2", "--pp", "500"], "pp = 500"),
        (["gpt2", "--seq", "65"], "positions for 1 to 64"),
        (["gpt2", "--task", "causal"], "perhaps 'causal-lm'"),
        (["gpt2", "--task", "seq2seq-lm"], "use task causal-lm"),
        (["gpt2", "--dtype", "int8"], "not a dtype of weights"),
        (["gpt2", "--batch", "7", "--micro-batches", "2"], "use batch 6 or 8"),
        (["gpt2", "--batch", "0"], "batch"),
        (["gpt2", "-o", "gpt2"], "it is a folder"),
        (["toy_for_merak:bild"], "it has build"),
        (["toy_for_merak:number"], "it has build"),
        (["toy_for_merak:no_tuple"], "must return (model, example)"),
        (["toy_for_merak:no_loss"], "not a function"),
        (["toy_for_merak:broken"], "KeyError"),
        (["toy_for_merak:build", "--seq", "8"], "--seq 8 has no meaning"),
        (["toi_for_merak:build"], "cannot import 'toi_for_merak'"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    gpt2: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    assert said in refused(capsys, "plan", *arguments)
    assert Plan.load("plan.json") == make_plan()  # nothing was overwritten


def test_hardware_of_ones_own(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    from merak_like.partitioner.cost import hardware_named

    figures = json.loads(hardware_named("h100").to_json()) | {"name": "ours"}
    Path("mine.json").write_text(json.dumps(figures))
    plan = Plan.from_json(run(capsys, "plan", "gpt2", "--hardware", "mine.json", "--json"))
    assert plan.hardware == "ours"
    Path("mine.json").write_text("{}")
    assert "mine.json" in refused(capsys, "plan", "gpt2", "--hardware", "mine.json")


def test_debug_shows_where(folder: Path):
    with pytest.raises(ValueError, match="there is no plan"):
        main(["--debug", "show", "nowhere.json"])


def test_schedule_chunks_and_recompute_are_options(gpt2: Path, capsys: pytest.CaptureFixture[str]):
    few = ("plan", str(gpt2), "--pp", "2", "--batch", "8", "--seq", "16", "--json")
    plan = Plan.from_json(run(capsys, *few, "--schedule", "interleaved", "--chunks", "1", "--recompute", "full"))
    assert plan.stage_rank == (0, 1)
    assert all(stage.recompute for stage in plan.stages)
    assert Plan.from_json(run(capsys, *few, "--schedule", "auto")).orders
    assert "chunks = 3 has no meaning for schedule '1f1b'" in refused(capsys, *few, "--chunks", "3")
    assert "unknown recompute 'some'" in refused(capsys, *few, "--recompute", "some")


def test_the_page_about_plans_names_every_field_and_option(capsys: pytest.CaptureFixture[str]):
    told = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    names = {field.name for kind in (Plan, StagePlan, StageMemory, Crossing, Unit, Mesh) for field in fields(kind)}
    names |= {option for option in re.findall(r"--[a-z-]+", run(capsys, "plan", "--help")) if option != "--help"}
    assert [name for name in sorted(names) if f"`{name}`" not in told] == []
