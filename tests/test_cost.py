"""What ops cost, by hand on a toy device; and the figures of real devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merak_like.partitioner import this_machine as machine
from merak_like.partitioner.cost import CostTable, op_cost, op_costs
from merak_like.partitioner.graph import Collective, Op
from merak_like.partitioner.hardware import PRESETS, Hardware, Link, hardware_named
from merak_like.partitioner.mesh import Mesh
from merak_like.partitioner.planner import make_plan
from tests.graphs import TOY, GraphBuilder, chain, gpt


def linear(*, input_grad: bool, trainable: bool) -> tuple[Op, GraphBuilder]:
    made = GraphBuilder()
    x = made.op("x", shape=(64, 64), grad=input_grad)
    made.weight("w", 64, 64, trainable=trainable)
    made.op("linear", x, params=("w",), shape=(64, 64), flops=10**9)
    return made.ops[-1], made


@pytest.mark.parametrize(("input_grad", "trainable", "gradients"), [(1, 1, 2), (0, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_backward_of_a_matmul_is_one_matmul_for_each_gradient(input_grad: int, trainable: int, gradients: int):
    """The gradient of the weight is the half that can be put off."""
    op, made = linear(input_grad=bool(input_grad), trainable=bool(trainable))
    cost = op_cost(op, made.graph(), TOY)
    assert cost.forward_seconds == pytest.approx(1e-3)
    assert cost.backward_seconds == pytest.approx(gradients * 1e-3)
    assert cost.weight_seconds == pytest.approx(trainable * 1e-3)
    assert (cost.flops, cost.param_bytes, cost.saved_bytes) == (10**9, 64 * 64 * 4, 64 * 64 * 4)


def test_a_measured_factor_is_the_backwards_alone():
    op, made = linear(input_grad=True, trainable=True)
    cost, plain = (op_cost(op, made.graph(), replace(TOY, backward_factor=factor)) for factor in (1.5, 1.0))
    assert cost.forward_seconds == plain.forward_seconds
    assert cost.backward_seconds == pytest.approx(1.5 * plain.backward_seconds)
    assert cost.weight_seconds == pytest.approx(1.5 * plain.weight_seconds)


def test_what_can_be_put_off():
    """Matrices and kernels of one product, and tables that are looked up; not norms, nor what is frozen."""
    made = GraphBuilder()
    x = made.op("x", shape=(4, 8), grad=True)
    ids = made.input("ids", (4,))
    matrix, vector, frozen = made.weight("m", 8, 8), made.weight("v", 8), made.weight("f", 8, 8, trainable=False)
    attribute = made.op("m", kind="attribute", params=(matrix,), shape=(8, 8))
    later = [
        made.op("layer", x, kind="module", params=(matrix, vector)),
        made.op("table", ids, kind="module", params=(matrix,)),
        made.op("torch.nn.functional.linear", x, attribute),
        made.op("matmul", x, attribute, kind="method"),
    ]
    now = [
        made.op("norm", x, kind="module", params=(vector,)),
        made.op("layer", x, kind="module", params=(frozen, vector)),
        made.op("torch.add", x, attribute),
        made.op("matmul", x, x, kind="method"),
    ]
    costs = {op.outputs[0].name: op_cost(op, made.graph(), TOY) for op in made.ops}
    assert all(0 < costs[name].weight_seconds <= costs[name].backward_seconds for name in later)
    assert costs[later[1]].weight_seconds == costs[later[1]].backward_seconds, "there is nothing else to do"
    assert all(costs[name].weight_seconds == 0 for name in now)


def test_a_pointwise_op_is_bound_by_memory():
    made = GraphBuilder()
    x = made.op("x", shape=(1000, 1000), grad=True)
    made.op("gelu", x, shape=(1000, 1000), flops=10**6)
    slow = replace(TOY, peak_flops={"float32": 1e6})  # its few flops do not count
    cost = op_cost(made.ops[-1], made.graph(), slow)
    assert (cost.forward_seconds, cost.backward_seconds) == pytest.approx((8e-6, 16e-6))


def test_samples_scale_all_but_the_parameters():
    op, made = linear(input_grad=True, trainable=True)
    narrow = replace(TOY, memory_bandwidth=1e3)  # all bytes: 16 KiB of weight, twice 16 KiB of values
    one, three = (op_cost(op, made.graph(), narrow, scale=scale) for scale in (1, 3))
    assert three.forward_seconds / one.forward_seconds == pytest.approx((1 + 2 * 3) / (1 + 2))
    assert three.param_bytes == one.param_bytes
    assert (three.saved_bytes, three.flops) == (3 * one.saved_bytes, 3 * one.flops)


def test_small_ops_pay_for_the_launch_and_small_matmuls_for_idle_cores():
    op, made = linear(input_grad=True, trainable=True)
    launching = op_cost(op, made.graph(), replace(TOY, launch_seconds=1.0))
    assert (launching.forward_seconds, launching.backward_seconds) == pytest.approx((1, 2), rel=1e-2)
    assert TOY.matmul_seconds(1e9, "float32") == pytest.approx(1e-3)
    assert replace(TOY, half_flops=1e9).matmul_seconds(1e9, "float32") == pytest.approx(2e-3), "half as efficient"
    for preset in PRESETS.values():  # time that a large kernel cannot use is the same, however fast the dtype is
        fast = {dtype: 1e15 / peak / preset.efficiency for dtype, peak in preset.peak_flops.items()}
        beside = {dtype: preset.matmul_seconds(1e15, dtype) - spent for dtype, spent in fast.items()}
        assert beside == pytest.approx(dict.fromkeys(beside, beside["float32"]), rel=1e-3)
    assert TOY.matmul_seconds(1e9, "int8") == TOY.matmul_seconds(1e9, "float32"), "no figure of its own"
    assert TOY.matmul_seconds(0, "float32") == 0


def test_small_matmuls_reach_the_least_share_and_large_ones_lose_the_same_time():
    """Between them the efficiency grows with the flops, so that no matmul is faster for being larger."""
    some = replace(TOY, half_flops=1e9, least_share=0.2)
    seconds = {flops: some.matmul_seconds(flops, "float32") for flops in (1e3, 1e6, 1e9, 1e12, 1e15)}
    assert seconds[1e3] == pytest.approx(5 * 1e3 / 1e12, rel=1e-4)
    assert seconds[1e15] == pytest.approx(1e15 / 1e12 + 1e-3, rel=1e-6)
    assert list(seconds.values()) == sorted(seconds.values())
    shares = [flops / 1e12 / spent for flops, spent in seconds.items()]
    assert shares == sorted(shares)
    for preset in PRESETS.values():  # a matmul of 128 x 128 x 128 is its launch, not more
        assert preset.matmul_seconds(2 * 128**3, "float16") < preset.launch_seconds


def test_fused_kernels_sum_an_inputs_gradient_while_they_compute_the_weights():
    made = replace(TOY, kernels="fused")
    sum_ = Collective(4, 10**9, backward=True, beside=10**11)  # all-reduce: 0.15 s, product: 0.1 s
    alone = TOY.exposed_seconds(sum_, 1.0, "float32")
    assert alone == pytest.approx(TOY.all_reduce_seconds(10**9, 4))
    assert made.exposed_seconds(sum_, 1.0, "float32") == pytest.approx(alone - 0.1)
    assert made.exposed_seconds(replace(sum_, beside=10**12), 1.0, "float32") == 0
    assert made.exposed_seconds(replace(sum_, beside=0), 1.0, "float32") == alone
    rows = replace(sum_, beside=10**12, parted=True)  # its scatter is hidden, its gather is not
    assert made.exposed_seconds(rows, 1.0, "float32") == pytest.approx(alone / 2)
    assert TOY.exposed_seconds(rows, 1.0, "float32") == pytest.approx(alone * 1.5), "rows are gathered again"


def test_the_dtype_is_that_of_the_output():
    op, made = linear(input_grad=True, trainable=True)
    half = replace(op, outputs=(replace(op.outputs[0], dtype="bfloat16"),))
    fast = replace(TOY, peak_flops={"float32": 1e12, "bfloat16": 4e12})
    assert op_cost(half, made.graph(), fast).forward_seconds == pytest.approx(0.25e-3)


def test_running_sums():
    graph = chain([10**9, 2 * 10**9])
    costs = op_costs(graph, TOY)
    table = CostTable.of(costs)
    assert table.seconds[-1] == pytest.approx(sum(cost.seconds for cost in costs))
    assert table.at([1, 3]).forward.tolist() == pytest.approx([0, 3e-3], abs=1e-8)


def test_presets_are_plausible_and_round_trip():
    for name, hardware in PRESETS.items():
        assert hardware.name == name
        assert hardware.source
        assert hardware.peak_flops["float16"] >= hardware.peak_flops["float32"] > hardware.peak_flops["float64"]
        assert hardware.intra.bandwidth > hardware.inter.bandwidth
        assert hardware.memory_limit < hardware.memory_bytes
        assert Hardware.from_json(hardware.to_json()) == hardware
    assert PRESETS["a100-80gb"].peak_flops["bfloat16"] == 312e12, "dense, not sparse"


def test_wrong_hardware_is_refused_with_a_hint():
    with pytest.raises(ValueError, match="unknown hardware 'h1000': did you mean 'h100'"):
        hardware_named("h1000")
    with pytest.raises(ValueError, match="did you mean 'a100-80gb'"):
        make_plan(gpt(1), Mesh(), hardware="a100-80", batch=2)
    with pytest.raises(ValueError, match="not hardware"):
        Hardware.from_json("{")
    with pytest.raises(ValueError, match="exactly the fields"):
        Hardware.from_json('{"name": "x"}')
    with pytest.raises(ValueError, match="memory_bandwidth is 0"):
        replace(TOY, memory_bandwidth=0)
    with pytest.raises(ValueError, match="lacks float32"):
        replace(TOY, peak_flops={"bfloat16": 1.0})


def test_links():
    assert Link(1e9, 1e-3).seconds(10**6) == pytest.approx(2e-3)
    assert Link(1e9, 1e-3).seconds(0) == 0
    assert TOY.link(0, 7) == TOY.intra
    assert TOY.link(7, 8) == TOY.inter


def test_this_machine_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    measured = machine.this_machine(cache=tmp_path, device="cpu")
    assert measured.peak_flops["float32"] > 1e8
    assert measured.memory_bandwidth > 1e8
    assert 0 < measured.launch_seconds < 1e-2
    assert "links are assumed" in measured.source
    (file,) = (tmp_path / "merak_like").iterdir()
    assert Hardware.from_json(file.read_text()) == measured
    assert machine.this_machine(cache=tmp_path, device="cpu") == measured
    file.write_text("{}")
    assert machine.this_machine(cache=tmp_path, device="cpu").name == measured.name, "what cannot be read is measured"
