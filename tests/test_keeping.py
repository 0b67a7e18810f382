"""Which blocks' activations wait elsewhere: what the planner finds fastest, against trying every set of blocks."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, combinations, product
from math import comb, prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merak_like import Mesh, Plan, auto_parallel, make_plan, trace
from merak_like.deciding import alone, settled
from merak_like.partitioner.graph import ProxyGraph
from merak_like.partitioner.hardware import Hardware, hardware_named
from merak_like.partitioner.keeping import Ways, by_stage, chosen
from merak_like.runtime.methods.by_blocks import ByBlocks
from merak_like.runtime.methods.compress import Compress
from merak_like.runtime.methods.offload import Offload
from merak_like.runtime.methods.planned_bytes import Coder, with_packed_inputs
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


FAST = hardware_named("a100-80gb")
DEAR = replace(FAST, name="dear", peak_flops={"float32": 1e9}, launch_seconds=1e-9, half_flops=0.0)
"""A device on which products are dear and memory is quick: there packing is cheaper than computing again."""


def plan(
    kept: Sequence[Collection[str]], pp: int, methods: Sequence[ByBlocks], limit: int | None = None,
    hardware: Hardware = FAST, **more: Any,
) -> Plan:  # fmt: skip
    there = graph()
    for method, paths in zip(methods, kept, strict=True):
        there = method.planned(there, tuple(sorted(paths)))
    return make_plan(
        there, Mesh(pp=pp), hardware=hardware, batch=64, micro_batches=4, memory_limit=limit, schedule="gpipe",
        thorough=False, **more,
    )  # fmt: skip


def bytes_of(one: Plan) -> int:
    return max(kinds["total"] for kinds in one.memory_bytes)


def between(share: float, pp: int, hardware: Hardware = FAST) -> int:
    """Bytes between what a rank takes that computes everything again and one that keeps everything."""
    most, least = (
        bytes_of(plan([()], pp, [Offload()], hardware=hardware, recompute=name)) for name in ("none", "full")
    )  # fmt: skip
    return int(least + share * (most - least))


def found_and_best(
    methods: Sequence[ByBlocks], pp: int, limit: int, hardware: Hardware = FAST
) -> tuple[Ways, float, float]:
    """What is chosen, its seconds, and the fewest of all ways to send each block one way or none."""

    def seconds(kept: Sequence[Collection[str]]) -> float:
        try:
            return plan(kept, pp, methods, limit, hardware).step_seconds
        except ValueError:
            return float("inf")

    count = len(methods)
    stages = by_stage(graph(), plan([()] * count, pp, methods, limit, hardware).starts)
    names = [f"blocks.{n}" for n in range(BLOCKS)]
    assert list(chain(*stages)) == names
    found = chosen(stages, count, seconds)
    every = product(range(count + 1), repeat=BLOCKS)
    best = min(seconds([[n for n, w in zip(names, way, strict=True) if w == k] for k in range(count)]) for way in every)
    return found, seconds(found), best


@pytest.mark.parametrize(("pp", "share"), [(1, 0.7), (2, 0.2)])
@pytest.mark.parametrize("bandwidth", [1e6, 3e7, 1e12])
def test_choice_is_the_best_of_all(pp: int, bandwidth: float, share: float) -> None:
    """A slow link computes again, a fast one copies, and between them some do this and some that."""
    (found,), takes, best = found_and_best([Offload(bandwidth=bandwidth)], pp, between(share, pp))
    assert takes == pytest.approx(best, rel=1e-9)
    assert bandwidth == 3e7 or bool(found) == (bandwidth > 3e7), found


@pytest.mark.parametrize(("pp", "share"), [(1, 0.5), (2, 0.2)])
@pytest.mark.parametrize("coded", [1e-4, 1e-2, 1.0])
def test_blocks_are_kept_packed_or_computed_again(pp: int, share: float, coded: float) -> None:
    """Cheap codes are taken, dear ones never; the planner computes again what is neither packed nor fits."""

    class Priced(Compress):
        def planned(self, graph: ProxyGraph, inside: tuple[str, ...] | None) -> ProxyGraph:
            return with_packed_inputs(graph, 1, Coder(4.0, 1e7 * coded, 1e7 * coded), inside)

    (found,), takes, best = found_and_best([Priced()], pp, between(share, pp, DEAR), DEAR)
    assert takes == pytest.approx(best, rel=1e-9)
    assert coded == 1e-2 or bool(found) == (coded < 1e-2), found


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_some_are_moved_and_some_are_packed(share: float) -> None:
    """Both together, against every way to treat each block."""
    limit = between(share, 1)
    methods = [Offload(bandwidth=1e7), Compress()]
    found, takes, best = found_and_best(methods, 1, limit, DEAR)
    assert takes <= best * 1.001  # the ways lie one behind the other; a gap between them may be a little better
    assert all(not a & b for a, b in combinations(found, 2))
    alone = [found_and_best([method], 1, limit, DEAR)[1] for method in methods]
    assert takes <= min(alone)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("methods", [[Compress()], [Offload(bandwidth=1e7)], [Offload(bandwidth=1e7), Compress()]])
def test_what_the_caller_has_computed_again_costs_no_packing(methods: list[ByBlocks], pp: int) -> None:
    """The engine neither packs nor moves what does not wait; a plan counted both, and the fewer bytes besides."""
    names = [f"blocks.{n}" for n in range(BLOCKS)]
    kept = [names] if len(methods) == 1 else [names[:2], names[2:]]
    given, plain = (plan(some, pp, methods, recompute="none") for some in (kept, [()] * len(methods)))
    assert given.step_seconds > plain.step_seconds
    assert bytes_of(given) < bytes_of(plain)
    for word in ("full", "blocks"):
        given, plain = (plan(some, pp, methods, recompute=word) for some in (kept, [()] * len(methods)))
        assert given.step_seconds == plain.step_seconds
        assert given.memory_bytes == plain.memory_bytes
        assert given.starts == plain.starts


@pytest.mark.parametrize("ways", [1, 2])
def test_many_blocks_are_looked_at_in_steps_that_halve(ways: int) -> None:
    """Where every stage has best numbers of its own."""
    for seed in range(20):
        draw = random.Random(seed)
        stages = [[f"{stage}.{n}" for n in range(draw.randint(4, 9))] for stage in range(3)]
        best = [[draw.randint(0, len(stage) // ways) for _ in range(ways)] for stage in stages]
        asked: list[int] = []

        def counts(kept: Ways) -> list[list[int]]:
            return [[sum(path.startswith(f"{stage}.") for path in way) for way in kept] for stage in range(3)]

        def seconds(kept: Ways, best: list[list[int]] = best, asked: list[int] = asked) -> float:
            asked.append(1)
            pairs = zip(chain(*counts(kept)), chain(*best), strict=True)
            return sum(abs(count - right) for count, right in pairs)

        found = chosen(stages, ways, seconds)
        assert counts(found) == best
        for stage in stages:  # one way after the other, from the first block on
            order = [path for way in found for path in stage if path in way]
            assert order == stage[: len(order)]
        assert len(asked) < prod(comb(len(stage) + ways, ways) for stage in stages)


def test_engine_has_the_choice() -> None:
    asked: dict[str, Any] = {
        "schedule": "gpipe", "hardware": "a100-80gb", "memory_limit": between(0.5, 1), "fuse": True
    }  # fmt: skip

    def given(*methods: ByBlocks) -> tuple[Any, ...]:
        return methods, Model(), None, BATCH, Mesh(), 4, Spreading(), Precision()

    auto = Offload("auto", bandwidth=1e12)
    (found,), told = settled(*given(auto), on_cpu=False, **asked)
    assert repr(found).startswith(r"Offload(blocks='blocks\\.0")
    assert not told
    assert settled(*given(auto), on_cpu=True, **asked) == (
        (), ("Offload('auto') takes no block: on a CPU both memories are one",)
    )  # fmt: skip
    again, away = (
        alone(Model(), Mesh(), BATCH, micro_batches=4, methods=methods, **asked) for methods in ((), (auto,))
    )
    assert away.step_seconds < again.step_seconds
    said = [note for note in away.notes if "Offload" in note]
    assert said == [f"some activations wait in the machine's memory: planned for methods=[{found!r}]"]
    like = alone(Model(), Mesh(), BATCH, micro_batches=4, methods=[found], **asked)
    assert like.digest == away.digest, "what the note says is what was planned"
    engine = auto_parallel(Model(), example=BATCH, hardware="a100-80gb", device="cpu", methods=[auto])
    engine.close()
    with pytest.raises(ValueError, match="beside plan= say those that it was made with, as its notes have"):
        auto_parallel(Model(), example=BATCH, plan=engine.plan, device="cpu", methods=[auto])
    with pytest.raises(ValueError, match=r"Offload\(blocks='auto'\) follows calls of modules, and with tp=2"):
        alone(Model(), Mesh(tp=2), BATCH, hardware="a100-80gb", methods=[auto])


def test_engine_packs_the_blocks_that_were_chosen() -> None:
    """On a CPU as well: some blocks' inputs are packed while the model trains, and only theirs."""
    auto, batch = Compress(0.02, adapt=False, blocks="auto"), {"x": BATCH["x"]}
    asked: dict[str, Any] = {"schedule": "gpipe", "memory_limit": between(0.6, 1), "hardware": DEAR, "micro_batches": 4}
    plan = alone(Model(), Mesh(), batch, methods=[auto], **asked)
    (told,) = [note for note in plan.notes if "planned for methods=[Compress(" in note]
    found = re.findall(r"blocks\\\\.(\d)", told)
    assert 0 < len(found) < BLOCKS
    method = Compress(0.02, adapt=False, blocks="|".join(rf"blocks\.{n}" for n in found))
    engine = auto_parallel(Model(), example=batch, device="cpu", methods=[method], **asked)
    assert engine.plan.stages == plan.stages
    assert told in engine.plan.notes
    engine.step(batch)
    engine.close()
    assert method.counted[0] == len(found) * 64 * (WIDTH + 8 * WIDTH) * 4
    assert method.counted[0] > 4 * method.counted[1]
