"""A peer that takes part like everybody, but announces something else than what it trained.

For tests and benchmarks: :class:`LyingSwarm` lies around the swarm of a peer whose other parts are honest. What it
trained is what it lies with, so that a lie fits the model as well as an attacker could make it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from blake3 import blake3
from typing_extensions import override

from ..comm import postcard
from ..comm.signing import SecretKey
from ..comm.swarm import Channel, Swarm
from ..comm.tickets import BlobTicket
from ..compress.wire import TransmittableDistroResult, decode_download, encode_download
from ..compress.wire_tensor import KIND_BOOL, SerializableTensor
from ..strategy.rounds.broadcasts import Broadcast, TrainingResult
from ..strategy.rounds.results import commitment_hash
from ..verify.commitment import Commitment
from .weather import SwarmAround

__all__ = ["LIES", "Lie", "LyingSwarm", "Truth", "mis_signed"]

_FLOAT32: Final = 6
"""libtorch's number for the type (``c10/core/ScalarType.h``)."""

_ROOM_OF_AN_OVERSIZED_BLOB: Final = 8 * 1024 * 1024
"""Bytes; far more than the results of small models have."""

_REMEMBERED: Final = 4
"""Own results that can still be announced: a repeated announcement may be some rounds old."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the peer would have said.

    Attributes:
        broadcast: an announcement of a result.
        announced: what it announces.
        blob: the result.
        first: the first result that the peer ever had.
        key: of the peer.
    """

    broadcast: Broadcast
    announced: TrainingResult
    blob: bytes
    first: bytes
    key: SecretKey

    @property
    def result(self) -> TransmittableDistroResult:
        """The result, decoded."""
        return decode_download(self.blob)

    def with_result(self, result: TransmittableDistroResult) -> tuple[Broadcast, bytes]:
        """Another result, committed to and signed as it should be."""
        return self.with_blob(encode_download(result), commitment_hash(result))

    def with_blob(self, blob: bytes, data_hash: bytes) -> tuple[Broadcast, bytes]:
        """Another blob, under any hash."""
        ticket = BlobTicket.raw(self.announced.ticket.addr, blake3(blob).digest())
        return (
            replace(
                self.broadcast,
                commitment=Commitment(data_hash, self.key.sign(data_hash)),
                data=TrainingResult(self.announced.batch_id, ticket),
            ),
            blob,
        )


Lie = Callable[[Truth], tuple[Broadcast, bytes]]


def wrong_shape(truth: Truth) -> tuple[Broadcast, bytes]:
    """The tensors in another order, so that none has the shape of its place."""
    return truth.with_result(replace(truth.result, distro_results=truth.result.distro_results[::-1]))


def too_few_tensors(truth: Truth) -> tuple[Broadcast, bytes]:
    """All tensors but the first."""
    return truth.with_result(replace(truth.result, distro_results=truth.result.distro_results[1:]))


def not_a_number(truth: Truth) -> tuple[Broadcast, bytes]:
    """Values in place of signs, all of them NaN."""
    results = []
    for entry in truth.result.distro_results:
        value = entry.sparse_val
        count = int(np.prod(value.dims))
        data = np.full(count, np.nan, dtype="<f4").tobytes()
        results.append(replace(entry, sparse_val=SerializableTensor(value.dims, _FLOAT32, data)))
    return truth.with_result(replace(truth.result, distro_results=tuple(results)))


def oversized(truth: Truth) -> tuple[Broadcast, bytes]:
    """Megabytes behind the result."""
    return truth.with_blob(truth.blob + bytes(_ROOM_OF_AN_OVERSIZED_BLOB), truth.broadcast.commitment.data_hash)


def replayed(truth: Truth) -> tuple[Broadcast, bytes]:
    """Its first result, for this batch, in the hope that nobody looks at the step."""
    return truth.with_blob(truth.first, commitment_hash(decode_download(truth.first)))


def mis_signed(truth: Truth) -> tuple[Broadcast, bytes]:
    """The honest result, and a signature with one wrong bit: a lie where Psyche's clients are, and to peers of our own
    kind the truth, since they believe the signature of the message around it."""
    commitment = truth.broadcast.commitment
    signature = commitment.signature[:-1] + bytes([commitment.signature[-1] ^ 1])
    return replace(truth.broadcast, commitment=Commitment(commitment.data_hash, signature)), truth.blob


def another_blob(truth: Truth) -> tuple[Broadcast, bytes]:
    """Signs turned round after they were committed to."""
    results = []
    for entry in truth.result.distro_results:
        value = entry.sparse_val
        if value.kind == KIND_BOOL:
            value = replace(value, data=bytes(byte ^ 0xFF for byte in bytes(value.data)))
        results.append(replace(entry, sparse_val=value))
    blob = encode_download(replace(truth.result, distro_results=tuple(results)))
    return truth.with_blob(blob, truth.broadcast.commitment.data_hash)


LIES: Final[dict[str, Lie]] = {
    lie.__name__: lie
    for lie in (wrong_shape, too_few_tensors, not_a_number, oversized, replayed, mis_signed, another_blob)
}
"""All of them, by name."""


class LyingSwarm(SwarmAround):
    """Every announcement of a result goes through one of ``lies``, in turns: one lie a round.

    Args:
        inner: the swarm that carries everything.
        key: of the peer.
        lies: what it says instead.

    Attributes:
        told: how often it told each, by name.
    """

    def __init__(self, inner: Swarm, key: SecretKey, lies: Sequence[Lie]) -> None:
        super().__init__(inner)
        self._key = key
        self._lies = tuple(lies)
        self._blobs: dict[bytes, bytes] = {}
        self._first: bytes | None = None
        self.told: Counter[str] = Counter()

    @override
    async def publish(self, data: bytes, tag: str) -> BlobTicket:
        ticket = await self.inner.publish(data, tag)
        self._blobs[ticket.hash] = data
        while len(self._blobs) > _REMEMBERED:
            del self._blobs[next(iter(self._blobs))]
        return ticket

    @override
    async def announce(self, data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
        await self.inner.announce(await self._twisted(data) if channel is Channel.RUN else data, channel=channel)

    async def _twisted(self, data: bytes) -> bytes:
        broadcast = postcard.decode(Broadcast, data)
        announced = broadcast.data
        if not isinstance(announced, TrainingResult):
            return data
        blob = self._blobs.get(announced.ticket.hash)
        if blob is None:
            return data
        self._first = self._first or blob
        lie = self._lies[broadcast.step % len(self._lies)]
        lied, other = lie(Truth(broadcast=broadcast, announced=announced, blob=blob, first=self._first, key=self._key))
        if other != blob:
            await self.inner.publish(other, f"lie {broadcast.step % _REMEMBERED}")
        self.told[lie.__name__] += 1
        return postcard.encode(lied)
