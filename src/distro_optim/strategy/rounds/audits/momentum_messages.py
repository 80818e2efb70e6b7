"""What peers tell each other of their momenta, for test 2, as bytes. Travels where Psyche's clients do not listen.

=========================  ==========================================================================================
``ff ff ff ff 02``         :class:`MomentumSaid`: what a peer's momentum was after a step, as a hash
``ff ff ff ff 03``         :class:`OpeningSaid`: where to fetch what an audited peer shows
``ff ff ff ff 04``         :class:`MomentumReport`: what an auditor found in it
=========================  ==========================================================================================

All three are signed for their run besides, so that anybody can be shown them later. Builds that know of test 1 alone
take them for reports on weights that are none, and drop them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final, Self

from blake3 import blake3
from typing_extensions import override

from ....comm import postcard
from ....comm.postcard import F32, U16, U32, Bytes32, Bytes64, Limit
from ....comm.signing import SecretKey, is_signed_by
from ....comm.tickets import BlobTicket
from ....errors import ProtocolError
from ....verify.audit import Verdict
from ....verify.calibrate import Noise

__all__ = [
    "MAX_BYTES",
    "MAX_GROUPS",
    "Distances",
    "MomentumMessage",
    "MomentumReport",
    "MomentumSaid",
    "OpeningSaid",
    "Outcome",
    "decode_momentum_message",
    "distances_of",
    "is_momentum_message",
]

MAX_BYTES: Final = 2048
"""Of a message. One with the longest address, or with all decays, has some 1,200."""

MAX_GROUPS: Final = 256
"""Parameter groups, each with its decay; peers with more do not commit to their momentum. Chosen arbitrarily: a group
for each tensor of a small model."""

_MARK: Final = b"\xff\xff\xff\xff"
_DOMAIN: Final = b"distro-optim audit of momentum 1\0"
_LARGEST: Final = 0xFFFF_FFFF
_UNITS: Final = 1_000_000
"""Of a distance of 1."""


class Outcome(enum.Enum):
    """What came of an audit, as one auditor saw it."""

    COMPARED = "the opened momentum was computed again"
    NOT_SHOWN = "no commitment came in time, or no opening"
    NOT_AS_SAID = "what was opened is not what was committed to, or cannot be read"


@dataclass(frozen=True)
class Distances:
    """Of test 2, in millionths; what is larger than 4,294 is cut off.

    Attributes:
        jaccard, hamming, manhattan: see :class:`~distro_optim.verify.audit.Verdict`.
    """

    jaccard: U32
    hamming: U32
    manhattan: U32

    @classmethod
    def of(cls, jaccard: float, hamming: float, manhattan: float) -> Distances:
        """From numbers that are not below 0; what is not finite is the largest."""
        return cls(*(_millionths(value) for value in (jaccard, hamming, manhattan)))

    def noise(self) -> Noise:
        """For limits."""
        return Noise(jaccard=self.jaccard / _UNITS, hamming=self.hamming / _UNITS, manhattan=self.manhattan / _UNITS)


def _millionths(value: float) -> int:
    return _LARGEST if not value <= _LARGEST / _UNITS else max(0, round(value * _UNITS))


@dataclass(frozen=True)
class MomentumMessage:
    """What all of them have; made by its subclasses.

    Attributes:
        epoch, step: of the audited result, or of the momentum.
        signature: of the sender, over everything but itself and the nonce, and the run's name.
        nonce: counts repetitions.
    """

    kind: ClassVar[int]
    epoch: U16
    step: U32
    signature: Bytes64
    nonce: U32

    def signed(self, key: SecretKey, run_id: str) -> Self:
        """The same, signed."""
        return replace(self, signature=key.sign(self._to_sign(run_id)))

    def is_signed_by(self, sender: bytes, run_id: str) -> bool:
        """Whether it is the word of the owner of this public key, about this run."""
        return is_signed_by(sender, self._to_sign(run_id), self.signature)

    def again(self) -> Self:
        """The same, as a new message."""
        return replace(self, nonce=(self.nonce + 1) & _LARGEST)

    def encode(self) -> bytes:
        """The message."""
        return _MARK + bytes([self.kind]) + postcard.encode(self)

    def check(self) -> None:
        """Raises :class:`~distro_optim.errors.ProtocolError` if what it says cannot be."""

    def _to_sign(self, run_id: str) -> bytes:
        unsigned: Any = replace(self, signature=bytes(64), nonce=0)
        return _DOMAIN + bytes([self.kind]) + blake3(run_id.encode()).digest() + postcard.encode(unsigned)


@dataclass(frozen=True)
class MomentumSaid(MomentumMessage):
    """What the sender's momentum was after a step; see :class:`~distro_optim.verify.momentum.MomentumCommitment`.

    Attributes:
        root: of the tree.
        decays: by which the momentum is kept in each step, one for each parameter group. They are a peer's own.
    """

    kind = 2
    root: Bytes32
    decays: Annotated[tuple[F32, ...], Limit(MAX_GROUPS)]

    @override
    def check(self) -> None:
        """See :class:`MomentumMessage`."""
        if not all(0 <= decay <= 1 for decay in self.decays):
            raise ProtocolError("the decay of a momentum is a number from 0 to 1", field="decays")


@dataclass(frozen=True)
class OpeningSaid(MomentumMessage):
    """Where to fetch what the sender, which is audited, shows of its momentum in a step."""

    kind = 3
    ticket: BlobTicket


@dataclass(frozen=True)
class MomentumReport(MomentumMessage):
    """One auditor about one result.

    Attributes:
        trainer: public key of who is audited.
        outcome: what came of it.
        found: distances, if it was compared; 0 otherwise.
        coefficients: that were compared.
        own: what the auditor found in its own momentum of the step, by another way of computing, which is noise.
    """

    kind = 4
    trainer: Bytes32
    outcome: Outcome
    found: Distances
    coefficients: U32
    own: Distances | None

    @override
    def check(self) -> None:
        """See :class:`MomentumMessage`."""
        if self.outcome is not Outcome.COMPARED and (self.coefficients or self.found != Distances(0, 0, 0)):
            raise ProtocolError("the report of an audit has distances of what was not compared", field="found")


def distances_of(verdict: Verdict) -> Distances:
    """Of an audit."""
    return Distances.of(verdict.jaccard, verdict.hamming, verdict.manhattan)


_KINDS: Final[dict[int, type[MomentumMessage]]] = {cls.kind: cls for cls in (MomentumSaid, OpeningSaid, MomentumReport)}


def is_momentum_message(data: bytes) -> bool:
    """Whether a message on the channel of our own kind is one of these."""
    return data.startswith(_MARK) and data[len(_MARK) : len(_MARK) + 1] in {bytes([kind]) for kind in _KINDS}


def decode_momentum_message(data: bytes) -> MomentumMessage:
    """The inverse of :meth:`MomentumMessage.encode`.

    Raises:
        ProtocolError: it is none, or contradicts itself.
    """
    if not is_momentum_message(data) or len(data) > MAX_BYTES:
        raise ProtocolError(f"a message about a momentum begins with {_MARK.hex()} and has at most {MAX_BYTES} bytes")
    message = postcard.decode(_KINDS[data[len(_MARK)]], data[len(_MARK) + 1 :])
    message.check()
    return message
