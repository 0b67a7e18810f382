"""Over gRPC all is as over TCP: numbers, bytes, who is let in, and that a connection which breaks changes nothing."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merak_like.split import keys
from merak_like.split.connection import Lost, Told, Waits
from merak_like.split.dialler import Dialler
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import Hello, Task, Welcome, parse
from merak_like.split.outline import outline
from merak_like.split.tls import REFUSED, Keys
from merak_like.split.transport import place
from merak_like.split.wire import CHUNK, Key, Kind
from tests import split_models
from tests.split_pair import Pair, pair
from tests.split_proxy import Raw

grpc = pytest.importorskip("grpc")
__all__ = ["pair"]

MODEL, BATCH = split_models.calm()
SOURCE = Source(lambda: copy.deepcopy(MODEL))
CUT = "layers.0:layers.3"
TASK = Task(cut=CUT, codec="aqsgd(4)|int8", micro_batches=2, window=2, checkpoint_every=2, seed=3)
STEPS = 4


def trained(split: Pair) -> tuple[list[float], dict[str, Tensor]]:
    losses = list[float]()
    split.edge.train(
        lambda step: split_models.again(step)[0], STEPS, samples=lambda step: split_models.again(step)[1],
        on_step=lambda _, result: losses.append(result.loss),
    )  # fmt: skip
    return losses, {name: t.clone() for name, t in split.weights.items()}


@pytest.fixture(scope="module")
def over_tcp(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Tensor], int]:
    split = Pair(tmp_path_factory.mktemp("tcp"), MODEL, BATCH, TASK)
    losses, weights = trained(split)
    sent = split.edge.bytes["sent"]
    split.close()
    return losses, weights, sent


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_numbers_and_counted_bytes_are_those_over_tcp(
    pair: Callable[..., Pair], over_tcp: tuple[list[float], dict[str, Tensor], int]
):
    tap = Raw()
    split = pair(MODEL, BATCH, TASK, scheme="grpc://", proxy=tap)
    losses, weights = trained(split)
    assert losses == over_tcp[0]
    assert same(weights, over_tcp[1])
    assert split.edge.bytes["sent"] == over_tcp[2]
    assert over_tcp[2] < len(tap.seen["up"]) < 1.1 * over_tcp[2] + 1500  # what HTTP/2 adds to small frames


@pytest.mark.parametrize("tenths", [pytest.param(i, marks=[] if i == 5 else [pytest.mark.slow]) for i in range(10)])
def test_a_call_cut_anywhere_changes_nothing(
    tenths: int, pair: Callable[..., Pair], over_tcp: tuple[list[float], dict[str, Tensor], int]
):
    tap = Raw(1 + tenths * over_tcp[2] // 10)
    split = pair(MODEL, BATCH, TASK, scheme="grpc://", proxy=tap)
    losses, weights = trained(split)
    assert tap.cuts == 1
    assert losses == over_tcp[0]
    assert same(weights, over_tcp[1])


# --- who may call -----------------------------------------------------------------------------------------------------

WAITS = Waits(hello=10.0, idle=20.0, step=60.0, drain=20.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a host and clients, and another with clients of the same names under the first's authority."""
    made = tmp_path_factory.mktemp("keys")
    keys.init(made / "ours")
    keys.issue(made / "ours", "host", hosts=["127.0.0.1"])
    keys.issue(made / "ours", "elsewhere", hosts=["example.org"])
    for name in ("ann", "gone"):
        keys.issue(made / "ours", name)
    keys.issue(made / "ours", "late", days=-1)
    keys.init(made / "theirs")
    keys.issue(made / "theirs", "ann")
    keys.issue(made / "theirs", "host", hosts=["127.0.0.1"])
    (made / "foreign").mkdir()
    for file in ("ours/ca.pem", "theirs/ann.pem", "theirs/ann.key"):  # so that it is the host that refuses
        (made / "foreign" / Path(file).name).write_bytes((made / file).read_bytes())
    return made


@pytest.fixture(scope="module")
def host(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(
        SOURCE, CUT, listen="grpc://127.0.0.1:0", folder=tmp_path_factory.mktemp("host"),
        keys=Keys(folder / "ours", "host"), limits=Limits(waits=WAITS, connections_per_client=1),
    )  # fmt: skip
    with made:
        yield made


def empty(host: Host) -> None:
    """Wait until the host has seen everybody leave."""
    end = time.monotonic() + 20
    while host._now and time.monotonic() < end:
        time.sleep(0.01)
    assert not host._now


def greeted(where: Host, who: Keys | None) -> Any:
    """Dial and say hello; what the host says."""
    dialler = Dialler([f"grpc://127.0.0.1:{where.port}"], who, False, WAITS, CHUNK)
    try:
        connection = dialler.dial()
        hello = Hello(task=TASK, example=outline(BATCH), digest="0" * 32)
        connection.send(Key(Kind.HELLO), hello.body())
        return parse(Welcome, connection.receive(Key(Kind.WELCOME)))
    finally:
        dialler.close()


def test_a_client_is_who_its_certificate_says_and_dials_as_often_as_it_may(host: Host, folder: Path):
    welcome = greeted(host, Keys(folder / "ours", "ann"))
    assert host.registry.live[welcome.session].owner == "ann"
    empty(host)
    dialler = Dialler([f"grpc://127.0.0.1:{host.port}"], Keys(folder / "ours", "ann"), False, WAITS, CHUNK)
    _ = dialler.dial()
    with pytest.raises(Lost):
        greeted(host, Keys(folder / "ours", "ann"))
    dialler.close()


@pytest.mark.parametrize(("where", "name"), [("foreign", "ann"), ("ours", "late"), ("ours", "host"), ("", "")])
def test_who_has_no_right_to_call_is_refused(where: str, name: str, host: Host, folder: Path):
    with pytest.raises((PermissionError, Lost)):
        greeted(host, Keys(folder / where, name) if name else None)


def test_a_revoked_certificate_is_refused_from_then_on(host: Host, folder: Path):
    keys.revoke(folder / "ours", "gone")
    with pytest.raises(Told, match=REFUSED):
        greeted(host, Keys(folder / "ours", "gone"))


@pytest.mark.parametrize(("where", "name"), [("theirs", "host"), ("ours", "elsewhere")])
def test_an_edge_refuses_a_host_that_is_another(where: str, name: str, folder: Path, tmp_path: Path):
    who = Keys(folder / where, name)
    with Host(SOURCE, CUT, listen="grpc://127.0.0.1:0", folder=tmp_path, keys=who) as other:
        with pytest.raises(PermissionError, match="is not the host it should be"):
            greeted(other, Keys(folder / "ours", "ann"))


HUGE = """
import grpc, sys
try:
    list(grpc.insecure_channel(sys.argv[1]).stream_stream("/merak.Split/Talk")(iter([bytes(64 * 2**20)])))
except grpc.RpcError as error:
    print(error.code().name)
"""


def test_a_message_beyond_a_frame_ends_the_call_and_takes_no_memory(tmp_path: Path):
    with Host(SOURCE, CUT, listen="grpc://127.0.0.1:0", folder=tmp_path) as plain:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        other = [sys.executable, "-c", HUGE, f"127.0.0.1:{plain.port}"]
        ran = subprocess.run(other, capture_output=True, text=True, timeout=60)
        assert ran.stdout.strip() == "RESOURCE_EXHAUSTED", ran.stderr
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert taken < 16 * 1024, f"{taken} KiB"


def test_who_calls_and_says_nothing_is_let_go(tmp_path: Path):
    limits = Limits(waits=Waits(hello=0.5, idle=0.5, drain=0.5))
    with Host(SOURCE, CUT, listen="grpc://127.0.0.1:0", folder=tmp_path, limits=limits) as plain:
        with grpc.insecure_channel(f"127.0.0.1:{plain.port}") as channel:
            wait = iter(lambda: time.sleep(0.1) or b"", None)
            with suppress(grpc.RpcError):
                said = b"".join(channel.stream_stream("/merak.Split/Talk")(wait))
                assert b"mS" in said or not said
        empty(plain)


def test_a_port_in_use_is_an_error_at_once(tmp_path: Path):
    with Host(SOURCE, CUT, listen="grpc://127.0.0.1:0", folder=tmp_path / "a") as first:
        with pytest.raises(OSError, match="cannot listen"):
            Host(SOURCE, CUT, listen=f"grpc://127.0.0.1:{first.port}", folder=tmp_path / "b").start()


def test_an_address_of_another_kind_says_which_there_are():
    assert place("grpc://[::1]:80") == ("grpc", "::1", 80)
    assert str(place("grpc://a:80")) == "grpc://a:80"
    for text in ("http://a:80", "://a:80", "grpc://a"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            place(text)


def test_a_machine_without_grpcio_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "merak_like.split.calls", raising=False)
    with pytest.raises(ValueError, match=r"pip install .merak-like\[grpc\]"):
        Dialler(["grpc://127.0.0.1:1"], None, False, WAITS, CHUNK)


def test_nothing_beyond_this_machine_goes_in_the_clear():
    with pytest.raises(ValueError, match="--insecure"):
        Dialler(["grpc://example.org:1"], None, False, WAITS, CHUNK)
