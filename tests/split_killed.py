"""A group whose host is killed, in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from merak_like.split.groups import GroupText
from tests.ranks import free_port
from tests.split_groups import CUT, Ward
from tests.split_process import Nursery


def on_ranks(nursery: Nursery, folder: Path, mesh: Sequence[int], **more: Any) -> tuple[list[int], int]:
    """A host on several ranks, started as torchrun's agent would; its processes, and the port it listens on."""
    faults = more.pop("faults", {})
    shared = {"folder": str(folder / "host"), "mesh": list(mesh), "master": free_port(), **more}
    pids, port = dict[int, int](), 0
    for rank in reversed(range(prod(mesh))):  # the first one says its port when all are there
        told = nursery.start("host", rank=rank, **shared, **faults.get(rank, {}))
        pids[rank], port = told["pid"], told.get("port", 0)
    return [pids[rank] for rank in range(prod(mesh))], port


def changes_nothing(
    nursery: Nursery, certificates: Path, group: GroupText, folder: Path, place: str, mesh: Sequence[int] = (),
    rank: int = 0,
) -> None:  # fmt: skip
    """Assert that SIGKILL at this place of step 3, and a new host, leave to the last bit what a calm run does."""
    calm = kept(nursery, certificates, group, folder / "calm", "", mesh)
    shaken = kept(nursery, certificates, group, folder / "shaken", place, mesh, rank)
    assert calm.keys() == shaken.keys()
    assert all(torch.equal(calm[name], shaken[name]) for name in calm)


def kept(
    nursery: Nursery, certificates: Path, group: GroupText, folder: Path, fault: str, mesh: Sequence[int],
    rank: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """All weights after six steps of each member; ``fault`` is where a rank of the first host dies, empty: nowhere."""
    options = {"keys": str(certificates), "groups": {"ward": group.model_dump(mode="json")}, "cut": CUT,
               "model": "tests.split_groups:made"}  # fmt: skip
    pids, port = on_ranks(nursery, folder, mesh, faults={rank: {"fault": fault, "at": 3}}, **options)
    restarted: list[list[int]] = []

    def again() -> None:
        assert nursery.wait(pids.pop(rank))["status"] == -signal.SIGKILL
        for other in pids:
            os.kill(other, signal.SIGKILL)
            nursery.wait(other)
        restarted.append(on_ranks(nursery, folder, mesh, port=port, **options)[0])

    with Ward(folder, certificates, group, port=port, even=bool(group.phi)) as ward:
        for name in group.members:
            ward.edge(name, codec="aqsgd(4)|int8")
        watcher = Thread(target=again)
        if fault:
            watcher.start()
        ward.train(**dict.fromkeys(group.members, 6))
        if fault:
            watcher.join(60)
            assert restarted, f"nobody died at {fault!r}"
        last = restarted[-1] if fault else pids
        os.kill(last[0], signal.SIGTERM)
        assert [nursery.wait(pid)["status"] for pid in last] == [0] * len(last)
        return ward.kept()
