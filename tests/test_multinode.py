"""Two nodes that see each other only over a network: two network namespaces, joined by a cable of the kernel.

node 0  ==veth==  node 1      each with its own torchrun agent and its own loopback
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from benchmarks import lab
from tests.ranks import Call, Job, Node, torchrun

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

ADDRESS = lab.ADDRESS


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two nodes, or the reason why there are none."""
    if reason := lab.missing():
        pytest.skip(reason)
    with lab.two_hosts() as hosts:
        yield [
            Node(
                ("ip", "netns", "exec", name),
                (
                    "--nnodes=2", f"--node-rank={node}", f"--master-addr={ADDRESS.format(1)}",
                    f"--master-port={lab.PORT}", f"--local-addr={ADDRESS.format(node + 1)}",
                ),
                {"GLOO_SOCKET_IFNAME": end},
            )
            for node, (name, end) in enumerate(zip(hosts.names, hosts.cable, strict=True))
        ]  # fmt: skip


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
