"""Hosts and edges in processes of their own, killed where a test says so.

    with Nursery() as nursery:
        port = nursery.start("host", folder=..., fault="stepped", at=3)["port"]

One process imports torch once and forks a child for each host or edge. A fault is a place in the protocol at which the
child kills itself with SIGKILL, at a step. Every child ends with its nursery.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 60
"""Seconds any child lives, whatever happens to its test."""


class Nursery:
    """Starts children and waits for them."""

    def __enter__(self) -> Nursery:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.split_process"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._children: set[int] = set()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in (*self._children, self._parent.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._parent.wait()

    def start(self, role: str, **arguments: Any) -> dict[str, Any]:
        """Fork a child; its first word, with its ``pid``."""
        answer = self._ask({"do": "start", "role": role, "arguments": arguments})
        self._children.add(answer["pid"])
        return answer

    def wait(self, pid: int) -> dict[str, Any]:
        """Wait for a child's end; its exit status under ``status`` and what it said last."""
        self._children.discard(pid)
        return self._ask({"do": "wait", "pid": pid})

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(command) + "\n")
        self._parent.stdin.flush()
        line = self._parent.stdout.readline()
        assert line, f"the nursery died: {self._parent.poll()}"
        return json.loads(line)


def die() -> None:
    """As when the machine goes."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(fault: str, at: int) -> None:
    """Let this process die at a place in the protocol, at a step."""
    from merak_like.split import checkpoint
    from merak_like.split.connection import Connection
    from merak_like.split.elsewhere import Arrives, Leaves
    from merak_like.split.exchange import Exchange
    from merak_like.split.group import Group
    from merak_like.split.registry import Registry
    from merak_like.split.session import Session
    from merak_like.split.training import Training

    def after(kind: Any, name: str, due: Callable[..., bool]) -> None:
        own = getattr(kind, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            made = own(self, *args, **kwargs)
            if due(self, *args):
                die()
            return made

        setattr(kind, name, wrapped)

    def before(kind: Any, name: str, due: Callable[..., bool]) -> None:
        own = getattr(kind, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if due(self, *args):
                die()
            return own(self, *args, **kwargs)

        setattr(kind, name, wrapped)

    def of_own(self: Any, *args: Any) -> bool:
        return args[0] == "own" and self.step == at + 1

    def in_step(self: Any, *args: Any) -> bool:
        return self.exchange.step == at and args[0] == 1

    places: dict[str, Callable[[], None]] = {
        "opened": lambda: after(Registry, "open", lambda *_: True),
        "agreed": lambda: after(Session, "agree", lambda *_: True),
        "begun": lambda: after(Connection, "begun", lambda self: bool(self._step and self._step.step == at)),
        "up forward": lambda: after(Arrives, "forward", in_step),
        "down forward": lambda: after(Leaves, "forward", in_step),
        "down backward": lambda: after(Leaves, "backward", in_step),
        "up backward": lambda: after(Arrives, "backward", in_step),
        "stepped": lambda: after(Training, "run", lambda self, *_: self.step == at + 1),
        "applied": lambda: after(Group, "_apply", lambda _self, _parts, place: place.updates == at),
        "gathered": lambda: after(Exchange, "take", of_own),
        "averaged": lambda: before(Group, "save", lambda _, place=None: place is not None and place.round == at + 1),
        "mean saved": lambda: after(Group, "save", lambda _, place=None: place is not None and place.round == at + 1),
        "mean said": lambda: after(Exchange, "put", of_own),
        "group saved": lambda: after(Group, "save", lambda _, place=None: place is not None and place.updates > at),
        "saved": lambda: after(Training, "save_if_due", lambda self, *_: self.step == at + 1),
    }  # fmt: skip
    if fault == "half written":
        own = checkpoint._sync

        def sync(path: Path) -> None:
            if f"step-{at + 1}" in str(path):
                die()
            own(path)

        checkpoint._sync = sync  # type: ignore[assignment]
    elif fault:
        places[fault]()


def host(say: Callable[[dict[str, Any]], None], folder: str, port: int = 0, fault: str = "", at: int = 0,
         model: str = "tests.split_models:tiny", cut: str = "layers.0:layers.3", keys: str = "",
         groups: Mapping[str, Any] | None = None, scheme: str = "", mesh: Sequence[int] = (), rank: int = 0,
         master: int = 0) -> None:  # fmt: skip
    """A host on loopback; says its port; ends on SIGTERM. With a mesh (dp, pp, tp) one rank of it."""
    from merak_like.split.groups import group_of
    from merak_like.split.half import Source
    from merak_like.split.host import Host
    from merak_like.split.tls import Keys

    arm(fault, at)
    source, crew = Source(lambda: made(model)), None
    if mesh:
        crew = joined(cut, mesh, rank, master, (lambda: say({})) if rank else None)
        if rank:
            return _help(source, crew)
    served = Host(
        source, cut, crew=crew, listen=f"{scheme}127.0.0.1:{port}", folder=folder,
        keys=Keys(Path(keys), "host") if keys else None,
        groups={name: group_of(entry, name) for name, entry in (groups or {}).items()},
    )  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: served.drain())
    served.run(lambda it: say({"port": it.port}))


def joined(cut: str, mesh: Sequence[int], rank: int, master: int, here: Callable[[], None] | None) -> Any:
    """The crew of a host as torchrun would start it; ``here`` is called before the other ranks are waited for."""
    from merak_like.partitioner.mesh import Mesh
    from merak_like.runtime.initialize import join
    from merak_like.split.crew import Crew
    from merak_like.split.cut import Cut
    from merak_like.split.order import stage_rank

    degrees = Mesh(*mesh)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(degrees.size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(master)
    )  # fmt: skip
    if here is not None:
        here()
    world = join(degrees, timeout=40, device="cpu")
    return Crew(world, stage_rank("host", Cut.parse(cut), degrees.pp), degrees)


def _help(source: Any, crew: Any) -> None:
    import torch

    from merak_like.split.helper import Helper

    Helper(source, crew, torch.device("cpu")).run()


def blocks(say: Callable[[dict[str, Any]], None], folder: str, first: int, stop: int, fault: str = "", at: int = 0,
           model: str = "tests.split_models:gpt2") -> None:  # fmt: skip
    """A host of blocks on loopback, which may die before it answers a pass; says its port; ends on SIGTERM."""
    from merak_like.split.blocks.rooms import Rooms
    from merak_like.split.blocks.runner import Runner
    from merak_like.split.blocks.serving import BlockHost
    from merak_like.split.half import Source

    passes = {"computed": (Runner, "run"), "answered": (Rooms, "_pass")}
    if fault:
        kind, name = passes[fault]
        own, count = getattr(kind, name), [0]

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            made = own(self, *args, **kwargs)
            count[0] += 1
            if count[0] == at:
                die()
            return made

        setattr(kind, name, counted)
    served = BlockHost(Source(lambda: made(model)), first, stop, listen="127.0.0.1:0", folder=folder)
    signal.signal(signal.SIGTERM, lambda *_: served.drain())
    served.run(lambda it: say({"port": it.port}))


def edge(say: Callable[[dict[str, Any]], None], folder: str, ports: list[int], steps: int, task: dict[str, Any],
         fault: str = "", at: int = 0, model: str = "tests.split_models:tiny", scheme: str = "") -> None:  # fmt: skip
    """An edge that trains; says the losses it saw."""
    from merak_like.split.edge import Edge
    from merak_like.split.half import Source
    from merak_like.split.messages import Task
    from tests.split_models import again, tiny_batch

    say({})
    arm(fault, at)
    losses: dict[int, float] = {}
    known = Edge(
        Source(lambda: made(model)), Task.model_validate(task, strict=False), tiny_batch(0),
        connect=[f"{scheme}127.0.0.1:{port}" for port in ports], folder=folder, patience=30,
    )  # fmt: skip
    with known:
        known.train(
            lambda step: again(step)[0], steps, samples=lambda step: again(step)[1],
            on_step=lambda step, result: losses.__setitem__(step, result.loss),
        )  # fmt: skip
        known.save()
    say({"losses": losses})


def made(spec: str) -> Any:
    """The model of ``module:function``."""
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)()[0]


def main() -> None:
    """Obey commands line by line."""
    import torch

    from merak_like.partitioner.tracer import trace
    from tests.split_models import tiny

    torch.set_num_threads(1)
    trace(*tiny())  # brings in what tracing needs, seconds of imports, once for all children
    torch.optim.AdamW([torch.zeros(1)])
    signal.alarm(5 * LONGEST)
    pipes: dict[int, int] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "start":
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                signal.alarm(LONGEST)
                say = partial(_say, writing)
                try:
                    {"host": host, "edge": edge, "blocks": blocks}[command["role"]](say, **command["arguments"])
                except BaseException as error:
                    import traceback

                    traceback.print_exc()
                    say({"error": f"{type(error).__name__}: {error}"})
                    os._exit(1)
                os._exit(0)
            os.close(writing)
            pipes[pid] = reading
            answer = _word(reading) | {"pid": pid}
        else:
            _, status = os.waitpid(command["pid"], 0)
            answer = _word(pipes.pop(command["pid"])) | {"status": os.waitstatus_to_exitcode(status)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _say(pipe: int, told: dict[str, Any]) -> None:
    os.write(pipe, (json.dumps(told) + "\n").encode())


def _word(pipe: int) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        more = os.read(pipe, 1)
        if not more:
            return {}
        data += more
    return json.loads(data)


if __name__ == "__main__":
    main()
