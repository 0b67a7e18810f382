"""Certificates for split fine-tuning: an authority of one's own, short-lived certificates, a list of revoked ones.

keys/ca.pem  ca.key       the authority; ca.key stays with whoever issues
keys/NAME.pem  NAME.key   one for each host and client
keys/revoked.txt          serial numbers, read by the host at every connection
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merak_like.split.tls import AUTHORITY, REVOKED

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"certificates are made with cryptography, but {error}: pip install 'merak-like[server]'", name=error.name
    ) from None

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DAYS = 30


def init(folder: Path, *, days: int = 3650) -> Path:
    """Make an authority. Raises ValueError where there is one already."""
    if (folder / "ca.key").exists() or (folder / AUTHORITY).exists():
        raise ValueError(f"{folder} has an authority already: issue from it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "merak authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder(name, name, key, days)
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", _pem(key), secret=True)
    _write(folder / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))
    _write(folder / REVOKED, b"")
    return folder / AUTHORITY


def issue(folder: Path, name: str, *, hosts: Sequence[str] = (), days: float = DAYS) -> Path:
    """Make a certificate and key for a client, or, with the names or addresses it is dialled by, for a host.

    A negative number of days makes one that has expired already. Raises ValueError for a name that is taken or is none.
    """
    if not NAME.fullmatch(name) or name == "ca":
        raise ValueError(f"a name is up to 64 letters, digits, dots and dashes, and not 'ca'; found {name!r}")
    if (folder / f"{name}.pem").exists():
        raise ValueError(f"{folder} has a {name}.pem already: revoke and remove it, or take another name")
    authority, authority_key = _authority(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(subject, authority.subject, key, days)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False)
    _write(folder / f"{name}.key", _pem(key), secret=True)
    signed = builder.sign(authority_key, hashes.SHA256())
    _write(folder / f"{name}.pem", signed.public_bytes(serialization.Encoding.PEM))
    return folder / f"{name}.pem"


def revoke(folder: Path, name: str) -> int:
    """Let a certificate be refused from now on; its serial number. Raises ValueError for a name nobody has."""
    path = folder / f"{name}.pem"
    if not path.is_file():
        there = sorted(p.stem for p in folder.glob("*.pem") if p.name != AUTHORITY) or ["none"]
        raise ValueError(f"{folder} has no {name}.pem: there are {', '.join(there)}")
    serial = x509.load_pem_x509_certificate(path.read_bytes()).serial_number
    with (folder / REVOKED).open("a", encoding="utf-8") as file:
        file.write(f"{serial:x}  # {name}\n")
        file.flush()
        os.fsync(file.fileno())
    return serial


class Certificate:
    """One that came as bytes, in the words of ``ssl``: its names and serial number, as ``identity`` asks for them."""

    def __init__(self, pem: bytes) -> None:
        self._is = x509.load_pem_x509_certificate(pem)

    def getpeercert(self) -> dict[str, Any]:
        """See ``ssl.SSLSocket``."""
        names = self._is.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        subject = tuple((("commonName", str(name.value)),) for name in names)
        return {"serialNumber": f"{self._is.serial_number:X}", "subject": subject}


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    begin, end = now - datetime.timedelta(minutes=5), now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(begin, end - datetime.timedelta(minutes=5)))
        .not_valid_after(end)
    )


def _authority(folder: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    if not (folder / "ca.key").is_file():
        raise ValueError(f"{folder} has no authority: `merak keys init` makes one")
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes()), key


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """A key is readable by its owner alone from its first moment."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(data)


def listed(folder: Path) -> list[str]:
    """One line for each certificate: its name, until when it is valid, whether it was revoked."""
    path = folder / REVOKED
    gone = (
        {line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()}
        if path.exists()
        else set()
    )
    lines: list[str] = []
    for file in sorted(folder.glob("*.pem")):
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        end, serial = certificate.not_valid_after_utc, f"{certificate.serial_number:x}"
        expired = end < datetime.datetime.now(datetime.UTC)
        state = "revoked" if serial in gone else "expired" if expired else "valid"
        lines.append(f"{file.stem}  {state}  until {end:%Y-%m-%d}  {serial}")
    return lines
