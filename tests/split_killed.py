"""A group whose host is killed, in processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from merak_like.split.groups import GroupText
from tests.split_groups import CUT, Ward
from tests.split_process import Nursery


def changes_nothing(nursery: Nursery, certificates: Path, group: GroupText, folder: Path, place: str) -> None:
    """Assert that SIGKILL at this place of step 3, and a new host, leave to the last bit what a calm run does."""
    calm = kept(nursery, certificates, group, folder / "calm", "")
    shaken = kept(nursery, certificates, group, folder / "shaken", place)
    assert calm.keys() == shaken.keys()
    assert all(torch.equal(calm[name], shaken[name]) for name in calm)


def kept(nursery: Nursery, certificates: Path, group: GroupText, folder: Path, fault: str) -> dict[str, Tensor]:
    """All weights after six steps of each member; ``fault`` is where the first host dies, empty: nowhere."""
    options = {"keys": str(certificates), "groups": {"ward": group.model_dump(mode="json")}, "cut": CUT,
               "model": "tests.split_groups:made", "folder": str(folder / "host")}  # fmt: skip
    host = nursery.start("host", fault=fault, at=3, **options)
    restarted: list[dict[str, int]] = []

    def again() -> None:
        assert nursery.wait(host["pid"])["status"] == -signal.SIGKILL
        restarted.append(nursery.start("host", port=host["port"], **options))

    with Ward(folder, certificates, group, port=host["port"]) as ward:
        for name in group.members:
            ward.edge(name, codec="aqsgd(4)|int8")
        watcher = Thread(target=again)
        if fault:
            watcher.start()
        ward.train(**dict.fromkeys(group.members, 6))
        if fault:
            watcher.join(60)
            assert restarted, f"nobody died at {fault!r}"
        last = restarted[-1] if fault else host
        os.kill(last["pid"], signal.SIGTERM)
        assert nursery.wait(last["pid"])["status"] == 0
        return ward.kept()
