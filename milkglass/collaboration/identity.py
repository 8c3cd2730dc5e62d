"""Who a volunteer is: an Ed25519 key, whose public half is the peer id that the network's own handshake proves.

libp2p writes the public key of Ed25519 into the peer id itself, so whoever knows an id can check a signature, and a
connection comes from the id that it says. hivemind makes RSA keys by default, and signs records with a second one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from milkglass.collaboration.engine import PeerID, crypto_pb2
from milkglass.errors import CertificateError
from milkglass.runs import write_beside

_BEFORE_KEY: Final = bytes.fromhex("002408011220")  # identity multihash of 36 bytes; key type Ed25519; 32 bytes
_SEED: Final = 32


@final
@dataclass(frozen=True)
class Identity:
    """A private key, and the peer id that follows from it."""

    key: Ed25519PrivateKey

    @property
    def peer_id(self) -> bytes:
        """The id by which the network knows its owner."""
        return _BEFORE_KEY + self.key.public_key().public_bytes_raw()

    @property
    def name(self) -> str:
        """The id as people see it, 12D3KooW..."""
        return peer_name(self.peer_id)

    def sign(self, content: bytes) -> bytes:
        """64 bytes."""
        return self.key.sign(content)

    def write(self, path: Path) -> None:
        """Keep the key in a file, in libp2p's form, readable by its owner alone."""
        raw = self.key.private_bytes_raw() + self.key.public_key().public_bytes_raw()
        write_beside(path, crypto_pb2.PrivateKey(key_type=crypto_pb2.Ed25519, data=raw).SerializeToString())


def new_identity() -> Identity:
    """A new key."""
    return Identity(Ed25519PrivateKey.generate())


def read_identity(path: Path) -> Identity:
    """The key in a file that `Identity.write` made. Raises CertificateError, one line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror or error}; expected a volunteer's key") from None
    try:
        read = crypto_pb2.PrivateKey.FromString(content)
        if read.key_type != crypto_pb2.Ed25519 or len(read.data) != 2 * _SEED:
            raise ValueError
        identity = Identity(Ed25519PrivateKey.from_private_bytes(read.data[:_SEED]))
        if identity.peer_id[-_SEED:] != read.data[_SEED:]:
            raise ValueError
    except Exception:  # protobuf raises its own
        raise CertificateError(f"{path}: damaged; expected a volunteer's key, as collab-authority makes it") from None
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise CertificateError(f"{path}: others can read this private key; expected mode 600: chmod 600 {path}")
    return identity


def signed_by(peer_id: bytes, content: bytes, signature: bytes) -> bool:
    """Whether the owner of that peer id signed the content."""
    if len(peer_id) != len(_BEFORE_KEY) + _SEED or not peer_id.startswith(_BEFORE_KEY):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(peer_id[-_SEED:]).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_name(peer_id: bytes) -> str:
    """A peer id as people see it."""
    return str(PeerID(peer_id).to_base58())


def short_name(peer_id: bytes) -> str:
    """The last eight letters of it: enough to tell volunteers apart in a log."""
    return peer_name(peer_id)[-8:]
