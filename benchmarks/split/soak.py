"""A host and many clients for some minutes: does anything grow, does each get its share, how long do steps queue?

    OMP_NUM_THREADS=1 python -m benchmarks.split.soak [--clients 100] [--minutes 10]

The host is this process; the clients are threads of four others. Writes ``soak.json`` (see ``--out``), which
``benchmarks/tables.py`` puts into the README, and ends with 1 where something grew or a client stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import OptimizerText, Task

HERE = Path(__file__).resolve().parent
PROCESSES = 4
SETTLED = 0.25
"""Share of the time after which nothing may grow any more."""
GROWTH = 1.05
"""Most that the last quarter's memory may be of the quarter's after ``SETTLED``."""
TASK = Task(cut="front:back", codec="int8", micro_batches=2, window=2, checkpoint_every=50, optimizer=OptimizerText())


class Model(nn.Module):
    """Something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.middle = nn.Linear(32, 64), nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.back = nn.Linear(64, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": nn.functional.cross_entropy(self.back(self.middle(self.front(x).tanh()).tanh()), labels)}


def build() -> nn.Module:
    """The same each time."""
    torch.manual_seed(0)
    return Model()


def main() -> None:
    """Soak, and tell what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=HERE / "soak.json")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.port:
        clients(args.port, args.clients, args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        found = soak(Path(name), args.clients, args.minutes * 60)
    found["setting"] = {"clients": args.clients, "minutes": args.minutes, "processes of clients": PROCESSES,
                        "cores": os.cpu_count(), "torch": torch.__version__}  # fmt: skip
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if found["grew"] or found["stopped"]:
        raise SystemExit(f"grew: {', '.join(found['grew']) or 'nothing'}; clients that stopped: {found['stopped']}")


def soak(folder: Path, count: int, seconds: float) -> dict[str, Any]:
    """Start everything, look every few seconds, end it; what was found."""
    limits = Limits(connections=2 * count, connections_per_client=2 * count, sessions=2 * count,
                    sessions_per_client=2 * count)  # fmt: skip
    share = [count // PROCESSES + (i < count % PROCESSES) for i in range(PROCESSES)]
    with Host(Source(build), TASK.cut, listen="127.0.0.1:0", folder=folder / "host", limits=limits) as host:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.split.soak", "--port", str(host.port), "--clients", str(some),
                 "--folder", str(folder / str(i))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for i, some in enumerate(share) if some
        ]  # fmt: skip
        try:
            for one in started:
                heard(one, "ready")  # all its clients have done a step
            drained(host)
            for one in started:
                say(one, "go")
            looks, waited, began = list[dict[str, float]](), array("d"), time.monotonic()
            while time.monotonic() < began + seconds:
                time.sleep(min(5.0, seconds / 20))
                waited.extend(drained(host))
                looks.append(look(host, started))
            for one in started:
                say(one, "stop")
            steps = [each for one in started for each in json.loads(heard(one))]
            took = time.monotonic() - began
            for one in started:
                one.wait(120)
        finally:
            for one in started:
                one.kill()
    return summed(looks, steps, waited, took)


def drained(host: Host) -> list[float]:
    """The waits for a turn since the last look: the host keeps some thousands only."""
    found = list[float]()
    while host.turn.waited:
        found.append(host.turn.waited.popleft())
    return found


def look(host: Host, started: Sequence[subprocess.Popen[str]]) -> dict[str, float]:
    """What the host's process holds now, and what the clients' do."""
    loop = host._loop  # pyright: ignore[reportPrivateUsage]
    assert loop is not None
    return {
        "memory, MB": memory("self"), "file descriptors": len(os.listdir("/proc/self/fd")),
        "asyncio tasks": len(asyncio.all_tasks(loop)), "threads": threading.active_count(),
        "memory of all clients, MB": sum(memory(one.pid) for one in started),
    }  # fmt: skip


def memory(process: int | str) -> float:
    """Resident, in MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def summed(
    looks: Sequence[dict[str, float]], steps: Sequence[list[tuple[float, float]]], waited: Sequence[float],
    took: float,
) -> dict[str, Any]:  # fmt: skip
    """``steps`` are each client's: the seconds it took, and those that it stood in line on the host; -1: it failed."""
    settled = looks[int(SETTLED * len(looks)) :]
    quarter = max(1, len(settled) // 4)
    held = {
        name: {
            "early": sum(one[name] for one in settled[:quarter]) / quarter,
            "late": sum(one[name] for one in settled[-quarter:]) / quarter,
            "most": max(one[name] for one in looks),
        }
        for name in settled[0]
    }
    done = [sum(second >= 0 for second, _ in mine) for mine in steps]
    whole = [step for mine in steps for step in mine if step[0] >= 0]
    return {
        "held": held,
        "grew": [name for name, row in held.items() if row["late"] > GROWTH * row["early"]],
        "stopped": sum(second < 0 for mine in steps for second, _ in mine),
        "steps": {"all": sum(done), "a second": sum(done) / took, "least": min(done), "most": max(done),
                  "Jain": sum(done) ** 2 / (len(done) * sum(n * n for n in done))},
        "seconds": {
            "a step": quantiles([second for second, _ in whole]),
            "of it in line for the host's turn": quantiles([queued for _, queued in whole]),
            "one wait for a turn": quantiles(waited),
        },
    }  # fmt: skip


def quantiles(found: Sequence[float]) -> dict[str, float]:
    """The middle, the 99th percentile and the longest."""
    ordered = sorted(found)
    return {name: ordered[int(q * (len(ordered) - 1))] for name, q in (("p50", 0.5), ("p99", 0.99), ("most", 1.0))}


def clients(port: int, count: int, folder: Path) -> None:
    """Some clients, a thread each: a step, then wait for the word, then steps until the next word."""
    go, stop = threading.Event(), threading.Event()
    made = list[Edge]()
    done: list[list[tuple[float, float]]] = [[] for _ in range(count)]

    def work(i: int) -> None:
        edge = made[i]
        go.wait()
        while not stop.is_set():
            began, queued = time.monotonic(), edge.queued
            try:
                edge.step(batch(i, len(done[i])))
            except Exception as error:
                print(f"client {i} stops at step {len(done[i])}: {type(error).__name__}: {error}", file=sys.stderr)
                done[i].append((-1.0, 0.0))
                return
            done[i].append((time.monotonic() - began, edge.queued - queued))

    for i in range(count):
        edge = Edge(Source(build), TASK, batch(i, 0), connect=f"127.0.0.1:{port}", folder=folder / str(i))
        edge.step(batch(i, 0))
        made.append(edge)
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.readline()
    go.set()
    sys.stdin.readline()
    stop.set()
    for thread in threads:
        thread.join(60)
    print(json.dumps([[(round(a, 5), round(b, 5)) for a, b in mine] for mine in done]), flush=True)
    for edge in made:
        edge.close()


def batch(client: int, step: int) -> dict[str, Tensor]:
    """Data of a client."""
    generator = torch.Generator().manual_seed(1000 * client + step % 7)
    x = torch.randn(16, 32, generator=generator)
    return {"x": x, "labels": x[:, :4].argmax(1)}


def heard(process: subprocess.Popen[str], word: str = "") -> str:
    """Its next line. Raises RuntimeError where it ended instead, or says another word."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line or (word and line != word):
        raise RuntimeError(f"a process of clients ended with {process.poll()}, or said {line[:80]!r}")
    return line


def say(process: subprocess.Popen[str], word: str) -> None:
    """One line."""
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


if __name__ == "__main__":
    main()
