"""A host and many clients for some minutes: does anything grow, does each get its share, how long do steps queue?

    OMP_NUM_THREADS=1 python -m benchmarks.split.soak [--clients 100] [--minutes 10]

The host is this process; the clients are threads of four others. Prints a table, and ends with 1 where something grew.
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
from pathlib import Path

import torch
from torch import Tensor, nn

from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import OptimizerText, Task

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
    """Soak, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.port:
        clients(args.port, args.clients, args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        soak(Path(name), args.clients, args.minutes * 60)


def soak(folder: Path, count: int, seconds: float) -> None:
    """Start everything, look every few seconds, tell."""
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
                assert one.stdout is not None
                one.stdout.readline()  # all its clients have done a step
            host.turn.waited.clear()
            for one in started:
                say(one, "go")
            looks, end = list[dict[str, float]](), time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(min(5.0, seconds / 20))
                looks.append(look(host))
            waited = sorted(host.turn.waited)
            for one in started:
                say(one, "stop")
            done = [n for one in started for n in json.loads(one.communicate(timeout=120)[0])]
        finally:
            for one in started:
                one.kill()
    tell(looks, done, waited, seconds)


def look(host: Host) -> dict[str, float]:
    """What this process holds now."""
    loop = host._loop  # pyright: ignore[reportPrivateUsage]
    assert loop is not None
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory, MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "file descriptors": len(os.listdir("/proc/self/fd")),
        "asyncio tasks": len(asyncio.all_tasks(loop)), "threads": threading.active_count(),
    }  # fmt: skip


def tell(looks: list[dict[str, float]], done: list[int], waited: list[float], seconds: float) -> None:
    """The tables, and the verdict."""
    settled = looks[int(SETTLED * len(looks)) :]
    quarter = max(1, len(settled) // 4)
    print("| on the host | a quarter in | at the end | most |\n| --- | ---: | ---: | ---: |")
    grown = list[str]()
    for name in settled[0]:
        early, late = (sum(one[name] for one in some) / quarter for some in (settled[:quarter], settled[-quarter:]))
        print(f"| {name} | {early:,.1f} | {late:,.1f} | {max(one[name] for one in looks):,.1f} |")
        grown += [name] if late > GROWTH * early else []
    mean = sum(done) / len(done)
    jain = sum(done) ** 2 / (len(done) * sum(n * n for n in done))
    p50, p99 = (waited[int(share * (len(waited) - 1))] for share in (0.5, 0.99))
    print(
        f"\n{len(done)} clients, {seconds / 60:.1f} minutes, {sum(done) / seconds:.1f} steps a second in all; "
        f"steps of a client: {min(done)} to {max(done)}, mean {mean:.1f}, Jain's index {jain:.4f}; of the last "
        f"{len(waited):,} waits for a turn half took at most {p50 * 1e3:.1f} ms, 99% at most {p99 * 1e3:.1f} ms"
    )
    if grown:
        raise SystemExit(f"grew: {', '.join(grown)}")


def clients(port: int, count: int, folder: Path) -> None:
    """Some clients, a thread each: a step, then wait for the word, then steps until the next word."""
    go, stop = threading.Event(), threading.Event()
    made = list[Edge]()
    done = [0] * count

    def work(i: int) -> None:
        go.wait()
        while not stop.is_set():
            made[i].step(batch(i, done[i]))
            done[i] += 1

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
    print(json.dumps(done), flush=True)
    for edge in made:
        edge.close()


def batch(client: int, step: int) -> dict[str, Tensor]:
    """Data of a client."""
    generator = torch.Generator().manual_seed(1000 * client + step % 7)
    x = torch.randn(16, 32, generator=generator)
    return {"x": x, "labels": x[:, :4].argmax(1)}


def say(process: subprocess.Popen[str], word: str) -> None:
    """One line."""
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


if __name__ == "__main__":
    main()
