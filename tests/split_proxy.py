"""A wire tap between edge and host: keeps every byte, and cuts the connection at a frame of one's choice, or a byte."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from merak_like.split.wire import HEADER, Kind


class Proxy:
    """Listens on loopback and passes everything on to a port, frame by frame."""

    def __init__(self, port: int, cut_at: tuple[Kind, int] | None = None, *, passing: bool = False) -> None:
        """``cut_at`` is a kind and how many of it come before the cut; ``passing``: the frame itself still arrives."""
        self.target, self.passing = port, passing
        self.cut_at = cut_at
        self.seen: dict[str, bytearray] = {"up": bytearray(), "down": bytearray()}
        self.cuts = 0
        self._counts: dict[int, int] = {}
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                edge, _ = self._socket.accept()
                try:
                    host = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    edge.close()
                    continue
                for name, source, sink in (("up", edge, host), ("down", host, edge)):
                    threading.Thread(target=self._pass, args=(name, source, sink), daemon=True).start()

    def _pass(self, name: str, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while True:
                head = self._exactly(source, HEADER.size)
                kind, length = head[3], int.from_bytes(head[14:18], "little")
                payload = self._exactly(source, length)
                self.seen[name] += head + payload
                with self._lock:
                    self._counts[kind] = self._counts.get(kind, 0) + 1
                    due = self.cut_at is not None and (kind, self._counts[kind] - 1) == self.cut_at
                if due and not self.passing:
                    break
                sink.sendall(head + payload)
                if due:
                    break
            self.cuts += 1
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    @staticmethod
    def _exactly(source: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = source.recv(count - len(data))
            if not more:
                raise OSError("ended")
            data += more
        return data

    def close(self) -> None:
        self._socket.close()


class Raw(Proxy):
    """Knows nothing of frames, as for gRPC, and cuts once, after so many bytes from the edge."""

    def __init__(self, cut_after: int | None = None) -> None:
        self.cut_after = cut_after
        super().__init__(0)

    def _pass(self, name: str, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(1024):
                self.seen[name] += part
                if self.cut_after is not None and len(self.seen["up"]) > self.cut_after:
                    self.cut_after = None
                    self.cuts += 1
                    break
                sink.sendall(part)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
