"""Temporary certificates and keys for one deployment on this machine.

A private certificate authority signs one certificate for the loopback address, which the SuperLink and the SuperNodes
use; no other authority is trusted. SuperNodes authenticate with keys that are registered with the SuperLink.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import tomli_w
import trustme
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedbn_simulations.flower.processes import HOST

DAYS = 2
"""Validity of the certificate; longer than any deployment."""


@dataclass(frozen=True)
class Certificates:
    """Files of one deployment.

    Attributes:
        directory: their directory, which only its owner can read.
        users: TOML file with the public key of each user's node; the keys are beside it.
    """

    directory: Path
    users: Path

    @property
    def root(self) -> Path:
        """The certificate of the authority."""
        return self.directory / "root.pem"

    def options(self) -> list[str]:
        """Command line options with which a SuperLink or a SuperNode uses the certificate."""
        files = {"ca-certfile": "root.pem", "certfile": "server.pem", "keyfile": "server.key"}
        return [part for name, file in files.items() for part in (f"--ssl-{name}", str(self.directory / file))]

    def bind_users(self, users: int) -> None:
        """Write the file of the users' keys, unless it exists."""
        self.users.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.users.exists():
            keys = {str(i): self.node_key(i).with_suffix(".pub").read_text() for i in range(users)}
            _write(self.users, tomli_w.dumps(keys).encode())

    def node_key(self, node: int) -> Path:
        """The private key of a node, created on first use; the public key is beside it, with the suffix ``.pub``."""
        path = self.users.with_name(f"node{node}")
        if not path.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
            _write(path.with_suffix(".pub"), key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
        return path


def make_certificates(directory: Path, users: Path | None = None) -> Certificates:
    """Create an authority and a certificate for loopback in a new directory.

    Args:
        directory: the new directory.
        users: TOML file with the public keys of the users' nodes; None for one in the new directory.
    """
    directory.mkdir(mode=0o700)
    now = datetime.now(UTC)
    authority = trustme.CA(path_length=0)  # its key is never written, so it signs no other certificates
    server = authority.issue_cert(
        "localhost", HOST, not_before=now - timedelta(hours=1), not_after=now + timedelta(days=DAYS)
    )
    certificates = Certificates(directory, users or directory / "users.toml")
    _write(certificates.root, authority.cert_pem.bytes())
    _write(directory / "server.pem", server.cert_chain_pems[0].bytes())
    _write(directory / "server.key", server.private_key_pem.bytes())
    return certificates


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
