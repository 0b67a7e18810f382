"""Hosts on one machine: network namespaces on a switch, and what each sends is limited by `tc`. Needs root.

    host 0 ==cable==+
    host 1 ==cable==+ bridge, in a namespace of its own
    host 2 ==cable==+

A cable has two ends (veth): the one in the host has the address and, by a token bucket, the rate.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ADDRESS = "10.231.78.{}"
PORT = 29478
PROFILES = {"unshaped": None, "10 Gbit": 10e9, "1 Gbit": 1e9, "100 Mbit": 100e6, "edge": 20e6}
"""Bits per second that a host sends at most: one node, nodes of a data centre, of an office; an uplink at home."""


def missing() -> str:
    """Why this machine has no lab; empty if it has one."""
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"no `{command}` command: install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"lab-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:  # root in a container that may not
        return f"no network namespaces here: {made.stderr.strip()}"
    _run("ip", "netns", "delete", probe)
    return ""


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Hosts:
    """Hosts by the names of their namespaces and their ends of the cables."""

    names: tuple[str, ...]
    cable: tuple[str, ...]

    def shape(self, bits_per_second: float | None) -> None:
        """Limit what each host sends, by a token bucket; None lifts the limit."""
        for host in range(len(self.names)):
            self.shape_one(host, bits_per_second)

    def shape_one(self, host: int, bits_per_second: float | None) -> None:
        """Limit what one of them sends. Bursts last 2 ms, or are of 32 kB: a few of the packets that TCP hands on."""
        name, end = self.names[host], self.cable[host]
        subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", end, "root"], capture_output=True)
        if bits_per_second is not None:
            rate, burst = f"{bits_per_second / 1e6:.3f}mbit", f"{max(32768, bits_per_second / 8 * 0.002):.0f}"
            _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", "rate", rate, "burst", burst,
                 "latency", "400ms")  # fmt: skip

    def torchrun(
        self, script: Sequence[str], timeout: float, processes: int = 1, environment: Mapping[str, str] | None = None
    ) -> None:
        """So many processes on each host, the ranks of one job."""
        common = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(self.names)}",
            f"--master-addr={ADDRESS.format(1)}", f"--master-port={PORT}", f"--nproc-per-node={processes}",
        ]  # fmt: skip
        agents = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *common, f"--node-rank={n}", f"--local-addr={ADDRESS.format(n + 1)}",
                 *script],
                env={**os.environ, "GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
            for n, (name, end) in enumerate(zip(self.names, self.cable, strict=True))
        ]  # fmt: skip
        try:
            codes = [agent.wait(timeout) for agent in agents]
        finally:
            for agent in agents:
                agent.terminate()  # it ends its ranks
            for agent in agents:
                agent.wait(60)
        if any(codes):
            raise SystemExit(f"the ranks of {' '.join(script)} ended with {codes}")


def _left() -> Iterator[str]:
    """Hosts of runs that are no more."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name, pid in re.findall(r"^(lab-(\d+)-(?:\d+|switch))\b", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            yield name


def _remove(name: str) -> None:
    """The host and whatever still runs on it."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def hosts_on_a_switch(count: int) -> Iterator[Hosts]:
    """Gone afterwards, after SIGTERM too; what a run that was killed has left goes with the next."""
    for name in _left():
        _remove(name)
    tag = os.getpid()
    switch, numbers = f"lab-{tag}-switch", range(count)
    hosts = Hosts(tuple(f"lab-{tag}-{n}" for n in numbers), tuple(f"lb{tag}{n}" for n in numbers))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        for name in (switch, *hosts.names):
            _run("ip", "netns", "add", name)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for n, name, end in zip(numbers, hosts.names, hosts.cable, strict=True):
            port = f"port{n}"
            _run("ip", "link", "add", end, "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "addr", "add", f"{ADDRESS.format(n + 1)}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", end, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        signal.signal(signal.SIGTERM, before)
        for name in (*hosts.names, switch):
            _remove(name)


def two_hosts() -> AbstractContextManager[Hosts]:
    """The least that has a network."""
    return hosts_on_a_switch(2)
