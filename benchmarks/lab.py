"""Two hosts on one machine: network namespaces joined by a virtual cable whose rate `tc` limits. Needs root."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ADDRESS = "10.231.78.{}"
PORT = 29478


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
    """Two hosts by the names of their namespaces and their ends of the cable."""

    names: tuple[str, str]
    cable: tuple[str, str]

    def shape(self, bits_per_second: float | None) -> None:
        """Limit what each host sends, by a token bucket; None lifts the limit."""
        for host in (0, 1):
            self.shape_one(host, bits_per_second)

    def shape_one(self, host: int, bits_per_second: float | None, *, burst: str = "256kb") -> None:
        """Limit what one of them sends."""
        name, end = self.names[host], self.cable[host]
        subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", end, "root"], capture_output=True)
        if bits_per_second is not None:
            rate = f"{bits_per_second / 1e6:.3f}mbit"
            _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", "rate", rate, "burst", burst,
                 "latency", "400ms")  # fmt: skip

    def torchrun(self, script: Sequence[str], timeout: float, processes: int = 1) -> None:
        """So many processes on each host."""
        agents = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                 f"--node-rank={rank}", f"--master-addr={ADDRESS.format(1)}", f"--master-port={PORT}",
                 f"--local-addr={ADDRESS.format(rank + 1)}", f"--nproc-per-node={processes}", *script],
                env={**os.environ, "GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"},
            )
            for rank, (name, end) in enumerate(zip(self.names, self.cable, strict=True))
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
    for name, pid in re.findall(r"^(lab-(\d+)-[01])\b", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            yield name


def _remove(name: str) -> None:
    """The host and whatever still runs on it."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Gone afterwards, after SIGTERM too; what a run that was killed has left goes with the next."""
    for name in _left():
        _remove(name)
    tag = os.getpid()
    hosts = Hosts((f"lab-{tag}-0", f"lab-{tag}-1"), (f"lb{tag}0", f"lb{tag}1"))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        for name in hosts.names:
            _run("ip", "netns", "add", name)
        (one, other), (near, far) = hosts.names, hosts.cable
        _run("ip", "link", "add", near, "netns", one, "type", "veth", "peer", "name", far, "netns", other)
        for number, (name, end) in enumerate(zip(hosts.names, hosts.cable, strict=True), 1):
            _run("ip", "-n", name, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", end)
            _run("ip", "-n", name, "link", "set", end, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        signal.signal(signal.SIGTERM, before)
        for name in hosts.names:
            _remove(name)
