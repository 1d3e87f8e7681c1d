"""Certificates and keys for one deployment on this machine, made on the fly and gone with its directory.

An authority of our own signs one certificate for the loopback address, which the SuperLink and the SuperNodes show;
nobody else is trusted. A SuperNode proves who it is by a key that was registered with the SuperLink before.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from simulations.flower.processes import HOST

DAYS = 2
"""For how long a certificate is good: longer than any run here, and no longer."""


@dataclass(frozen=True)
class Certificates:
    """Files of one deployment.

    Attributes:
        place: their directory, which only its owner may read.
    """

    place: Path

    @property
    def root(self) -> Path:
        """The authority's certificate."""
        return self.place / "root.pem"

    def options(self) -> list[str]:
        """Options by which a SuperLink or a SuperNode shows the certificate."""
        shown = {"ca-certfile": self.root, "certfile": self.place / "server.pem", "keyfile": self.place / "server.key"}
        return [part for name, path in shown.items() for part in (f"--ssl-{name}", str(path))]

    def node_key(self, node: int) -> Path:
        """A node's private key; its public key lies beside it, ending in ``.pub``."""
        path = self.place / f"node{node}"
        if not path.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
            _write(path.with_suffix(".pub"), key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        return path


def make_certificates(place: Path) -> Certificates:
    """An authority and a certificate for loopback, below a new directory."""
    place.mkdir(mode=0o700)
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer, subject = _name("fedbn authority of one run"), _name("localhost")
    root = (
        _certificate(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(authority, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address(HOST))])
    # OpenSSL of Python 3.13 and later asks for the authority's key identifier.
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    shown = (
        _certificate(subject, issuer, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(identifier, critical=False)
        .sign(authority, hashes.SHA256())
    )
    made = Certificates(place)
    _write(made.root, root.public_bytes(Encoding.PEM))
    _write(place / "server.pem", shown.public_bytes(Encoding.PEM))
    _write(place / "server.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
