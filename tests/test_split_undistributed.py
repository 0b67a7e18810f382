"""An edge whose torch was built without ``torch.distributed`` trains as one that has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from tests import split_models
from tests.split_pair import CUTS, SGD, made, task

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2
BATCHES = {
    "calm": split_models.tiny_batch,
    "bert": partial(split_models.text_batch, classes=True),
    "llama": partial(split_models.text_batch, classes=False),
}
DATA = "from tests.test_split_undistributed import BATCHES\n\nbatch = BATCHES[{name!r}]\n"
EDGE = """
model: tests.split_models:{name}
data: undistributed_data:batch
cut: {cut}
steps: {steps}
connect: 127.0.0.1:{port}
insecure: true
micro_batches: 2
optimizer: {{name: sgd, lr: 0.1}}
machines: {{uplink: 20 Mbit, downlink: 100 Mbit}}
"""


def write(folder: Path, name: str, port: int) -> None:
    (folder / "undistributed_data.py").write_text(DATA.format(name=name))
    (folder / "edge.yaml").write_text(EDGE.format(name=name, cut=CUTS[name], steps=STEPS, port=port))


def merak(folder: Path, *arguments: str) -> str:
    threads = str(torch.get_num_threads())  # the order of a sum is that of so many
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.undistributed", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["calm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "llama"))])
def test_an_edge_without_torch_distributed_trains_as_one_with_it(name: str, tmp_path: Path):
    _, batch = made(name)
    source, what = Source(lambda: made(name)[0]), task(CUTS[name], optimizer=SGD)
    with Host(source, what.cut, listen="127.0.0.1:0", folder=tmp_path / "host") as host:
        address = f"127.0.0.1:{host.port}"
        with Edge(source, what, batch, connect=address, folder=tmp_path / "with") as edge:
            losses = [edge.step(BATCHES[name](step)).loss for step in range(STEPS)]
            weights = edge.state_dict()
        write(tmp_path, name, host.port)
        said = merak(tmp_path, "edge", "train", "edge.yaml", "--out", "edge.safetensors")
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["loss"] for line in lines] == losses  # to the last bit: it is the same code
    found = load_file(tmp_path / "edge.safetensors")
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("action", ["plan", "leakage"])
def test_what_an_edge_measures_before_needs_it_neither(action: str, tmp_path: Path):
    pytest.importorskip("transformers")
    write(tmp_path, "bert", port=1)
    assert merak(tmp_path, "edge", action, "edge.yaml").strip()
