"""Who may talk to a host: certificates, sessions and limits. What has no right to be here is refused, and fast."""

from __future__ import annotations

import copy
import datetime
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from merak_like.split import keys
from merak_like.split.connection import Lost, Told, Waits
from merak_like.split.dialler import Dialler
from merak_like.split.edge import Edge
from merak_like.split.half import Source
from merak_like.split.host import Host
from merak_like.split.limits import Limits
from merak_like.split.messages import Failed, Hello, Task, Welcome, parse
from merak_like.split.outline import outline
from merak_like.split.tls import REFUSED, Keys, address
from merak_like.split.wire import CHUNK, HEADER, Key, Kind, frames
from tests import split_models
from tests.commands import refused, run

pytest.importorskip("cryptography")

MODEL, BATCH = split_models.calm()
SOURCE = Source(lambda: copy.deepcopy(MODEL))
CUT = "layers.0:layers.3"
TASK = Task(cut=CUT)
WAITS = Waits(hello=20.0, idle=20.0, step=60.0, drain=20.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a host, clients; and another authority with a client of the same name."""
    made = tmp_path_factory.mktemp("keys")
    keys.init(made / "ours")
    keys.issue(made / "ours", "host", hosts=["127.0.0.1", "localhost"])
    for name in ("ann", "bob", "gone"):
        keys.issue(made / "ours", name)
    keys.issue(made / "ours", "late", days=-1)
    keys.init(made / "theirs")
    keys.issue(made / "theirs", "ann")
    keys.issue(made / "theirs", "host", hosts=["127.0.0.1"])
    return made


@pytest.fixture(scope="module")
def host(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    limits = Limits(sessions_per_client=2, connections_per_client=3, message=4 * CHUNK, waits=WAITS)
    made = Host(
        SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path_factory.mktemp("host"), keys=Keys(folder / "ours", "host"),
        limits=limits, status="127.0.0.1:0",
    )  # fmt: skip
    with made:
        yield made


def edge(host: Host, folder: Path, own: Path, name: str, **more: Any) -> Edge:
    options: dict[str, Any] = {"patience": 3, "waits": WAITS} | more
    what = options.pop("task", TASK)
    return Edge(
        SOURCE, what, BATCH, connect=f"127.0.0.1:{host.port}", folder=own, keys=Keys(folder, name), **options
    )  # fmt: skip


def hello(digest: str = "0" * 32, **more: Any) -> bytes:
    return Hello(task=TASK, example=outline(BATCH), digest=digest, **more).body()


def dialled(host: Host, keys_: Keys | None) -> tuple[Dialler, Any]:
    dialler = Dialler([f"127.0.0.1:{host.port}"], keys_, False, WAITS, CHUNK)
    return dialler, dialler.dial()


def test_a_client_of_the_authority_trains(host: Host, folder: Path, tmp_path: Path):
    with edge(host, folder / "ours", tmp_path, "ann") as one:
        assert one.step(BATCH).loss > 0
        assert "Authentication" not in (host.folder / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in (host.folder / "audit.jsonl").read_text().splitlines()]
    assert any(line["event"] == "opened" and line["owner"] == "ann" for line in lines)


@pytest.mark.parametrize(("whose", "name"), [("theirs", "ann"), ("ours", "late")])
def test_foreign_and_expired_certificates_are_refused(whose: str, name: str, host: Host, folder: Path, tmp_path: Path):
    for file in ("ca.pem",):  # so that it is the host that refuses, not the edge
        target = tmp_path / "keys"
        target.mkdir()
        (target / file).write_bytes((folder / "ours" / file).read_bytes())
        for kind in ("pem", "key"):
            (target / f"{name}.{kind}").write_bytes((folder / whose / f"{name}.{kind}").read_bytes())
    with edge(host, target, tmp_path / "edge", name) as one, pytest.raises((PermissionError, Lost)):
        one.step(BATCH)


def test_a_revoked_certificate_is_refused_from_then_on(host: Host, folder: Path, tmp_path: Path):
    with edge(host, folder / "ours", tmp_path, "gone") as one:
        one.step(BATCH)
    keys.revoke(folder / "ours", "gone")
    with edge(host, folder / "ours", tmp_path, "gone") as one, pytest.raises(PermissionError, match=REFUSED):
        one.step(BATCH)


def test_a_hosts_certificate_is_no_clients(host: Host, folder: Path, tmp_path: Path):
    with edge(host, folder / "ours", tmp_path, "host") as one, pytest.raises((PermissionError, Lost)):
        one.step(BATCH)


def test_an_edge_refuses_a_host_of_another_authority(folder: Path, tmp_path: Path):
    with Host(SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path / "h", keys=Keys(folder / "theirs", "host")) as other:
        with edge(other, folder / "ours", tmp_path / "e", "ann") as one:
            with pytest.raises(PermissionError, match="is not the host it should be"):
                one.step(BATCH)


def test_no_certificate_and_no_tls_are_refused(host: Host, folder: Path):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(folder / "ours" / "ca.pem"))
    data = b"some"
    with socket.create_connection(("127.0.0.1", host.port)) as plain, suppress(OSError):
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as bare:
            bare.sendall(b"".join(frames(Key(Kind.HELLO), hello())))
            data = bare.recv(100)
    assert data in (b"", b"some")  # closed, in the handshake or at the first read
    with socket.create_connection(("127.0.0.1", host.port)) as plain:
        plain.settimeout(5)
        plain.sendall(b"".join(frames(Key(Kind.HELLO), hello())))
        answer = plain.recv(100)
        assert b"mS" not in answer


def test_a_session_of_another_is_as_one_that_is_not(host: Host, folder: Path, tmp_path: Path):
    with edge(host, folder / "ours", tmp_path, "ann") as one:
        one.step(BATCH)
        answers = []
        for name in (one.session, "f" * 32):
            dialler, connection = dialled(host, Keys(folder / "ours", "bob"))
            connection.send(Key(Kind.HELLO), hello(session=name, step=1))
            with pytest.raises(Told) as told:
                connection.receive(Key(Kind.WELCOME), 10)
            answers.append(told.value.failed)
            dialler.close()
        assert answers[0] == answers[1]
        assert answers[0].code == "refused"
        assert one.step(BATCH).loss > 0


def test_sessions_on_disk_are_their_owners_too(folder: Path, tmp_path: Path):
    def serve() -> Host:
        return Host(SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path / "h", keys=Keys(folder / "ours", "host"))

    with serve() as first, edge(first, folder / "ours", tmp_path / "e", "ann") as one:
        one.step(BATCH)
        session = one.session
    with serve() as second:
        dialler, connection = dialled(second, Keys(folder / "ours", "bob"))
        connection.send(Key(Kind.HELLO), hello(session=session, step=1))
        with pytest.raises(Told, match="no such session"):
            connection.receive(Key(Kind.WELCOME), 20)
        dialler.close()
        with edge(second, folder / "ours", tmp_path / "e", "ann", patience=20) as one:
            one.train(lambda step: BATCH, 2)
            assert one.step_number == 2


@pytest.mark.parametrize(
    "key", [Key(Kind.UP_FORWARD, 0, 0), Key(Kind.UP_FORWARD, 9, 0), Key(Kind.WELCOME), Key(Kind.HELLO)]
)
def test_what_is_not_due_ends_the_connection_with_its_reason(key: Key, host: Host, folder: Path):
    dialler, connection = dialled(host, Keys(folder / "ours", "bob"))
    connection.send(Key(Kind.HELLO), b"{}" if key.kind is Kind.HELLO else hello())
    if key.kind is not Kind.HELLO:
        connection.receive(Key(Kind.WELCOME), 20)
        connection.send(key, b"x" * 10)
        with pytest.raises((Told, Lost)):
            connection.receive(Key(Kind.DONE), 20)
    else:
        with pytest.raises(Told, match="Hello"):
            connection.receive(Key(Kind.WELCOME), 20)
    dialler.close()
    for session in list(host.registry.live):
        if host.registry.live[session].owner == "bob":
            host.registry.put_away(session)


def test_a_length_beyond_all_measure_is_refused_at_once(folder: Path, tmp_path: Path):
    with Host(SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path) as plain:
        with socket.create_connection(("127.0.0.1", plain.port)) as raw:
            raw.settimeout(5)
            head = bytearray(next(frames(Key(Kind.HELLO), b""))[: HEADER.size])
            head[14:18] = b"\xff" * 4
            began = time.monotonic()
            raw.sendall(head)
            data = b""
            while more := raw.recv(4096):
                data += more
            assert time.monotonic() - began < 1
            assert b"malformed" in data


def test_silent_slow_and_half_open_clients_are_let_go(tmp_path: Path):
    limits = Limits(waits=Waits(hello=0.5, idle=0.5, drain=0.5))
    with Host(SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path, limits=limits) as plain:
        first = next(frames(Key(Kind.HELLO), hello()))
        sockets = [socket.create_connection(("127.0.0.1", plain.port)) for _ in range(3)]
        sockets[1].sendall(first[:10])  # a header that never ends
        sockets[2].sendall(first[:-5])  # a payload that never ends
        end = time.monotonic() + 5
        while plain._now and time.monotonic() < end:
            time.sleep(0.05)
        assert not plain._now
        for each in sockets:
            each.close()


def test_room_is_promised_before_it_is_taken(tmp_path: Path):
    with Host(SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path / "h", limits=Limits(memory=1000)) as small:
        with Edge(SOURCE, TASK, BATCH, connect=f"127.0.0.1:{small.port}", folder=tmp_path / "e", patience=1) as one:
            with pytest.raises(ValueError, match=r"needs about .* MB, 0 MB are left"):
                one.step(BATCH)


def test_a_batch_larger_than_agreed_is_refused(tmp_path: Path):
    import torch

    with Host(SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path / "h") as plain:
        with Edge(SOURCE, TASK, BATCH, connect=f"127.0.0.1:{plain.port}", folder=tmp_path / "e", patience=1) as one:
            one.step(BATCH)
            with pytest.raises(ValueError, match="larger than the one"):
                one.step({name: torch.cat([value] * 4) for name, value in BATCH.items()})


def test_health_metrics_and_drain(tmp_path: Path):
    with Host(SOURCE, CUT, listen="127.0.0.1:0", folder=tmp_path / "h", status="127.0.0.1:0") as plain:
        with Edge(SOURCE, TASK, BATCH, connect=f"127.0.0.1:{plain.port}", folder=tmp_path / "e") as one:
            one.step(BATCH)
            page = urllib.request.urlopen(f"http://127.0.0.1:{plain.status_port}/metrics").read().decode()
            assert "merak_steps_total 1" in page
            assert 'merak_queue_seconds{quantile="0.99"} 0.0' in page
            assert int(page.split("merak_queue_seconds_count ")[1].split()[0]) == plain.turn.turns > 0
            assert urllib.request.urlopen(f"http://127.0.0.1:{plain.status_port}/healthz").status == 200
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"http://127.0.0.1:{plain.status_port}/other")
            session = one.session
            plain.close()
    assert (tmp_path / "h/sessions" / str(session) / "step-1").is_dir()


def test_plain_connections_stay_on_this_machine(tmp_path: Path):
    for kind in (
        lambda: Host(SOURCE, CUT, listen="0.0.0.0:0", folder=tmp_path),
        lambda: Dialler(["example.org:1"], None, False, WAITS, CHUNK),
    ):
        with pytest.raises(ValueError, match="--insecure"):
            kind()
    assert address("[::1]:80") == ("::1", 80)
    with pytest.raises(ValueError, match="HOST:PORT"):
        address("nowhere")


def test_keys_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--folder", str(tmp_path / "k")]
    run(capsys, "keys", "init", *where)
    run(capsys, "keys", "issue", "cloud", "--host", "localhost", *where)
    run(capsys, "keys", "issue", "clinic-7", *where)
    run(capsys, "keys", "revoke", "clinic-7", *where)
    listed = run(capsys, "keys", "list", *where)
    assert "clinic-7  revoked" in listed
    assert "cloud  valid" in listed
    assert (tmp_path / "k/clinic-7.key").stat().st_mode & 0o077 == 0
    assert "authority already" in refused(capsys, "keys", "init", *where)
    assert "no name ../x" not in refused(capsys, "keys", "issue", "../x", *where)
    assert "there are ca, clinic-7" not in refused(capsys, "keys", "revoke", "nobody", *where)
    until = Keys(tmp_path / "k", "cloud")
    assert until.server().verify_mode == ssl.CERT_REQUIRED
    with pytest.raises(ValueError, match="names in"):
        Keys(tmp_path / "k", "nobody").client()
    assert datetime.timedelta(days=keys.DAYS) <= datetime.timedelta(days=90)


def test_what_the_host_says_can_be_read():
    assert parse(Failed, Failed(code="busy", message="later", after=2.0).body()).after == 2.0
    assert parse(Welcome, Welcome(session="a" * 32, step=3, largest=5).body()).step == 3
