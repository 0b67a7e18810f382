"""Which blocks' activations wait elsewhere: what the planner finds fastest, against trying every set of blocks."""

from __future__ import annotations

import random
from functools import cache
from itertools import chain, combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like import Mesh, Plan, auto_parallel, make_plan, trace
from merak_like.deciding import alone, settled
from merak_like.partitioner.elsewhere import ALL, by_stage, chosen
from merak_like.partitioner.graph import ProxyGraph
from merak_like.runtime.methods.offload import SMALLEST, Offload
from merak_like.runtime.methods.planned_bytes import with_kept_elsewhere
from merak_like.runtime.precision import Precision
from merak_like.runtime.spreading import Spreading

WIDTH, BLOCKS = 64, 4
BATCH = {"x": torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Model(nn.Module):
    """Equal blocks, and nothing else to speak of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@cache
def graph() -> ProxyGraph:
    return trace(Model().train(), {"x": BATCH["x"][:16]}, device="cpu").graph


def plan(away: Any, pp: int, bandwidth: float, limit: int | None = None, **more: Any) -> Plan:
    there = with_kept_elsewhere(graph(), tuple(away), SMALLEST, bandwidth)
    return make_plan(
        there, Mesh(pp=pp), hardware="a100-80gb", batch=64, micro_batches=4, memory_limit=limit, schedule="gpipe",
        thorough=False, **more,
    )  # fmt: skip


def bytes_of(one: Plan) -> int:
    return max(kinds["total"] for kinds in one.memory_bytes)


@pytest.mark.parametrize(("pp", "share"), [(1, 0.7), (2, 0.2)])
@pytest.mark.parametrize("bandwidth", [1e6, 3e7, 1e12])
def test_choice_is_the_best_of_all(pp: int, bandwidth: float, share: float) -> None:
    """A slow link computes again, a fast one copies, and between them some do this and some that."""
    most, least = (bytes_of(plan((), pp, bandwidth, recompute=name)) for name in ("none", "full"))
    limit = int(least + share * (most - least))

    def seconds(away: Any) -> float:
        try:
            return plan(sorted(away), pp, bandwidth, limit).step_seconds
        except ValueError:
            return float("inf")

    stages = by_stage(graph(), plan((), pp, bandwidth, limit).starts)
    names = [f"blocks.{n}" for n in range(BLOCKS)]
    assert list(chain(*stages)) == names
    found = chosen(stages, seconds)
    every = [seconds(some) for count in range(BLOCKS + 1) for some in combinations(names, count)]
    assert seconds(found) == pytest.approx(min(every), rel=1e-9)
    assert bandwidth == 3e7 or bool(found) == (bandwidth > 3e7), found


def test_many_blocks_are_looked_at_in_steps_that_halve() -> None:
    """Where every stage has a best number of its own."""
    for seed in range(20):
        draw = random.Random(seed)
        stages = [[f"{stage}.{n}" for n in range(draw.randint(3, 9))] for stage in range(3)]
        best = [draw.randint(0, len(stage)) for stage in stages]
        asked: list[int] = []

        def seconds(away: frozenset[str], best: list[int] = best, asked: list[int] = asked) -> float:
            asked.append(1)
            counts = [sum(path.startswith(f"{stage}.") for path in away) for stage in range(3)]
            return sum(abs(count - right) for count, right in zip(counts, best, strict=True))

        found = chosen(stages, seconds)
        assert [sorted(found & set(stage)) for stage in stages] == [
            stage[:count] for stage, count in zip(stages, best, strict=True)
        ]
        whole = len(list(product(*(range(len(stage) + 1) for stage in stages))))
        assert whole > ALL
        assert len(asked) < whole


def test_engine_has_the_choice() -> None:
    most, least = (bytes_of(plan((), 1, 1e12, recompute=name)) for name in ("none", "full"))
    limit = (most + least) // 2
    asked: dict[str, Any] = {"schedule": "gpipe", "hardware": "a100-80gb", "memory_limit": limit, "fuse": True}
    given = [Offload("auto", bandwidth=1e12)], Model(), None, BATCH, Mesh(), 4, Spreading(), Precision()
    (found,) = settled(*given, on_cpu=False, **asked)  # type: ignore[misc]
    assert repr(found).startswith(r"Offload(blocks='blocks\\.0")
    assert settled(*given, on_cpu=True, **asked) == ()  # type: ignore[misc]
    again, away = (
        alone(Model(), Mesh(), BATCH, micro_batches=4, methods=methods, **asked) for methods in ((), given[0])
    )
    assert away.step_seconds < again.step_seconds
    said = [note for note in away.notes if "Offload" in note]
    assert said == [f"some activations wait in the machine's memory: planned for methods=[{found!r}]"]
    like = alone(Model(), Mesh(), BATCH, micro_batches=4, methods=[found], **asked)
    assert like.digest == away.digest, "what the note says is what was planned"
    engine = auto_parallel(Model(), example=BATCH, hardware="a100-80gb", device="cpu", methods=given[0])
    engine.close()
    with pytest.raises(ValueError, match="beside plan= say those that it was made with, as its notes have"):
        auto_parallel(Model(), example=BATCH, plan=engine.plan, device="cpu", methods=given[0])
    with pytest.raises(ValueError, match=r"Offload\(blocks='auto'\) follows calls of modules, and with tp=2"):
        alone(Model(), Mesh(tp=2), BATCH, hardware="a100-80gb", methods=given[0])
