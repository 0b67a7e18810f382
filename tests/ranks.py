"""Functions of the tests in several processes: many calls in one job, by torchrun or forked, or processes to be killed.

    torchrun([Call("a", "tests.scenarios:two_steps", {"dp": 2})], world=2).result("a")

Every rank makes the same calls one after the other and writes what each returned. A failed assertion is noted and the
rank goes on (so a scenario asserts when its engine is closed); after any other exception the rank leaves the job.
No process outlives its job: they are found by a mark in their environment, wherever they went.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARK = "MERAK_TEST_JOB"


class Call(NamedTuple):
    """``module:function`` with keyword arguments, on every rank; what it returns must fit into JSON."""

    name: str
    function: str
    arguments: Mapping[str, Any] = {}


class Said(NamedTuple):
    """What a call came to on one rank."""

    value: Any
    error: str
    seconds: float


@dataclass(frozen=True)
class Rank:
    """What one process left. ``code`` is None where only its agent knows it."""

    code: int | None
    stderr: str
    said: Mapping[str, Said]


@dataclass(frozen=True)
class Job:
    """What a whole job left."""

    ranks: tuple[Rank, ...]
    code: int
    """Of torchrun: 0 if all went well."""
    output: str
    """Of torchrun."""

    def results(self, name: str) -> list[Any]:
        """What a call returned, by rank; AssertionError with every rank's own words if it failed anywhere."""
        failed = [f"--- rank {i}: {r.said[name].error}" for i, r in enumerate(self.ranks) if self._error(r, name)]
        silent = [f"--- rank {i} never got there:\n{r.stderr[-3000:]}" for i, r in enumerate(self.ranks)
                  if name not in r.said]  # fmt: skip
        wrong = failed + silent
        assert not wrong, f"{name}\n" + "\n".join(wrong)
        return [rank.said[name].value for rank in self.ranks]

    @staticmethod
    def _error(rank: Rank, name: str) -> bool:
        return name in rank.said and bool(rank.said[name].error)


class Node(NamedTuple):
    """Where one agent of torchrun runs: a command in front of its own, its options, its environment."""

    prefix: Sequence[str] = ()
    options: Sequence[str] = ("--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    environment: Mapping[str, str] = {}


def torchrun(calls: Sequence[Call], world: int, *, timeout: float = 400.0, nodes: Sequence[Node] = (Node(),)) -> Job:
    """Run the calls under real torchrun, an agent for each node."""
    with tempfile.TemporaryDirectory() as name, _processes() as environment:
        folder = Path(name)
        _write(folder, calls)
        end = time.monotonic() + timeout
        agents: list[subprocess.Popen[bytes]] = []
        for number, node in enumerate(nodes):
            command = [*node.prefix, sys.executable, "-m", "torch.distributed.run", *node.options]
            command += [f"--nproc-per-node={world // len(nodes)}", "-m", "tests.ranks", name]
            mine = {**environment, **node.environment}
            with (folder / f"{number}.agent").open("wb") as log:
                agents.append(subprocess.Popen(command, cwd=ROOT, env=mine, stdout=log, stderr=subprocess.STDOUT))
        codes = [_code(agent, end) for agent in agents]
        output = "\n".join((folder / f"{n}.agent").read_text(errors="replace") for n in range(len(nodes)))
        job = Job(tuple(_read(folder, rank) for rank in range(world)), max(codes, key=abs), output)
        nobody_left(environment[MARK])
    return job


def call(scenario: str, *layout: int, **more: Any) -> Call:
    """A call of a scenario on a layout (dp, pp) or (dp, pp, tp), named by both."""
    axes = dict(zip(("dp", "pp", "tp"), layout, strict=False))
    words = [scenario, *(str(v) for k, v in more.items() if k != "folder"), "x".join(map(str, layout))]
    return Call("-".join(words), f"tests.scenarios:{scenario}", {**axes, **more})


def selected_calls(request: pytest.FixtureRequest) -> list[Call]:
    """The calls that are parameters of the selected tests of the requesting module, in order."""
    calls: dict[str, Call] = {}
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            calls.update((value.name, value) for value in item.callspec.params.values() if isinstance(value, Call))
    return list(calls.values())


def forked(calls: Sequence[Call], world: int, *, timeout: float = 400.0) -> Job:
    """Run the calls in processes that one import served: for a rank of a small job, importing is most of the work."""
    with bare(calls, world) as job:
        end = time.monotonic() + timeout
        while time.monotonic() < end and None in (codes := [job.code(rank) for rank in range(world)]):
            if any(codes):  # the others name it and end by themselves, or never
                end = min(end, time.monotonic() + 60)
            time.sleep(0.02)
        return Job(tuple(map(job.read, range(world))), max((code or 0 for code in codes), key=abs), "")


def results_of(
    calls: Sequence[Call], timeout: float = 400.0, together: int | None = None
) -> Callable[[Call], list[Any]]:
    """What a call returns on every rank. A job runs when the first of its results is asked for.

    There is one for each world size, or one for each ``together`` calls of it, so that many end in their time.
    """
    jobs: dict[tuple[int, int], Job] = {}

    def size(one: Call) -> int:
        return one.arguments["dp"] * one.arguments["pp"] * one.arguments.get("tp", 1)

    def result(one: Call) -> list[Any]:
        world = size(one)
        alike = [c for c in calls if size(c) == world]
        most = together or len(alike)
        first = [c.name for c in alike].index(one.name) // most * most
        if (world, first) not in jobs:
            jobs[world, first] = forked(alike[first : first + most], world, timeout=timeout)
        return jobs[world, first].results(one.name)

    return result


def _code(agent: subprocess.Popen[bytes], end: float) -> int:
    try:
        return agent.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        agent.terminate()  # it ends its ranks
        return agent.wait() or 1


@dataclass
class Bare:
    """Processes with torchrun's environment but without its agent, which would end all when one ends."""

    folder: Path
    world: int

    def kill(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        os.kill(int((self.folder / f"{rank}.pid").read_text()), number)

    def code(self, rank: int) -> int | None:
        """How a rank ended; None if it still runs."""
        path = self.folder / f"{rank}.code"
        return int(path.read_text()) if path.exists() else None

    def until(self, name: str, timeout: float = 120.0) -> None:
        """Wait until every rank has called ``here(name)``."""
        end = time.monotonic() + timeout
        for rank in range(self.world):
            while not (self.folder / f"{rank}.{name}").exists():
                assert self.code(rank) is None, f"rank {rank} ended before {name!r}: {self.read(rank).stderr[-3000:]}"
                assert time.monotonic() < end, f"rank {rank} did not reach {name!r} in {timeout:.0f} s"
                time.sleep(0.02)

    def wait(self, ranks: Sequence[int], timeout: float) -> None:
        """Wait until these ranks have ended."""
        end = time.monotonic() + timeout
        for rank in ranks:
            while self.code(rank) is None:
                assert time.monotonic() < end, f"rank {rank} still runs after {timeout:.0f} s"
                time.sleep(0.02)

    def read(self, rank: int) -> Rank:
        """What a rank left so far."""
        return _read(self.folder, rank, self.code(rank))


@contextmanager
def bare(calls: Sequence[Call], world: int) -> Iterator[Bare]:
    """Start the calls on every rank; at the end all that still runs is killed."""
    with tempfile.TemporaryDirectory() as name, _processes() as environment:
        _write(Path(name), calls)
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        environment["LOCAL_WORLD_SIZE"] = str(world)
        parent = subprocess.Popen([sys.executable, "-m", "tests.ranks", name, str(world)], cwd=ROOT, env=environment)
        try:
            yield Bare(Path(name), world)
        finally:
            for process in marked(environment[MARK]):
                os.kill(process, signal.SIGKILL)
            parent.wait()
            nobody_left(environment[MARK])


def here(name: str) -> None:
    """Tell the test that this rank has come to a place (in a process of ``bare``)."""
    (Path(sys.argv[1]) / f"{os.environ['RANK']}.{name}").touch()


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def nobody_left(mark: str, patience: float = 10.0) -> None:
    """Raise AssertionError, after killing them, if processes of a job still run ``patience`` seconds after its end."""
    end = time.monotonic() + patience
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, f"the job left processes behind: {left}"


def marked(mark: str) -> list[int]:
    """Processes whose environment has this mark, zombies excluded."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended, or it is not ours
    return found


@contextmanager
def _processes() -> Iterator[dict[str, str]]:
    """An environment whose mark tells the job's processes; none of them outlives the block."""
    mark = uuid.uuid4().hex
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV", "TORCHELASTIC", "GROUP_"))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        yield kept | {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    finally:
        for process in marked(mark):
            os.kill(process, signal.SIGKILL)


def _write(folder: Path, calls: Sequence[Call]) -> None:
    (folder / "calls.json").write_text(json.dumps(calls))


def _read(folder: Path, rank: int, code: int | None = None) -> Rank:
    def text(kind: str) -> str:
        path = folder / f"{rank}.{kind}"
        return path.read_text(errors="replace") if path.exists() else ""

    lines = [json.loads(line) for line in text("said").splitlines()]
    return Rank(code, text("stderr"), {line.pop("name"): Said(**line) for line in lines})


def main(folder: Path) -> None:
    """Make the calls, in one of the processes."""
    rank = os.environ["RANK"]
    stream = os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    for call in (Call(*fields) for fields in json.loads((folder / "calls.json").read_text())):
        module, _, name = call.function.partition(":")
        begin, error, value = time.monotonic(), "", None
        leave: BaseException | None = None
        try:
            function: Callable[..., Any] = getattr(import_module(module), name)
            value = function(**call.arguments)
        except AssertionError:
            error = traceback.format_exc()
        except BaseException as problem:
            error, leave = traceback.format_exc(), problem
        said = {"name": call.name, "value": value, "error": error, "seconds": time.monotonic() - begin}
        with (folder / f"{rank}.said").open("a") as file:
            file.write(json.dumps(said) + "\n")
        if leave is not None:
            raise leave


def fork(folder: Path, world: int) -> int | None:
    """Import once, then be every rank: the rank in a rank's process, None in the one that waits for them all."""
    for call in json.loads((folder / "calls.json").read_text()):
        import_module(Call(*call).function.partition(":")[0])
    import_module("torch._dynamo")  # what a first trace would import, in each rank for itself
    ranks: dict[int, int] = {}
    for rank in range(world):
        child = os.fork()
        if not child:
            return rank
        ranks[child] = rank
        (folder / f"{rank}.pid").write_text(str(child))
    while ranks:
        child, status = os.wait()
        rank = ranks.pop(child)
        (folder / f"{rank}.ended").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / f"{rank}.ended").rename(folder / f"{rank}.code")
    return None


if __name__ == "__main__":
    if sys.argv[2:]:
        mine = fork(Path(sys.argv[1]), int(sys.argv[2]))
        if mine is None:
            sys.exit(0)
        os.environ |= {"RANK": str(mine), "LOCAL_RANK": str(mine)}
    main(Path(sys.argv[1]))
