"""``merak train`` and what goes with it, as a stranger types them: what is left in the folder, and how it says no."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.plan import Plan
from merak_like.trainer.config import Run, every_key, load, to_yaml
from merak_like.trainer.report import chart, page, read_metrics
from tests.commands import refused, run

ROOT = Path(__file__).resolve().parents[1]
WORDS = "the a is of in to and cat dog sat ran mat hat red blue big small on under over".split()
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 24, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
BASE: dict[str, Any] = {
    "model": {"config": LLAMA},
    "data": {"train": "texts.jsonl", "tokenizer": "words", "seq": 16, "eval_share": 0.25},
    "training": {"steps": 6, "batch": 4},
    "parallelism": {"hardware": "a100-80gb", "device": "cpu"},
    "optimizer": {"lr": 0.01},
    "evaluation": {"every": 3},
    "logging": {"every": 2, "console": False},
    "folder": "out",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts, a tokenizer and a run's file."""
    monkeypatch.chdir(tmp_path)
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained("words")
    records = [
        {"text": " ".join(WORDS[(3 * i + j) % 20] for j in range(3 + i % 7)), "kind": ["no", "yes"][i % 2]}
        for i in range(40)
    ]
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    Path("run.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_resolved_file_is_the_same_run(here: Path) -> None:
    asked = load(
        Path("run.yaml"),
        [
            "optimizer.lr=1e-4",
            "parallelism.pp=2",
            "evaluation.every=",
            "checkpoints.best=true",
            "checkpoints.async=true",
        ],
    )
    assert asked.checkpoints.background
    assert (asked.optimizer.lr, asked.parallelism.pp, asked.evaluation.every, asked.checkpoints.best) == (
        1e-4,
        2,
        None,
        True,
    )
    Path("resolved.yaml").write_text(to_yaml(asked))
    assert load(Path("resolved.yaml")) == asked
    assert "parallelism.micro_batches" in every_key(Run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["optimzer.lr=1"], "no key 'optimzer', perhaps 'optimizer'"),
        (["optimizer.learning_rate=1"], "no key 'optimizer.learning_rate'"),
        (["lr=1"], "no key 'lr', perhaps 'optimizer.lr'"),
        (["training.epochs=2"], "say either training.steps or training.epochs"),
        (["training.batch=many"], "training.batch: Input should be a valid integer"),
        (["training.batch=0"], "training.batch: Input should be greater than or equal to 1, not 0"),
        (["optimizer.name=lion"], "optimizer.name: Input should be 'adamw', 'adam' or 'sgd', not 'lion'"),
        (["model.function=a:b"], "model.function makes the model itself"),
        (["data.function=a:b"], "say either data.train"),
        (["training.batch"], "'training.batch' is not key=value"),
        (["training.batch.size=1"], "batch is not a section but 4"),
        (["training.batch=0", "precision=fp8"], "precision: Input should be 'fp32', 'bf16', 'fp16' or 'autocast'"),
        (["parallelism.tp_shares=2"], "parallelism.tp_shares is about tensor-parallel ranks: say parallelism.tp=2"),
        (["parallelism.zero=3", "parallelism.tp=2"], "parallelism.zero=3 calls the model whole, which pp=1, tp=2 do"),
        (["parallelism.dp=auto", "parallelism.plan=p.json"], "parallelism.plan has its degrees"),
        (["checkpoints.asink=true"], "no key 'checkpoints.asink', perhaps 'checkpoints.async'"),
    ],
)
def test_wrong_keys_and_values_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], changes: list[str], words: str
):
    assert words in refused(capsys, "train", "run.yaml", *changes)


def test_a_file_that_is_not_there_or_not_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "perhaps 'run.yaml'" in refused(capsys, "train", "runs.yaml")
    Path("list.yaml").write_text("- a\n- b\n")
    assert "does not hold sections such as model: and data:, but a list" in refused(capsys, "train", "list.yaml")
    Path("bad.yaml").write_text("a: [1\n")
    assert "is not YAML" in refused(capsys, "train", "bad.yaml")


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_and_trains_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "train", "run.yaml", "parallelism.pp=2", "--dry-run")
    assert "run.yaml is in order: 2 ranks, 4 samples a step" in said
    assert Plan.load("out/plan.json").mesh == Mesh(pp=2)
    assert not Path("out/metrics.jsonl").exists()


def test_a_dry_run_is_of_the_run_that_was_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It planned without ZeRO, precision and methods: as much memory as a run without them would take."""

    def fullest(*changes: str) -> dict[str, int]:
        run(capsys, "train", "run.yaml", "--dry-run", "parallelism.micro_batches=1", "training.batch=8", *changes)
        return dict(Plan.load("out/plan.json").memory_bytes[0])

    plain, spread = fullest("parallelism.dp=2"), fullest("parallelism.dp=2", "parallelism.zero=1")
    assert spread["optimizer"] < 0.6 * plain["optimizer"]
    lowered = fullest("parallelism.dp=2", "precision=bf16")
    assert lowered["activations"] < 0.6 * plain["activations"]
    assert "no module has such a path" in refused(
        capsys, "train", "run.yaml", "--dry-run", "methods.offload.blocks=nothing"
    )


def test_a_run_from_texts_to_a_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "train", "run.yaml", "checkpoints.every=3", "training.steps=3")
    assert "3 steps in" in said
    at_its_end = AutoModelForCausalLM.from_pretrained("out/model").state_dict()
    shutil.rmtree("out/model")
    with pytest.MonkeyPatch.context() as patch:  # under torchrun it looked for a layout of one rank, and found two
        patch.setenv("WORLD_SIZE", "2")
        run(capsys, "export", "out", "-o", "early")  # from the checkpoint
        patch.setenv("RANK", "1")
        run(capsys, "export", "out", "-o", "of-rank-1")
        assert not Path("of-rank-1").exists()
    assert "3 steps in" in run(capsys, "train", "run.yaml", "checkpoints.every=3", "checkpoints.resume=true")
    left = {path.name for path in Path("out").iterdir()}
    written = {"config.resolved.yaml", "plan.json", "env.json", "metrics.jsonl", "checkpoints", "model", "report.html"}
    assert left == written | {"data"}
    assert load(Path("out/config.resolved.yaml")).checkpoints.every == 3
    assert json.loads(Path("out/env.json").read_text())["packages"]["torch"]
    lines = read_metrics(Path("out"))
    assert [line["step"] for line in lines if "loss" in line] == [2, 3, 4, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]

    assert "<svg" in Path("out/report.html").read_text(), "drawn at the end"
    assert "wrote" in run(capsys, "report", "out")
    html = Path("out/report.html").read_text()
    assert html == page(Path("out"))
    assert html.count("<polyline") >= 4
    assert "://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "LlamaForCausalLM" in html

    run(capsys, "export", "out", "-o", "exported", "--shard", "10KB")
    index = json.loads(Path("exported/model.safetensors.index.json").read_text())["weight_map"]
    model = AutoModelForCausalLM.from_pretrained("exported")
    assert set(index) == set(model.state_dict())  # no ghosts, and nothing missing
    assert AutoTokenizer.from_pretrained("exported").decode([3, 10]) == "the cat"
    assert "is already there" in refused(capsys, "export", "out", "-o", "exported")
    early = AutoModelForCausalLM.from_pretrained("early").state_dict()
    assert all(torch.equal(early[name], weight) for name, weight in at_its_end.items())
    assert all(not torch.equal(early[n], w) for n, w in model.state_dict().items() if "weight" in n)

    assert "nats per token, perplexity" in run(capsys, "perplexity", "out", "texts.jsonl", "--seq", "16")

    # A second run starts from these weights, each rank reading its own.
    again = {"model": {"path": "exported"}, "data": {"train": "texts.jsonl", "seq": 16}}
    Path("again.yaml").write_text(yaml.safe_dump(BASE | again | {"evaluation": {}, "folder": "more"}))
    run(capsys, "train", "again.yaml", "--max-steps", "1", "optimizer.lr=0")
    assert read_metrics(Path("more"))[0]["loss"] < next(line["loss"] for line in lines if "loss" in line)


def test_a_classifier_learns_classes_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = {
        "model_type": "bert", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    change = {"model": {"config": bert}, "data": BASE["data"] | {"label": "kind"}}
    Path("run.yaml").write_text(yaml.safe_dump(BASE | change))
    run(capsys, "train", "run.yaml")
    model = AutoModelForSequenceClassification.from_pretrained("out/model")
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert [0 <= line["eval_accuracy"] <= 1 for line in read_metrics(Path("out")) if "eval_loss" in line] == [
        True,
        True,
    ]


def test_lora_trains_additions_and_the_export_has_them_merged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "train", "run.yaml", "--max-steps", "1", "folder=base", "data.eval_share=0", "evaluation.every=")
    run(capsys, "export", "base", "-o", "pretrained")
    tuned = {
        "model": {"path": "pretrained"},
        "lora": {"r": 4},
        "folder": "tuned",
        "optimizer": {"lr": 0.05},
        "checkpoints": {"best": True},
    }
    Path("tune.yaml").write_text(yaml.safe_dump(BASE | tuned))
    run(capsys, "train", "tune.yaml")
    assert {path.name for path in Path("tuned/model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    run(capsys, "export", "tuned", "-o", "merged")
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    base = AutoModelForCausalLM.from_pretrained("pretrained").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("pretrained"), "tuned/model").eval()
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
        assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-2
    assert not [name for name in merged.state_dict() if "lora" in name]
    assert "perplexity" in run(capsys, "perplexity", "merged", "texts.jsonl", "--seq", "16")


@pytest.mark.parametrize("fast", [True, False])
def test_ones_own_model_and_data(here: Path, capsys: pytest.CaptureFixture[str], fast: bool) -> None:
    Path("own_for_merak.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    return nn.Linear(4, 1), torch.ones(8, 4), lambda out, batch: out.square().mean()\n"
        "def data():\n    return [torch.full((4,), float(i)) for i in range(32)], [torch.ones(4)] * 8\n"
    )
    sys.modules.pop("own_for_merak", None)
    own = {"model": {"function": "own_for_merak:model"}, "data": {"function": "own_for_merak:data"}}
    Path("run.yaml").write_text(yaml.safe_dump(BASE | own))
    run(capsys, "train", "run.yaml", *(["--fast-dev-run"] if fast else []))
    lines = read_metrics(Path("out"))
    assert [line["step"] for line in lines if "loss" in line] == ([1, 2, 3] if fast else [2, 4, 6])
    assert [line["step"] for line in lines if "eval_loss" in line] == ([3] if fast else [3, 6])
    assert Path("out/model/model.safetensors").exists()


def test_samples_are_made_up_on_demand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(BASE | {"data": {"train": "synthetic", "seq": 8}, "evaluation": {}}))
    run(capsys, "train", "run.yaml")
    assert "data.seq = 64 tokens, but LlamaForCausalLM has 32 positions" in refused(
        capsys, "train", "run.yaml", "data.train=texts.jsonl", "data.tokenizer=words", "data.seq=64"
    )


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(400)
def test_it_starts_torchrun_and_gives_the_numbers_of_one_process(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "train", "run.yaml", "folder=one", "parallelism.micro_batches=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "merak_like.cli", "train", "run.yaml", "folder=two", "parallelism.pp=2"]
    done = subprocess.run(
        [*command, "parallelism.micro_batches=2"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 steps in" in done.stdout
    one, two = (
        [line for line in read_metrics(Path(f)) if "loss" in line or "eval_loss" in line] for f in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)
    # What torchrun's ranks say about a mistake is one line of theirs, and its exit code comes back.
    wrong = subprocess.run([*command, "training.batch=1"], env=environment, capture_output=True, text=True, timeout=200)
    assert wrong.returncode != 0


# --- the rest --------------------------------------------------------------------------------------------------------


def test_a_chart_is_drawn_where_its_numbers_are() -> None:
    drawn = chart({"loss": [(0, 2.0), (10, 1.0), (20, float("nan"))]})
    assert 'points="64.0,8.0 458.0,212.0"' in drawn
    assert ">step 20</text>" in drawn
    assert chart({"loss": [(1, 1.0)]})


def test_the_doctor_looks_and_says(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "doctor", "--ranks", "0")
    assert "ok    Python 3" in said
    assert "gloo" in said
    assert said.endswith("this machine can train\n")


def test_a_report_needs_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no metrics.jsonl: it is not the folder of a run" in refused(capsys, "report", ".")
    assert "has no weights" in refused(capsys, "export", ".", "-o", "x")
