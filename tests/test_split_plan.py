"""What a step of split fine-tuning will take, told before it: bytes to the last one, and what the choice is made by."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from merak_like.cli import edge as cli
from merak_like.partitioner.hardware import Link
from merak_like.partitioner.schedules.action import Action, Kind
from merak_like.runtime.links import Spec
from merak_like.split.choose import Asked, best_of_each, blocks, choose, tails
from merak_like.split.coding import Coding, timed
from merak_like.split.connection import Waits
from merak_like.split.cut import Cut
from merak_like.split.edge import Edge
from merak_like.split.forecast import forecast, halved
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.means import Means, amount, line, machine
from merak_like.split.messages import Done, Task
from merak_like.split.order import orders
from merak_like.split.timeline import Around, Work, walk
from merak_like.split.told import beside
from merak_like.split.wire import Kind as Says
from tests.split_pair import CUTS, made, task
from tests.split_proxy import Proxy

NOTHING = Coding(0.0, 0.0)
QUIET = Waits(idle=3600.0)
"""No ping among the bytes of a step."""
WORKS = {
    "with a tail, remembering": ("calm", "layers.0:layers.3", {"codec": "aqsgd(4)|int8", "back_codec": "int4"}, True),
    "without a tail": ("calm", "layers.1", {"codec": "topk(0.25)", "micro_batches": 1}, False),
    "masks, uneven parts": ("bert", CUTS["bert"], {"codec": "fp16", "micro_batches": 4, "window": 3}, False),
    "narrow": ("gpt2", "transformer.h.1@6:transformer.ln_f", {"codec": "int8"}, True),
    "frozen": ("calm", "layers.0:layers.3", {"codec": "int8", "frozen_edge": True}, False),
}


DAILY = ("with a tail, remembering", "masks, uneven parts")


@pytest.mark.parametrize(
    ("name", "cut", "more", "ids"),
    [pytest.param(*work, id=title, marks=() if title in DAILY else pytest.mark.slow) for title, work in WORKS.items()],
)
def test_bytes_are_those_counted_on_the_socket(tmp_path: Path, name: str, cut: str, more: dict[str, Any], ids: bool):
    """Of every kind of message, headers included; and their sum is what a tap on the wire sees."""
    model, batch = made(name)
    what = task(cut, **more)
    source = Source(lambda: copy.deepcopy(model))
    told = forecast(source, what, batch, samples=ids)
    samples = list(range(len(batch["labels"]))) if ids else None
    limits = Limits(waits=QUIET)
    with Host(source, what.cut, listen="127.0.0.1:0", folder=tmp_path / "host", limits=limits) as host:
        tap = Proxy(host.port)
        here = f"127.0.0.1:{tap.port}"
        with Edge(source, what, batch, connect=here, folder=tmp_path / "edge", waits=QUIET) as edge:
            edge.step(batch, samples=samples)
            before, seen = dict(edge.bytes), len(tap.seen["up"]) + len(tap.seen["down"])
            edge.step(batch, samples=samples)
            found = {kind: count - before.get(kind, 0) for kind, count in edge.bytes.items()}
            on_the_wire = len(tap.seen["up"]) + len(tap.seen["down"]) - seen
        tap.close()
    assert told.by_kind == {kind: count for kind, count in found.items() if " " in kind and count}
    assert (told.sent, told.received) == (found["sent"], found["received"])
    assert on_the_wire == told.sent + told.received


@pytest.mark.slow
def test_the_wire_at_bert_bases_width():
    """Rank 8, and 4 bits on top, take as much less than the plain cut as they were to; as counted on a socket once."""
    pytest.importorskip("transformers")
    from benchmarks.split import main as wire

    model, batch = wire.work()
    counted = {(r["cut"], r["codec"]): r["bytes"] for r in json.loads(wire.OUT.read_text())["rows"]}
    rows = [row for row in counted if ":" not in row[0]]
    told = {}
    for cut, codec in rows:
        found = forecast(Source(lambda: copy.deepcopy(model)), Task(cut=cut, codec=codec), batch, samples=True)
        told[cut, codec] = found.sent + found.received
    assert told == {row: counted[row] for row in rows}
    plain, two_bits, narrow, four_bits = told.values()
    assert plain / narrow > 94
    assert plain / four_bits > 700
    assert plain / two_bits > 15


def test_the_end_of_a_step_is_as_long_whatever_it_says():
    assert {len(Done(loss=loss, queued=queued).body()) for loss in (None, -1.2345678901234567e-300)
            for queued in (0.0, 123456.12345678901)} == {Done.SIZE}  # fmt: skip


def _walked(micro_batches: int, window: int, up: float, **more: Any) -> Any:
    """Every compute a second, every message 1000 bytes at ``up`` seconds."""
    cut = Cut("a", "b")
    told: Any = {
        side: tuple(map(Action.parse, orders(side, cut, micro_batches, window)[0].split())) for side in ("edge", "host")
    }
    places: Any = [("edge", 0), ("edge", 3), ("host", 1)]
    seconds = {(side, kind, stage): 1.0 for side, stage in places for kind in (Kind.F, Kind.B)}
    says = [Says.UP_FORWARD, Says.UP_BACKWARD, Says.DOWN_FORWARD, Says.DOWN_BACKWARD]
    zero = dict.fromkeys(says, 0.0)
    work = Work(seconds, dict.fromkeys(says, 1000), zero | {Says.UP_FORWARD: 0.5}, zero)
    links = Link(1000 / up, 0.0), Link(1e12, 0.0)
    return walk(told, [work] * micro_batches, Around(0, 0), *links, **more)


def test_a_walk_of_one_micro_batch_is_the_sum():
    """Head, coding, up, cloud, tail both ways, up, cloud, head: nothing overlaps."""
    found = _walked(1, 1, 3.0)
    assert found.seconds == pytest.approx(6 + 0.5 + 2 * 3)
    assert found.busy == pytest.approx({"edge": 4, "coding": 0.5, "uplink": 6, "host": 2, "downlink": 0}, abs=1e-6)


def test_many_micro_batches_hide_all_but_the_slowest():
    """Then a step takes little more than what its slowest resource is at work; alone they would add up."""
    for up, slowest in ((4.0, "uplink"), (0.1, "edge")):
        found = _walked(32, 4, up)
        assert max(found.busy, key=lambda name: found.busy[name]) == slowest
        assert found.busy[slowest] <= found.seconds < 1.15 * found.busy[slowest]


def test_encoding_behind_computing_is_hidden_and_before_it_is_not():
    assert _walked(32, 4, 0.1).seconds == pytest.approx(_walked(32, 4, 0.1, ahead=False).seconds - 32 * 0.5, abs=1.1)


def _asked(ids: bool = True) -> Asked:
    return Asked(samples=ids, codecs=("identity", "aqsgd(4)|int8"), micro_batches=(1, 2))


def _means(up: str = "1 Mbit", memory: float = 4e9) -> Means:
    return Means(machine("edge", 20e9, memory), machine("cloud", 1e13, 8e10), line(up, 0.005), line("1 Gbit", 0.005))


def test_a_slow_line_chooses_few_bytes_and_a_fast_one_none_of_that():
    model, batch = made("calm")
    source = Source(lambda: copy.deepcopy(model))

    def slow_codec(text: str, spec: Any, way: Any) -> Coding:
        return Coding(0.01, 0.01) if "aqsgd" in text else NOTHING

    slow, fast = (choose(source, task("auto"), batch, _means(up), _asked(), measure=slow_codec).ranked
                  for up in ("100 kbit", "1 Gbit"))  # fmt: skip
    assert "aqsgd" in slow[0].codec
    assert slow[0].binds == "uplink"
    assert "twice as fast saves" in slow[0].why
    assert fast[0].codec == "identity"
    assert all(one.seconds <= two.seconds for one, two in pairwise(slow))
    assert len(best_of_each(slow)) == 2


def test_a_small_edge_gets_what_fits_and_a_tiny_one_is_told_what_it_lacks():
    model, batch = made("calm")
    source = Source(lambda: copy.deepcopy(model))
    all_of_it = choose(source, task("auto"), batch, _means(), _asked(), measure=lambda *_: NOTHING)
    middle = sorted(one.edge_bytes for one in all_of_it.ranked)[len(all_of_it.ranked) // 2]
    some = choose(source, task("auto"), batch, _means(memory=middle / 0.92 + 1), _asked(), measure=lambda *_: NOTHING)
    assert max(one.edge_bytes for one in some.ranked) <= middle + 1
    assert any("the edge would need" in why for _, why in some.refused)
    with pytest.raises(ValueError, match=r"no way to split fits.*the edge would need"):
        choose(source, task("auto"), batch, _means(memory=1000), _asked(), measure=lambda *_: NOTHING)


def test_codecs_with_memory_are_refused_without_ids():
    model, batch = made("calm")
    found = choose(Source(lambda: copy.deepcopy(model)), task("auto"), batch, _means(), _asked(ids=False),
                   measure=lambda *_: NOTHING)  # fmt: skip
    assert {one.codec for one in found.ranked} == {"identity"}
    assert "let data return (batch, sample ids)" in dict(found.refused)["aqsgd(4)|int8"]


@pytest.mark.parametrize(
    ("name", "first", "tail"),
    [("calm", "layers.0", "head"), ("bert", "bert.encoder.layer.0", "bert.pooler.dense"),
     ("gpt2", "transformer.h.0", "transformer.ln_f"), ("llama", "model.layers.0", "model.norm")],
)  # fmt: skip
def test_blocks_and_tails_are_found(name: str, first: str, tail: str):
    model, batch = made(name)
    graph = halved(Source(lambda: copy.deepcopy(model)), task(CUTS[name], micro_batches=1), batch)[0].trace.graph
    assert (len(blocks(graph)), blocks(graph)[0]) == (4, first)
    assert tail in tails(graph)


def test_amounts_as_people_write_them():
    assert amount("20 Mbit", "bit") == amount("20mbit/s", "bit") == amount("20M", "bit") == 2e7
    assert (amount("4 GB", "B"), amount("1.5e3", "B")) == (4e9, 1500)
    for bad in ("fast", "0", "20 MB", ""):
        with pytest.raises(ValueError, match="write a number above 0"):
            amount(bad, "bit")


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_codecs_are_timed(way: Any):
    small, large = (timed("topk(0.1)", Spec("x", (rows, 8, 16), torch.float32, True), way) for rows in (64, 640_000))
    assert 0 < small.encode < large.encode
    assert 0 < small.decode < large.decode


FILE = """
model: tests.split_models:calm
data: tests.split_models:again
cut: auto
steps: 2
micro_batches: 2
machines: {uplink: 1 Mbit, downlink: 10 Mbit, edge_flops: 10 Gflops, edge_memory: 1 GB}
"""


def test_the_command_ranks_and_says_what_binds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "edge.yaml").write_text(FILE)
    cli.run("plan", tmp_path / "edge.yaml", None, None, ["identity", "aqsgd(4)"])
    said = capsys.readouterr().out
    assert "1 Mbit/s up, 10 Mbit/s down" in said
    best, _, others = said.partition("next best")
    assert best.count("layers.") == 2  # one for each codec
    assert "aqsgd(4)" in best
    assert "micro-batches" in others.splitlines()[-1]


def test_the_command_asks_for_what_it_lacks(tmp_path: Path):
    lacking = tmp_path / "edge.yaml"
    lacking.write_text(FILE.partition("machines")[0])
    with pytest.raises(ValueError, match="nothing to plan for: give the file"):
        cli.run("plan", lacking)
    with pytest.raises(ValueError, match="run `merak edge plan`"):
        cli.run("train", lacking)
    lacking.write_text(FILE.replace("auto", CUTS["calm"]).replace("1 Mbit", "fast"))
    with pytest.raises(ValueError, match="'fast' is no amount"):  # before a host is dialled
        cli.run("train", lacking)
    with pytest.raises(ValueError, match="--rank and --codec are for plan"):
        cli.run("train", lacking, None, [8], None)


def test_predicted_stands_beside_measured():
    model, batch = made("calm")
    told = forecast(Source(lambda: copy.deepcopy(model)), task(CUTS["calm"]), batch, _means(), samples=True,
                    measure=lambda *_: NOTHING)  # fmt: skip
    steps = [{"seconds": 5.0 + 2 * i, "sent": 9 + told.sent * i, "received": 9 + told.received * i} for i in range(3)]
    rows = {line[:16].strip(): line[16:].split() for line in beside(told, steps).splitlines()}
    assert rows["seconds"] == [f"{told.seconds:.3f}", "2.000"]
    assert rows["bytes sent"] == [f"{told.sent:,}"] * 2
    assert rows["bytes received"] == [f"{told.received:,}"] * 2
