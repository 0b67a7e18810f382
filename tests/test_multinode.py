"""Two nodes that see each other only over a network: two network namespaces, joined by a cable of the kernel.

node 0 (10.231.77.1)  ==veth==  node 1 (10.231.77.2)      each with its own torchrun agent and its own loopback
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.ranks import Call, Job, Node, torchrun

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

ADDRESS = "10.231.77.{}"
PORT = 29477


def missing() -> str:
    """Why this machine cannot have network namespaces; empty if it can."""
    if shutil.which("ip") is None:
        return "no `ip` command: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"merak-probe-{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", probe], check=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two namespaces with an address each; gone afterwards, whatever happens."""
    tag = uuid.uuid4().hex[:6]
    names = [f"merak-{tag}-{node}" for node in range(2)]
    cable = [f"mk{tag}{node}" for node in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
        for node, name in enumerate(names):
            for words in (
                ("addr", "add", f"{ADDRESS.format(node + 1)}/24", "dev", cable[node]),
                ("link", "set", cable[node], "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", name, *words)
        yield [
            Node(
                ("ip", "netns", "exec", name),
                (
                    "--nnodes=2", f"--node-rank={node}", f"--master-addr={ADDRESS.format(1)}", f"--master-port={PORT}",
                    f"--local-addr={ADDRESS.format(node + 1)}",
                ),
                {"GLOO_SOCKET_IFNAME": cable[node]},
            )
            for node, name in enumerate(names)
        ]  # fmt: skip
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two nodes, or the reason why there are none."""
    if reason := missing():
        pytest.skip(reason)
    with two_nodes() as found:
        yield found


def call(function: str, dp: int, pp: int, module: str = "tests.scenarios", **more: object) -> Call:
    return Call(f"{function}-{dp}x{pp}", f"{module}:{function}", {"dp": dp, "pp": pp, **more})


TRAINING = [call("train", dp, pp, name="gpt2", schedule="1f1b", dropout=True) for dp, pp in ((2, 2), (1, 4), (4, 1))]


@pytest.fixture(scope="module")
def job(nodes: list[Node]) -> Job:
    """Two ranks a node: with 2x2 the replicas are on different nodes, with 1x4 half of the stages."""
    return torchrun([call("addresses", 4, 1, "tests.test_multinode"), *TRAINING], 4, timeout=250, nodes=nodes)


def addresses(dp: int, pp: int) -> list[str]:
    """The addresses this rank has."""
    shown = subprocess.run(["ip", "-brief", "-4", "addr"], check=True, capture_output=True, text=True).stdout
    return [word.split("/")[0] for line in shown.splitlines() for word in line.split()[2:]]


def test_ranks_are_on_two_nodes(job: Job) -> None:
    found = job.results("addresses-4x1")
    assert [[a for a in one if not a.startswith("127.")] for one in found] == [
        [ADDRESS.format(1 + rank // 2)] for rank in range(4)
    ]


@pytest.mark.parametrize("case", TRAINING, ids=lambda case: case.name)
def test_training_over_two_nodes_equals_plain_training(case: Call, job: Job) -> None:
    assert max(job.results(case.name)) <= 1e-10
    assert job.code == 0


def test_namespaces_are_gone_after_a_failure() -> None:
    if reason := missing():
        pytest.skip(reason)
    before = namespaces()

    def fail() -> None:
        with two_nodes():
            assert len(namespaces()) == len(before) + 2
            raise RuntimeError("a test failed")

    with pytest.raises(RuntimeError, match="a test failed"):
        fail()
    assert namespaces() == before


def namespaces() -> list[str]:
    return subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.splitlines()
