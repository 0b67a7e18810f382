"""What a host gives at most, to whom, and for how long."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest

from merak_like.split import checkpoint
from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Ledger, Limits, NoRoom
from merak_like.split.messages import Task
from tests import split_models

MODEL, BATCH = split_models.calm()
SOURCE, TASK = Source(lambda: copy.deepcopy(MODEL)), Task(cut="layers.0:layers.3")


def dialling(host: Host, folder: Path) -> Edge:
    return Edge(SOURCE, TASK, BATCH, connect=f"127.0.0.1:{host.port}", folder=folder, patience=0.5)


def hosted(folder: Path, limits: Limits) -> Host:
    return Host(SOURCE, TASK.cut, listen="127.0.0.1:0", folder=folder / "host", limits=limits)


@pytest.mark.slow
@pytest.mark.parametrize(("limits", "said"), [
    (Limits(sessions_per_client=1), "1 of 1 sessions of this client"), (Limits(sessions=1), "1 of this host are open"),
])  # fmt: skip
def test_a_session_too_many_is_refused_and_the_others_go_on(limits: Limits, said: str, tmp_path: Path):
    with hosted(tmp_path, limits) as host, dialling(host, tmp_path / "one") as one:
        one.step(BATCH)
        with dialling(host, tmp_path / "two") as two, pytest.raises(ValueError, match=said):
            two.step(BATCH)
        assert one.step(BATCH).loss > 0


@pytest.mark.slow
def test_a_session_that_nobody_uses_gives_its_memory_back_and_goes_on_later(tmp_path: Path):
    with hosted(tmp_path, Limits(sessions=1, lease=0.2)) as host:
        with dialling(host, tmp_path / "one") as one:
            first = one.step(BATCH).loss
        session = str(one.session)
        before = host.registry.ledger.held
        time.sleep(0.3)
        with dialling(host, tmp_path / "two") as two:
            assert two.step(BATCH).loss == first
        assert session not in host.registry.live
        assert host.registry.ledger.held == before
        assert checkpoint.whole(tmp_path / "host/sessions" / session)[-1] == 1
        time.sleep(0.3)
        with dialling(host, tmp_path / "one") as again:
            assert again.step_number == 0  # this edge was not asked to keep its first step
            assert again.step(BATCH).loss == first


def test_memory_is_promised_once():
    ledger = Ledger(100)
    ledger.reserve("ann", 60)
    with pytest.raises(NoRoom, match="0 MB are left"):
        ledger.reserve("bob", 60)
    ledger.release("ann")
    ledger.reserve("bob", 60)
    assert ledger.held == 60
