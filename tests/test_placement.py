"""Which links talk goes over: who is near whom, by what runs on the devices."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from merak_like.partitioner.after import after_seconds
from merak_like.partitioner.hardware import hardware_named
from merak_like.partitioner.mesh import Coord, Mesh
from merak_like.partitioner.placement import hop, replica_stride
from merak_like.partitioner.plan import StageMemory

FUSED = hardware_named("a100")
TORCH = replace(FUSED, kernels="torch")


@pytest.mark.parametrize("mesh", [Mesh(4, 2, 2), Mesh(16, 3, 1), Mesh(3, 5, 3), Mesh(1, 4, 8), Mesh(5, 4, 1)])
def test_the_engine_places_ranks_as_its_mesh_does(mesh: Mesh):
    links = [TORCH.link(*(mesh.rank(Coord(dp, pp, 0)) for pp in (0, mesh.pp - 1))).bandwidth for dp in range(mesh.dp)]
    assert hop(mesh, TORCH, 0, mesh.pp - 1).bandwidth == min(links)
    assert hop(mesh, TORCH, mesh.pp - 1, 0) == hop(mesh, TORCH, 0, mesh.pp - 1)
    apart = [b - a for a, b in pairwise(mesh.rank(Coord(dp, 0, 0)) for dp in range(mesh.dp))]
    assert set(apart) <= {replica_stride(mesh, TORCH)}


def test_large_trainers_place_stages_furthest_apart():
    """Megatron-LM's own example, 16 devices, tp 2, pp 4: data-parallel groups 0 2, 1 3, ..., pipelines 0 4 8 12, ..."""
    mesh = Mesh(2, 4, 2)
    assert replica_stride(mesh, FUSED) == 2
    assert hop(mesh, FUSED, 0, 1).bandwidth == 2 * FUSED.intra.bandwidth  # 0 and 4: each tp rank sends its half
    assert hop(mesh, FUSED, 1, 2).bandwidth == 2 * FUSED.inter.bandwidth  # 4 and 8
    held = [StageMemory(weights=10**9, gradients=2 * 10**9)]
    mesh = Mesh(8, 8, 1)
    near, far = (after_seconds(mesh, h, held, 0, zero=0, hidden=0.0)["reduction"] for h in (FUSED, TORCH))
    assert far > 5 * near


def test_gradients_travel_as_they_are_kept_and_zero_3_talks_in_every_pass():
    mesh, held = Mesh(8, 1, 1), StageMemory(weights=10**9, gradients=2 * 10**9)

    def reduction(zero: int, micro_batches: int = 1, held: StageMemory = held) -> float:
        return after_seconds(mesh, FUSED, [held], 0, zero=zero, hidden=0.0, micro_batches=micro_batches)["reduction"]

    assert reduction(0) == pytest.approx(2 * reduction(0, held=StageMemory(weights=10**9, gradients=10**9)), rel=1e-2)
    assert reduction(1) == pytest.approx(0.75 * reduction(0), rel=1e-2)  # fp32 scattered, bf16 gathered
    shared = StageMemory(weights=10**9 // 8, gradients=2 * 10**9 // 8)
    assert reduction(3, held=shared) == pytest.approx(reduction(0), rel=1e-2)  # two gathers of 2 bytes, a scatter of 4
    assert reduction(3, 4, shared) == pytest.approx(4 * reduction(3, 1, shared))
    assert reduction(0, 4) == reduction(0)


def test_gradients_that_are_summed_lie_in_flat_memory_which_the_engine_clears_and_adds_to():
    """Beside one rank's, whose first gradient is kept as it came; kernels of large trainers add every one."""
    held = StageMemory(weights=10**9, gradients=10**9)
    for hardware, flat in ((TORCH, TORCH.streaming_seconds(4 * 10**9)), (FUSED, 0.0)):
        found = after_seconds(Mesh(2, 1, 1), hardware, [held], 10**6, zero=0, hidden=10.0)
        assert found["reduction"] == pytest.approx(flat + (1 - hardware.overlap) * hardware.all_reduce_seconds(1e9, 2))
        assert found["ties"] == pytest.approx(flat / 1000 + hardware.all_reduce_seconds(1e6, 2))
    alone = after_seconds(Mesh(1, 1, 1), TORCH, [held], 0, zero=0, hidden=0.0)
    assert (alone["reduction"], alone["ties"]) == (0, 0)


def test_a_sum_over_nodes_pays_few_latencies_between_them():
    ranks = 16
    between = FUSED.all_reduce_seconds(1, ranks)
    assert between == pytest.approx(2 * (3 * FUSED.intra.latency + FUSED.inter.latency), rel=1e-3)


def test_a_call_costs_its_host():
    slow = replace(FUSED, collective_seconds=1e-3)
    assert slow.all_reduce_seconds(10**6, 8) == pytest.approx(FUSED.all_reduce_seconds(10**6, 8) + 1e-3)
    assert slow.all_reduce_seconds(10**6, 1) == 0


def test_rings_of_several_devices_meet_on_adapters_that_devices_share():
    """One device's ring has its part of an adapter, and that of all devices has them all."""
    shared = replace(FUSED, devices_per_adapter=2)
    links = {stride: [h.group_link(32, stride).bandwidth for h in (FUSED, shared)] for stride in (1, 2, 4, 8)}
    assert {stride: own / meeting for stride, (own, meeting) in links.items()} == {1: 1, 2: 2, 4: 2, 8: 1}
    assert shared.group_link(8) == FUSED.group_link(8), "inside a node"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("a100-80g", "a100-80gb"), ("A100-SXM4-80GB", "a100-80gb"), ("NVIDIA H100", "h100"), ("h100_sxm5", "h100"),
        ("v100", "v100-32gb"), ("a100-40G", "a100-40gb"), ("MI300X", "mi300x"),
    ],
)  # fmt: skip
def test_hardware_by_the_names_people_use(asked: str, found: str):
    assert hardware_named(asked).name == found
