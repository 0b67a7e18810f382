"""Collectives by messages: what torch's own give, on every rank the same bits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from merak_like.runtime import exchange
from tests.ranks import Call, torchrun

MINUTE = timedelta(seconds=60)
SIZE = 10
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def given(rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    """What a rank gives, which another can compute as well."""
    numbers = torch.randn(ranks, ranks * SIZE, generator=torch.Generator().manual_seed(7)) * 8
    return numbers.to(dtype)[rank]


def exchanges(world: int) -> dict[str, int]:
    """On each rank: begin all of them, then wait for all, and compare with what was given. Returns how each went."""
    dist.init_process_group("gloo")
    try:
        rank, group = dist.get_rank(), dist.new_group(backend="gloo")
        begun: list[tuple[str, Any, Tensor, Tensor]] = []
        for dtype in DTYPES:
            all_given = torch.stack([given(r, world, dtype) for r in range(world)])
            added, runs = all_given.sum(0, dtype=dtype), all_given.view(world, world, SIZE)
            for op, whole in ((exchange.SUM, added), (exchange.MAX, all_given.amax(0))):
                mine = given(rank, world, dtype)
                begun.append((f"reduce {dtype}", exchange.all_reduce(mine, group, op), mine, whole))
            own = torch.empty(SIZE, dtype=dtype)
            work = exchange.reduce_scatter(own, given(rank, world, dtype), group)
            begun.append((f"scatter {dtype}", work, own, added.view(world, SIZE)[rank]))
            flat = torch.empty(world * SIZE, dtype=dtype)
            work = exchange.all_gather(flat, runs[rank, 0].contiguous(), group)
            begun.append((f"gather {dtype}", work, flat, runs[:, 0].reshape(-1)))
            place = flat.clone()
            place.view(world, SIZE)[rank] = runs[rank, 0]
            work = exchange.all_gather(place, place.view(world, SIZE)[rank], group)
            begun.append((f"gather in place {dtype}", work, place, runs[:, 0].reshape(-1)))
            rows = torch.empty(2 * world, SIZE // 2, dtype=dtype)
            work = exchange.all_gather(rows, runs[rank, 0].reshape(2, -1), group)
            begun.append((f"gather rows {dtype}", work, rows, runs[:, 0].reshape(rows.shape)))
        for what, work, found, wanted in begun:
            assert work.wait(MINUTE) is not False, what
            torch.testing.assert_close(found, wanted, msg=lambda text, what=what: f"{what}: {text}")
            everywhere = [torch.empty_like(found) for _ in range(world)]
            dist.all_gather(everywhere, found)
            if "scatter" not in what:
                assert all(torch.equal(found, other) for other in everywhere), what
        kinds = [type(work).__name__ for _, work, *_ in begun]
        return {kind: kinds.count(kind) for kind in kinds}
    finally:
        dist.destroy_process_group()


@pytest.mark.ranks
@pytest.mark.timeout(120)
def test_two_ranks_swap_and_have_the_same_bits() -> None:
    job = torchrun([Call("two", "tests.test_exchange:exchanges", {"world": 2})], 2)
    assert job.results("two") == [{"Messages": 6 * len(DTYPES)}] * 2


@pytest.mark.ranks
@pytest.mark.timeout(120)
def test_more_ranks_send_runs_to_their_owners() -> None:
    job = torchrun([Call("three", "tests.test_exchange:exchanges", {"world": 3})], 3)
    assert [found["Messages"] for found in job.results("three")] == [len(DTYPES)] * 3


class Late:
    """A transfer that does not come."""

    def wait(self, limit: timedelta) -> bool:
        return limit > MINUTE


def test_what_did_not_come_is_not_added() -> None:
    done: list[str] = []
    note: Callable[[], None] = partial(done.append, "added")
    messages = exchange.Messages([Late(), Late()], note)
    assert messages.wait(MINUTE) is False
    assert done == []
    assert messages.wait(2 * MINUTE)
    assert done == ["added"]
