"""AdaSplit through a host: edges that learn at home and are heard in turns, as the method does in one process."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from merak_like.split.adasplit import AdaSplit, Settings
from merak_like.split.connection import Waits
from merak_like.split.contrasted import PROJECTOR
from merak_like.split.crew import Crew
from merak_like.split.edge import Edge
from merak_like.split.groups import GroupText, group_of
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.masked import Masked
from merak_like.split.messages import LocalText, OptimizerText, Task
from merak_like.split.tls import Keys
from tests.split_groups import NAMES, made_keys

ALONE = 2
GROUP: dict[str, Any] = {
    "mode": "chosen", "members": NAMES, "optimizer": {"name": "adam", "lr": 0.01}, "heard": 0.67, "wait": 30.0,
    "checkpoint_every": 2,
}  # fmt: skip
TASK = Task(
    cut="edge", optimizer=OptimizerText(name="adam", lr=0.003), checkpoint_every=2, group="ward",
    local=LocalText(alone=ALONE, width=8),
)  # fmt: skip


class Model(nn.Module):
    """Layers at home, and the server's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.edge = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.server = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.server(self.edge(x)), labels)}


def build() -> Model:
    return Model().double()


def batch(name: str, step: int) -> dict[str, Tensor]:
    """Two of six classes for each."""
    drawn = torch.Generator().manual_seed(100 * NAMES.index(name) + step)
    labels = torch.randint(0, 2, (8,), generator=drawn) + 2 * NAMES.index(name)
    return {"x": torch.randn(8, 12, generator=drawn, dtype=torch.float64) + labels[:, None], "labels": labels}


def in_one_process(steps: int) -> AdaSplit:
    whole, edges = build(), []
    for _ in NAMES:
        torch.manual_seed(TASK.seed)
        edges.append((copy.deepcopy(whole.edge), nn.Linear(16, 8, dtype=torch.float64)))
    run = AdaSplit(edges, whole.server, Settings(heard=0.67, edge_rate=0.003, server_rate=0.01))
    for step in range(steps):
        batches = [batch(name, step) for name in NAMES]
        run.step({n: (b["x"], b["labels"]) for n, b in enumerate(batches)}, listening=step >= ALONE)
    return run


class Ward:
    """A host with the group, and the edges."""

    def __init__(
        self, folder: Path, certificates: Path, group: GroupText, task: Task = TASK, crew: Crew | None = None,
        build: Callable[[], nn.Module] = build,
    ) -> None:  # fmt: skip
        self.folder, self.certificates, self.group, self.port = folder, certificates, group, 0
        self.task, self.crew, self.source = task, crew, Source(build)
        self.serve()
        self.edges = {name: self.edge(name) for name in NAMES}

    def serve(self) -> None:
        self.host = Host(
            self.source, "edge", listen=f"127.0.0.1:{self.port}", folder=self.folder / "host",
            keys=Keys(self.certificates, "host"), groups={"ward": self.group}, crew=self.crew,
            limits=Limits(waits=Waits(hello=20, idle=30, step=60, drain=20)),
        ).start()  # fmt: skip
        self.port = self.host.port

    def edge(self, name: str, task: Task | None = None, folder: str = "") -> Edge:
        return Edge(
            self.source, task or self.task, batch(name, 0), connect=f"127.0.0.1:{self.port}", patience=30,
            folder=self.folder / (folder or name), keys=Keys(self.certificates, name),
        )  # fmt: skip

    def train(self, steps: int) -> None:
        def run(name: str) -> None:
            self.edges[name].train(lambda step: batch(name, step), steps)

        with ThreadPoolExecutor(len(NAMES)) as pool:
            for future in [pool.submit(run, name) for name in NAMES]:
                future.result()

    @property
    def common(self) -> Masked:
        found = self.host.registry.groups["ward"].common
        assert isinstance(found, Masked)
        return found

    def same_as(self, run: AdaSplit) -> None:
        """All weights and masks."""
        for number, name in enumerate(NAMES):
            own = self.edges[name].state_dict()
            edge = {f"edge.{n}": t for n, t in run.edges[number].model.state_dict().items()}
            edge |= {f"{PROJECTOR}.{n}": t for n, t in run.edges[number].projector.state_dict().items()}
            assert own.keys() == edge.keys()
            for n, tensor in edge.items():
                assert torch.allclose(own[n], tensor, rtol=1e-10, atol=1e-12), (name, n)
            for n, mask in run.server.masks[number].items():
                assert torch.allclose(self.common.masks[name][f"server.{n}"], mask, rtol=1e-10, atol=1e-12), (name, n)
        for n, tensor in run.server.model.state_dict().items():
            assert torch.allclose(self.common.weights[f"server.{n}"], tensor, rtol=1e-10, atol=1e-12), n

    def close(self) -> None:
        for edge in self.edges.values():
            edge.close()
        self.host.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Ward]:
    """For tests that leave it as it should be."""
    found = Ward(tmp_path_factory.mktemp("ward"), certificates, group_of(GROUP, "ward"))
    yield found
    found.close()


@pytest.fixture
def ward(tmp_path: Path, certificates: Path) -> Iterator[Ward]:
    found = Ward(tmp_path, certificates, group_of(GROUP, "ward"))
    yield found
    found.close()


def test_numbers_are_those_of_one_process_and_nothing_comes_down(once: Ward):
    ward = once
    ward.train(ALONE)
    assert all(not edge.bytes for edge in ward.edges.values()), "nothing is sent, and no host is asked"
    ward.train(ALONE + 7)
    run = in_one_process(ALONE + 7)
    ward.same_as(run)
    visits = run.chooser.visits
    assert sum(visits) == 7 * 2
    for number, name in enumerate(NAMES):
        told = ward.edges[name].bytes
        sent = visits[number] * 8 * 16 * 8
        assert sent < told["sent UP_FORWARD"] < sent + visits[number] * 200, (told, visits)
        came = {k for k in told if "received" in k} - {"received PING"}  # a sign of life, on a slow machine
        assert came == {"received", "received WELCOME", "received DONE"}
        assert told["received"] < 3000 + 7 * 130, "a few numbers of control a step"
    loss = ward.edges["ann"].evaluate(batch("ann", 50)).loss
    some = batch("ann", 50)
    assert loss == pytest.approx(F.cross_entropy(run.predict(0, some["x"]), some["labels"]).item(), rel=1e-9)


@pytest.mark.slow
def test_a_host_and_an_edge_that_start_again_go_on_to_the_same_numbers(ward: Ward):
    ward.train(ALONE + 4)
    ward.edges["bob"].close()
    ward.host.close()
    ward.serve()
    ward.edges["bob"] = ward.edge("bob")
    ward.train(ALONE + 9)
    ward.same_as(in_one_process(ALONE + 9))


@pytest.mark.slow
def test_an_edge_that_starts_again_before_anybody_heard_of_it(ward: Ward):
    ward.edges["bob"].train(lambda step: batch("bob", step), ALONE)
    ward.edges["bob"].close()
    ward.edges["bob"] = ward.edge("bob")
    assert ward.edges["bob"].step_number == ALONE
    ward.train(ALONE + 3)
    ward.same_as(in_one_process(ALONE + 3))


def test_what_does_not_go_together_is_refused(once: Ward):
    def ask(**more: Any) -> None:
        task = TASK.model_copy(update={"local": LocalText(), **more})
        with once.edge("eve", task, "other") as edge:
            edge.step(batch("eve", 0))

    with pytest.raises(ValueError, match="learns at home is heard by a group"):
        ask(group=None)
    with pytest.raises(ValueError, match="say local:"):
        ask(local=None)
    with pytest.raises(ValueError, match="needs a cut without a tail"):
        ask(cut="edge:server.2")
    for more, word in (
        ({"lost": "skip"}, "waits for those that are heard"), ({"phi": 0.5}, "phi means nothing in a chosen group"),
        ({"average": 3}, "average means nothing in a chosen"), ({"mode": "parallel"}, "heard means nothing in a para"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            group_of({**GROUP, **more}, "ward")


DATA = """
import torch
from tests.test_split_adasplit import Model, batch

def model():
    return Model().double(), batch("ann", 0)

def ann(step):
    return batch("ann", step)

def bob(step):
    return batch("bob", step)
"""
YAML = """
model: home:model
data: home:{name}
cut: edge
steps: 6
connect: 127.0.0.1:{port}
keys: {keys}
name: {name}
state: {name}
checkpoint_every: 2
group: ward
local: {{alone: 2, width: 8}}
optimizer: {{name: adam, lr: 0.003}}
"""
GROUPS = """
ward: {mode: chosen, members: [ann, bob], heard: 0.5, optimizer: {name: adam, lr: 0.01}, checkpoint_every: 2}
"""


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_as_people_type_it(tmp_path: Path, certificates: Path):
    """A host and two edges, each a process of its own, from their files alone."""
    (tmp_path / "home.py").write_text(DATA)
    (tmp_path / "groups.yaml").write_text(GROUPS)
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": f"{root}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    merak = [sys.executable, "-m", "merak_like.cli"]
    serve = [*merak, "serve", "--model", "home:model", "--cut", "edge", "--listen", "127.0.0.1:0", "--keys",
             str(certificates), "--groups", "groups.yaml"]  # fmt: skip
    with subprocess.Popen(serve, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as host:
        edges: list[subprocess.Popen[str]] = []
        try:
            assert host.stdout is not None
            port = int(host.stdout.readline().rsplit(":", 1)[1])
            for name in ("ann", "bob"):
                (tmp_path / f"{name}.yaml").write_text(YAML.format(name=name, port=port, keys=certificates))
                train = [*merak, "edge", "train", f"{name}.yaml", "-o", f"{name}.safetensors"]
                edges.append(subprocess.Popen(train, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
            told = [edge.communicate(timeout=200)[0] for edge in edges]
            assert [edge.returncode for edge in edges] == [0, 0]
            host.send_signal(signal.SIGTERM)
            assert host.wait(60) == 0
        finally:
            for process in (host, *edges):
                process.kill()
    lines = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out in told]
    assert [[line["step"] for line in some] for some in lines] == [list(range(6))] * 2
    assert all(line["sent"] == 0 for some in lines for line in some[:2])
    assert sum(some[-1]["sent"] - some[1]["sent"] > 8 * 16 * 8 for some in lines) == 2  # both were heard
    assert {name for name in load_file(tmp_path / "ann.safetensors") if name.startswith("edge.")}
