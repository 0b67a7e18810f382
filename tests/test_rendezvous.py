"""Ranks that are started again find each other, and not those that are gone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store  # pyright: ignore[reportPrivateImportUsage]

from merak_like.runtime import rendezvous
from merak_like.runtime.rendezvous import agree_on_name, begin, begun_before


def names(store: Store, ranks: range, size: int, seconds: float = 20.0) -> list[str]:
    """What these ranks agree on, each in a thread."""
    with ThreadPoolExecutor(size) as pool:
        waits = [pool.submit(agree_on_name, store, rank, size, timedelta(seconds=seconds)) for rank in ranks]
        return [wait.result() for wait in waits]


def test_each_start_has_a_name_of_its_own() -> None:
    """Torchrun's store keeps what earlier starts left in it, also of one that not all ranks lived to join."""
    store = HashStore()
    first = names(store, range(4), 4)
    with pytest.raises(TimeoutError):
        names(store, range(2), 4, seconds=0.3)
    again = [names(store, range(4), 4) for _ in range(3)]
    assert all(len(set(one)) == 1 for one in (first, *again))
    assert len({first[0], *(one[0] for one in again)}) == 4


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"rank 0 waited 0 s for ranks \[1, 2\] to start"):
        agree_on_name(HashStore(), 0, 3, timedelta(seconds=0.2))
    with pytest.raises(TimeoutError, match=r"rank 2 waited 0 s for rank 0 to start"):
        agree_on_name(HashStore(), 2, 3, timedelta(seconds=0.2))


def test_only_later_processes_find_a_job_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that died before it began leaves nothing to go on from, and one process may make several engines."""
    store = HashStore()
    assert not begun_before(store, "a")
    begin(store, "a")
    assert not begun_before(store, "a")
    monkeypatch.setattr(rendezvous, "PROCESS", "another")
    assert begun_before(store, "a")


def test_second_work_of_a_restarted_script_is_found_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """What began the first work anew was taken for what had begun the second one, which was then thrown away."""
    store = HashStore()
    begin(store, "first")
    begin(store, "second")
    monkeypatch.setattr(rendezvous, "PROCESS", "another")
    assert begun_before(store, "first")
    begin(store, "first")
    assert begun_before(store, "second")
    assert not begun_before(store, "third")
