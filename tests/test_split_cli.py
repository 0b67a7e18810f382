"""`merak serve` and `merak edge train` as people type them, with keys, from a checkpoint each side reads in part."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merak_like.split import keys
from tests.commands import refused

ROOT = Path(__file__).resolve().parents[1]
CUT = "bert.encoder.layer.1@6:bert.pooler.dense"
DATA = """
import torch

def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 60, (4, 12), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    return found, [4 * (step % 2) + i for i in range(4)]
"""
EDGE = """
model: model
data: split_cli_data:batch
cut: {cut}
steps: {steps}
connect: 127.0.0.1:{port}
keys: keys
name: ann
codec: aqsgd(4)|int8
micro_batches: 2
checkpoint_every: 2
optimizer: {{name: adamw, lr: 0.001}}
"""


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_serve_and_train_from_a_checkpoint(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=2, architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    keys.init(tmp_path / "keys")
    keys.issue(tmp_path / "keys", "host", hosts=["127.0.0.1"])
    keys.issue(tmp_path / "keys", "ann")
    (tmp_path / "split_cli_data.py").write_text(DATA)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    serve = [
        sys.executable, "-m", "merak_like.cli", "serve", "--model", "model", "--cut", CUT, "--listen", "127.0.0.1:0",
        "--keys", "keys",
    ]  # fmt: skip
    with subprocess.Popen(serve, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as host:
        try:
            assert host.stdout is not None
            word = host.stdout.readline()
            port = int(word.rsplit(":", 1)[1])
            lines: list[dict[str, float]] = []
            for steps in (3, 4):  # the second goes on where the first stopped, at a checkpoint both have
                (tmp_path / "edge.yaml").write_text(EDGE.format(cut=CUT, steps=steps, port=port))
                train = [sys.executable, "-m", "merak_like.cli", "edge", "train", "edge.yaml", "-o", "edge.safetensors"]
                done = subprocess.run(train, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
                assert done.returncode == 0, done.stderr
                assert "predicted" in done.stderr
                lines += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            host.send_signal(signal.SIGTERM)
            assert host.wait(60) == 0
        finally:
            host.kill()
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3]
    assert lines[2]["loss"] == lines[3]["loss"]  # done again from the checkpoint of step 2, to the last bit
    from safetensors.torch import load_file

    own = load_file(tmp_path / "edge.safetensors")
    assert any(name.startswith("bert.embeddings") for name in own)
    assert not any(name.startswith(("bert.encoder.layer.2", "bert.encoder.layer.3")) for name in own)


def test_mistakes_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "edge.yaml"
    file.write_text("model: x\ndata: a:b\ncut: c\nsteps: none\n")
    assert "edge.yaml: steps:" in refused(capsys, "edge", "train", str(file))
    file.write_text("model: x\ndata: a:b\ncut: c\nsteps: 1\nsped: 3\n")
    assert "sped" in refused(capsys, "edge", "train", str(file))
    assert "there are train" in refused(capsys, "edge", "run", str(file))
    file.write_text("model: x\ndata: nowhere_at_all:b\ncut: c\nsteps: 1\n")
    assert "cannot import 'nowhere_at_all'" in refused(capsys, "edge", "train", str(file))
    assert "HOST:PORT" in refused(
        capsys, "serve", "--model", "tests.split_models:calm", "--cut", "a:b", "--listen", "here"
    )
    assert "--insecure" in refused(
        capsys, "serve", "--model", "tests.split_models:calm", "--cut", "a:b", "--listen", "0.0.0.0:0"
    )
    assert "a cut is FRONT" in refused(capsys, "serve", "--model", "tests.split_models:calm", "--cut", "a:b:c@")
