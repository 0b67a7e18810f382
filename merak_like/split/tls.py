"""Who may talk: mutual TLS from a folder of ``merak keys``, and the name in the other end's certificate.

Both ends must show a certificate that the folder's authority signed. A client is who its certificate says, never who
its messages say.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTHORITY, REVOKED = "ca.pem", "revoked.txt"
REFUSED = "Authentication failed."
"""The same words for every cause: who has no right to be here learns nothing."""


@dataclass(frozen=True)
class Keys:
    """The files one end needs: the authority's certificate, its own, and its own key."""

    folder: Path
    name: str

    def files(self) -> tuple[Path, Path, Path]:
        """Authority, certificate, key. Raises ValueError for one that is not there."""
        found = (self.folder / AUTHORITY, self.folder / f"{self.name}.pem", self.folder / f"{self.name}.key")
        for path in found:
            if not path.is_file():
                there = sorted(p.stem for p in self.folder.glob("*.key") if p.stem != "ca") or ["none"]
                raise ValueError(
                    f"there is no {path}: `merak keys init` and `merak keys issue {self.name}` make it; "
                    f"names in {self.folder}: {', '.join(there)}"
                )
        return found

    def server(self) -> ssl.SSLContext:
        """For a host: a client without a certificate of the authority is refused in the handshake."""
        return self._context(ssl.PROTOCOL_TLS_SERVER)

    def client(self) -> ssl.SSLContext:
        """For an edge: the host must be who the edge dials."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        authority, certificate, key = self.files()
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(str(authority))
        try:
            context.load_cert_chain(str(certificate), str(key))
        except ssl.SSLError as error:
            raise ValueError(f"{certificate} and {key} do not belong together: {error.reason}") from None
        return context

    def revoked(self) -> frozenset[int]:
        """Serial numbers that are no longer valid; read anew at every connection."""
        path = self.folder / REVOKED
        if not path.is_file():
            return frozenset()
        lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        return frozenset(int(line, 16) for line in lines if line)


def identity(peer: Any, keys: Keys) -> str:
    """The name in a client's certificate. Raises PermissionError for none, or one that was revoked."""
    certificate = peer.getpeercert() if peer is not None else None
    if not certificate:
        raise PermissionError(REFUSED)
    serial = int(str(certificate.get("serialNumber", "0")), 16)
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    if serial in keys.revoked() or len(names) != 1:
        raise PermissionError(REFUSED)
    return str(names[0])


def is_loopback(host: str) -> bool:
    """Whether an address leads nowhere but here."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_safe(host: str, keys: Keys | None, insecure: bool) -> None:
    """Raises ValueError for a plain connection beyond this machine that nobody asked for by name."""
    if keys is None and not insecure and not is_loopback(host):
        raise ValueError(
            f"{host} is not this machine and no keys are given: make them with `merak keys init`, or say --insecure to "
            "send everything in the clear to whoever answers"
        )


def address(text: str) -> tuple[str, int]:
    """Read HOST:PORT, with an IPv6 host in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535 or not host:
        raise ValueError(f"an address is HOST:PORT, such as 127.0.0.1:7750; found {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
