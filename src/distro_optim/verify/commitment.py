"""What a peer promises before anyone has its result: the hash of it, signed.

Format: PsycheFoundation/psyche, ``shared/network/src/serialized_distro.rs`` (the hash) and
``shared/coordinator/src/commitment.rs`` (the 96-byte form). The signature is Ed25519 over the 32 bytes of the hash with
the sender's peer-to-peer key; it is made and checked where the keys are, in :mod:`distro_optim.comm`.

What the hash catches: data that differs in one bit from what was announced, data of another step or another interval.
What it misses: shapes, the number of coefficients, the dtype and the trainer's nonce are not in it, so they must be
checked against the receiver's own model; and entries have no separator, so bytes that move from the end of one to the
start of the next keep the hash. It binds a peer to its bytes, it does not say that they are a gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..errors import ConfigurationError, ProtocolError
from .merkle import HASH_SIZE

__all__ = ["COMMITMENT_SIZE", "SIGNATURE_SIZE", "Commitment", "finished_hash", "training_result_hash"]

SIGNATURE_SIZE: Final = 64
COMMITMENT_SIZE: Final = HASH_SIZE + SIGNATURE_SIZE

Bytes = bytes | bytearray | memoryview


def training_result_hash(step: int, batch_start: int, batch_end: int, entries: Iterable[tuple[Bytes, Bytes]]) -> bytes:
    """SHA-256 over a training result.

    Args:
        step: the coordinator's step, 32 bits.
        batch_start: first data index of the interval trained, 64 bits.
        batch_end: last data index, inclusive.
        entries: per parameter, the raw bytes of the indices and of the values (1-bit values packed); any contiguous
            buffer will do and none is copied.

    Raises:
        ConfigurationError: a number does not fit its field.
    """
    digest = hashlib.sha256()
    for name, value, size in (("step", step, 4), ("batch_start", batch_start, 8), ("batch_end", batch_end, 8)):
        if not 0 <= value < 1 << 8 * size:
            raise ConfigurationError(
                f"{name} must fit in {8 * size} unsigned bits, got {value}", name=name, value=value
            )
        digest.update(value.to_bytes(size, "big"))
    for indices, values in entries:
        digest.update(indices)
        digest.update(values)
    return digest.digest()


def finished_hash(broadcast_merkle: bytes) -> bytes:
    """SHA-256 over the Merkle root, 32 bytes, that a "finished" message carries.

    Raises:
        ProtocolError: the root has another length.
    """
    if len(broadcast_merkle) != HASH_SIZE:
        raise ProtocolError(
            f"a Merkle root has {HASH_SIZE} bytes, got {len(broadcast_merkle)}", field="broadcast_merkle"
        )
    return hashlib.sha256(broadcast_merkle).digest()


@dataclass(frozen=True)
class Commitment:
    """A hash and the signature of its maker, 96 bytes on every wire.

    Raises:
        ProtocolError: a part has the wrong length.
    """

    data_hash: bytes
    signature: bytes

    def __post_init__(self) -> None:
        for field, value, size in (
            ("data_hash", self.data_hash, HASH_SIZE),
            ("signature", self.signature, SIGNATURE_SIZE),
        ):
            if len(value) != size:
                raise ProtocolError(f"expected {size} bytes, got {len(value)}", field=field)

    def to_bytes(self) -> bytes:
        """The 96-byte form: the hash, then the signature."""
        return self.data_hash + self.signature

    @classmethod
    def from_bytes(cls, data: Bytes) -> Commitment:
        """Reads the 96-byte form.

        Raises:
            ProtocolError: another length.
        """
        if len(data) != COMMITMENT_SIZE:
            raise ProtocolError(f"a commitment has {COMMITMENT_SIZE} bytes, got {len(data)}")
        return cls(bytes(data[:HASH_SIZE]), bytes(data[HASH_SIZE:]))
