"""Two kinds of randomness, and where each number comes from.

*Public* draws follow from the recipe's seed and are known to every party. *Private* draws follow from 32 bytes that
one party alone holds. Both are a `Source`; they differ in the bytes they start from.

torch's own `manual_seed` keeps 32 bits of a seed: whoever knows the network could try all of them. So a generator's
whole state is filled from the source here, and noise that hides records is drawn from a cipher (ChaCha20), not from a
Mersenne Twister, whose next outputs follow from its last ones.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from milkglass.errors import RecipeError

KEY_BYTES: Final = 32
_TWISTER_WORDS: Final = 624
_TWISTER_FIRST_WORD: Final = 3  # in torch's legacy state: seed, (left, seeded), next, then the 624 words


@final
class Source:
    """All random numbers of one party, or the public ones: named, independent streams under one 32-byte key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise RecipeError(f"a key is {KEY_BYTES} raw bytes, this one has {len(key)}")
        self._key = key

    def __repr__(self) -> str:
        return "Source(<32 bytes, not shown>)"

    def derive(self, *names: object) -> Source:
        """An independent source for the stream of that name. From it, neither this one nor its siblings follow."""
        return Source(hmac.digest(self._key, "\x1f".join(map(str, names)).encode(), hashlib.sha256))

    def generator(self, *names: object) -> torch.Generator:
        """A torch generator whose whole state (19,937 bits) follows from this source and the stream's name."""
        generator = torch.Generator()
        generator.manual_seed(0)
        state = generator.get_state().clone()
        words = state.view(torch.int64)
        raw = torch.frombuffer(bytearray(self.derive(*names).read(4 * _TWISTER_WORDS)), dtype=torch.int32)
        words[_TWISTER_FIRST_WORD : _TWISTER_FIRST_WORD + _TWISTER_WORDS] = raw.to(torch.int64) & 0xFFFFFFFF
        generator.set_state(state)
        return generator

    def read(self, count: int, block: int = 0) -> bytes:
        """`count` bytes of the ChaCha20 key stream under this key, from the start of nonce `block`."""
        nonce = bytes(4) + bytes(4) + block.to_bytes(8, "little")
        return Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor().update(bytes(count))

    def gaussian(self, shape: Sequence[int], block: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, shape `shape`, from nonce `block` of this stream: never use a block twice.

        Box and Muller's transform of 53-bit uniforms, in float64, then rounded to `dtype`.
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        uniform = self._uniform(2 * half, block)
        radius = uniform[:half].log().mul_(-2).sqrt_()
        angle = uniform[half:] * (2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].reshape(tuple(shape)).to(dtype)

    def laplace(self, shape: Sequence[int], block: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Laplace numbers of mean 0 and variance 1, as `gaussian`: the inverse of their distribution function."""
        centered = self._uniform(math.prod(shape), block) - 0.5
        drawn = -centered.sign() * torch.log1p(-2 * centered.abs()) / math.sqrt(2)
        return drawn.reshape(tuple(shape)).to(dtype)

    def _uniform(self, count: int, block: int) -> Tensor:
        """`count` float64 numbers strictly between 0 and 1, each of 53 bits."""
        raw = torch.frombuffer(bytearray(self.read(8 * count + 16, block)), dtype=torch.int64)[:count]
        return ((raw >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53)


def public_source(seed: int) -> Source:
    """The source that every party can compute from the recipe's seed."""
    return Source(hashlib.sha256(f"milkglass public {seed}".encode()).digest())


def rehearsal_source(seed: int, party: str) -> Source:
    """A party's source when one process plays all parties: it follows from the seed, so it hides nothing."""
    return Source(hashlib.sha256(f"milkglass rehearsal {seed} {party}".encode()).digest())


def read_key(path: Path) -> Source:
    """A party's private source, from a file of 32 raw bytes."""
    try:
        key = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"key file {path}: {error.strerror or error}; expected a file of {KEY_BYTES} bytes") from None
    if len(key) != KEY_BYTES:
        raise RecipeError(
            f"key file {path}: {len(key)} bytes; a key is {KEY_BYTES} raw bytes (head -c 32 /dev/urandom)"
        )
    return Source(key)


def write_key(path: Path) -> Source:
    """Make a new private key at `path`, readable by its owner alone; an existing file is never replaced."""
    key = os.urandom(KEY_BYTES)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        os.link(beside, path)  # whole or not at all, and never over a file that is there
    finally:
        beside.unlink()
    return Source(key)


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Inside, what draws from torch's global generator (module initializers, dropout) draws from `generator`.

    The global state is put back afterwards, so milkglass never moves the user's own random numbers.
    """
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)
