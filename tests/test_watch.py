"""No wait is endless or nameless, the rank to blame is named, and ranks that do not agree are told so."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from merak_like import Mesh
from merak_like.runtime import collect
from merak_like.runtime.initialize import World, join
from merak_like.runtime.pulse import GAVE_UP, Pulse
from merak_like.runtime.watch import ACTION, PeerError, Watch, work_is_queued

CPU = torch.device("cpu")
MINUTE = timedelta(seconds=60)


class Stuck:
    """A transfer whose other side is gone or silent."""

    def __init__(self, error: str = "", seconds: float = 0.0) -> None:
        self.error, self.seconds = error, seconds

    def wait(self, limit: timedelta) -> bool:
        time.sleep(self.seconds)
        if self.error:
            raise RuntimeError(self.error)
        return False


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (Stuck("[pair.cc:553] Connection closed by peer [127.0.0.1]:5\nmore"), r"the peer is gone \(.*closed by peer"),
        (Stuck("Timed out waiting 6000ms for recv operation"), r"nothing came in time \(Timed out"),
        (Stuck("something else"), r"something else"),
        (Stuck(), r"nothing came in time \(timed out after 60 s"),
    ],
)
def test_wait_that_fails_names_what_from_whom_and_the_action(work: Stuck, said: str) -> None:
    watch = Watch(3, MINUTE)
    wanted = rf"^rank 3 gave up waiting for h of RECV_F0.1<0 from rank 2: {said}.*; {re.escape(ACTION)}$"
    with pytest.raises(PeerError, match=wanted):
        watch.wait(work, "h of RECV_F0.1<0", "from rank 2")
    watch.close()
    assert watch.closed
    assert not any(thread.name == "merak-watch" and thread is watch._thread for thread in threading.enumerate())


def test_long_wait_is_told_once() -> None:
    lines: list[str] = []
    watch = Watch(1, timedelta(seconds=0.4), report=lines.append)
    with pytest.raises(PeerError):
        watch.wait(Stuck(seconds=0.8), "h", "from rank 0")
    with watch.waiting("a short one"):
        pass
    watch.close()
    assert len(lines) == 1
    assert re.match(r"\[merak\] rank 1 has been waiting 0 s for h from rank 0; it will give up after 0 s", lines[0])


def test_work_of_nccl_is_only_queued() -> None:
    assert work_is_queued(type("ProcessGroupNCCL::WorkNCCL", (), {})())
    assert not work_is_queued(Stuck())


def pulses(monkeypatch: pytest.MonkeyPatch, size: int) -> list[Pulse]:
    monkeypatch.setattr("merak_like.runtime.pulse.PATIENCE", 0.2)
    monkeypatch.setattr("merak_like.runtime.pulse.INTERVAL", 0.02)
    store = dist.HashStore()  # type: ignore[attr-defined]
    return [Pulse(store, rank, size) for rank in range(size)]


def beating(pulse: Pulse, stop: threading.Event) -> threading.Thread:
    def beat() -> None:
        while not stop.wait(0.02):
            pulse.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    return thread


def test_the_rank_that_stopped_counting_is_to_blame_not_those_that_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, alive, silent, gone = pulses(monkeypatch, 4)
    stop = threading.Event()
    thread = beating(alive, stop)
    gone.note(GAVE_UP)
    try:
        assert mine.look() == "rank 2 gives no sign of life: it was killed, is frozen or cut off"
        silent.note("KeyError: 'a bug'")
        assert mine.look() == "rank 2 failed with KeyError: 'a bug'"
        silent.note("")
        silent_thread = beating(silent, stop)
        assert mine.look() == "", "all are well"
    finally:
        stop.set()
    thread.join()
    silent_thread.join()


def test_one_alarm_makes_every_watch_look_around(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = pulses(monkeypatch, 3)
    watches = [Watch(rank, MINUTE, pulse) for rank, pulse in enumerate((first, second))]
    with pytest.raises(PeerError, match="rank 0 gave up waiting for h from rank 1: rank 2 gives no sign of life"):
        watches[0].wait(Stuck("closed by peer"), "h", "from rank 1")
    begin = time.monotonic()
    with pytest.raises(PeerError, match="rank 1 gave up waiting for h from rank 0: rank 2 gives no sign of life"):
        watches[1].wait(Stuck("closed by peer"), "h", "from rank 0")
    assert time.monotonic() - begin < 1.0, "it had looked around already"
    for watch in watches:
        watch.close()


def test_what_a_rank_fails_with_is_told_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (pulse,) = pulses(monkeypatch, 1)
    watch = Watch(0, MINUTE, pulse)
    with pytest.raises(KeyError), watch.telling():
        raise KeyError("a bug")
    assert pulse.look() == "rank 0 failed with KeyError: 'a bug'"
    with watch.telling():
        pass
    assert pulse.look() == ""
    with pytest.raises(PeerError), watch.telling():
        raise PeerError("another rank")
    assert pulse.look() == ""
    assert not watch.closed
    with pytest.raises(KeyError), watch.starting():
        raise KeyError("no engine")
    assert watch.closed


def test_odd_ranks_are_named_with_what_they_said() -> None:
    facts = {"plan": "a" * 64, "seed": "3"}
    assert list(collect._odd(facts, [facts] * 4)) == []
    said = [facts, facts | {"plan": "b" * 64}, facts, facts | {"seed": "4"}, facts | {"plan": "c" * 64}]
    assert list(collect._odd(facts, said)) == [
        "plan: rank 1 has bbbbbbbbbbbb, rank 4 has cccccccccccc, the others aaaaaaaaaaaa",
        "seed: rank 3 has 4, the others 3",
    ]
    assert list(collect._odd(facts, [facts, {"plan": "a" * 64}])) == ["seed: rank 1 has nothing, the others 3"]


def test_fingerprints_see_every_bit() -> None:
    tensors = {"a": torch.randn(4, 3), "b": torch.tensor(1.0, dtype=torch.bfloat16), "c": torch.tensor([True, False])}
    base = collect._fingerprints(tensors)
    assert base == collect._fingerprints({k: v.clone() for k, v in tensors.items()})
    assert collect._fingerprints({"t": tensors["a"].T}) == {"t": base["a"]}, "strides do not count"
    moved = {
        "a": torch.nextafter(tensors["a"], torch.tensor(9.0)),
        "b": -tensors["b"],
        "c": ~tensors["c"] | tensors["c"],
    }
    changed = collect._fingerprints(moved)
    assert all(changed[name] != base[name] for name in base)
    assert collect._fingerprints({}) == {}


def test_mesh_that_is_not_the_job_is_refused_alone() -> None:
    with pytest.raises(ValueError, match=r"2 \* 3 \* 1 = 6, but this is a single process: use torchrun"):
        join(Mesh(2, 3, 1), timeout=1)
    world = join(Mesh(), timeout=1, device="cpu")
    assert world == World(0, 1, CPU, timedelta(seconds=1))
    assert world.alone
