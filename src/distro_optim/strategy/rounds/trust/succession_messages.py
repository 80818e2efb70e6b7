"""What peers say about who hosts (:mod:`.succeeding`), and the bytes of it. No I/O.

It travels where the reports on weights do, behind :data:`MARK`, which no report begins with. Each message is signed by
itself, beside what the gossip signs: votes and promises are handed on as proofs. It names the run, so that nothing said
in one run counts in another::

    MARK, SignedMessage(sender, Letter(run, count, said), signature)
    AGAIN, count (4 bytes), the same      what somebody has said, repeated by another

A voter is called by its key and a number that is drawn at each start of its program: one that has forgotten what it
promised is somebody else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final

from ....comm import postcard
from ....comm.addresses import EndpointAddr
from ....comm.postcard import U16, U32, U64, Fixed, Limit
from ....comm.signing import PUBLIC_KEY_SIZE, SecretKey, SignedMessage
from ....errors import ProtocolError
from .estate import PART_SIZE
from .succession import Promise, Roster, Vote

__all__ = [
    "AGAIN",
    "MARK",
    "MAX_LETTER",
    "MAX_VOTERS",
    "NEVER",
    "NUMBER_SIZE",
    "Ballot",
    "Elected",
    "EstatePart",
    "Here",
    "Letter",
    "Pledge",
    "Proposal",
    "Said",
    "Stands",
    "VoterList",
    "is_letter",
    "key_of",
    "letter_in",
    "open_letter",
    "repeat_letter",
    "run_mark",
    "seal_letter",
]

MARK: Final = b"\xff\xff\xff\xffsucc1"
"""Begins with what is no number of an epoch, so that a report on weights is never taken for it, nor it for one."""

AGAIN: Final = b"\xff\xff\xff\xffagain"
"""Begins a letter of another that is repeated, as that one may be gone. The count behind it makes it a new message to
the gossip; nobody signs it, as the letter speaks for itself."""

_COUNT_SIZE: Final = 4

NUMBER_SIZE: Final = 8
"""Random bytes of a voter's name."""

_RUN_SIZE: Final = 8
"""Of the run's mark. Two runs with the same one would have to have a host and voters in common."""

MAX_VOTERS: Final = 24
"""Of a roster. Chosen so that the votes of more than half of them fit in one announcement."""

NEVER: Final = ((1 << 64) - 1, (1 << 64) - 1)
"""The roster that is promised by one who leaves: it does not vote any more."""

MAX_LETTER: Final = 1024
"""Bytes of a vote or a promise that is handed on; they have some 250."""

Name = Annotated[bytes, Fixed(PUBLIC_KEY_SIZE + NUMBER_SIZE)]
Pair = tuple[U64, U64]
Sealed = Annotated[bytes, Limit(MAX_LETTER)]


def key_of(name: bytes) -> bytes:
    """The public key of the voter with this name."""
    return name[:PUBLIC_KEY_SIZE]


@dataclass(frozen=True)
class VoterList:
    """A :class:`~.succession.Roster` with its voters in the order in which they may host."""

    term: U64
    number: U64
    voters: Annotated[tuple[Name, ...], Limit(MAX_VOTERS)]
    base: Pair

    @property
    def roster(self) -> Roster:
        """The roster."""
        return Roster(self.term, self.number, frozenset(self.voters), self.base)


@dataclass(frozen=True)
class Here:
    """The sender is there: said by those who want to be voters, and by all when the host is silent.

    Attributes:
        name: of the sender.
        position: the last round it was in, see :class:`~.succession.Peer`.
        silent: it has not heard of the host for half of the time after which somebody else is elected.
    """

    name: Name
    position: Pair
    silent: bool


@dataclass(frozen=True)
class Proposal:
    """The host says who are voters, or are to be.

    Attributes:
        host: its name.
        term: in which it hosts.
        voters: the roster.
        old: the one before, whose voters have to promise; None for the first.
        promises: letters with :class:`Pledge`, once there are enough: from then on the roster is good.
        after: tenths of a second for which a host may be silent.
        estate: number of what the host leaves behind, see :mod:`.estate`: who has not got it does not stand for
            election. 0 for nothing that would need to be said.
    """

    host: Name
    term: U64
    voters: VoterList
    old: Pair | None
    promises: Annotated[tuple[Sealed, ...], Limit(MAX_VOTERS)]
    after: U16
    estate: U32


@dataclass(frozen=True)
class Pledge:
    """See :class:`~.succession.Promise`. With :data:`NEVER` for the new roster, it holds for whichever follows."""

    old: Pair
    new: Pair
    voter: Name

    def promise(self, new: tuple[int, int]) -> Promise:
        """The promise; ``new`` is the roster that is to follow."""
        return Promise(self.old, new if self.new == NEVER else self.new, self.voter)


@dataclass(frozen=True)
class Stands:
    """See :class:`~.succession.Candidacy`; ``position`` is that of the candidate, as of its vote for itself."""

    term: U64
    candidate: Name
    roster: Pair
    position: Pair


@dataclass(frozen=True)
class Ballot:
    """See :class:`~.succession.Vote`."""

    term: U64
    candidate: Name
    roster: Pair
    voter: Name
    position: Pair

    @property
    def vote(self) -> Vote:
        """The vote."""
        return Vote(self.term, self.candidate, self.roster, self.voter, self.position)


@dataclass(frozen=True)
class Elected:
    """Somebody hosts from now on; the votes, letters with :class:`Ballot`, prove it.

    Attributes:
        term, candidate, roster: of the election.
        address: where the new host is.
        votes: of more than half of the roster.
    """

    term: U64
    candidate: Name
    roster: Pair
    address: EndpointAddr
    votes: Annotated[tuple[Sealed, ...], Limit(MAX_VOTERS)]


@dataclass(frozen=True)
class EstatePart:
    """The host says what it leaves to whoever hosts after it, see :class:`~.estate.Estate`; one part of it.

    Attributes:
        host: its name.
        term: in which it hosts.
        number: of the estate in this term; of two, the later one is larger.
        place, count: which part it is, from 0, and of how many.
        data: its bytes.
    """

    host: Name
    term: U64
    number: U32
    place: U16
    count: U16
    data: Annotated[bytes, Limit(PART_SIZE)]


Said = Here | Proposal | Pledge | Stands | Ballot | Elected | EstatePart


@dataclass(frozen=True)
class Letter:
    """What is signed.

    Attributes:
        run: see :func:`run_mark`.
        count: of repetitions, so that gossip takes each for a new message.
        said: the message.
    """

    run: Annotated[bytes, Fixed(_RUN_SIZE)]
    count: U32
    said: Said


def run_mark(run_id: str) -> bytes:
    """What stands for a run in its letters."""
    return hashlib.sha256(MARK + run_id.encode()).digest()[:_RUN_SIZE]


def seal_letter(key: SecretKey, run: bytes, count: int, said: Said) -> bytes:
    """The bytes of a signed letter."""
    return MARK + SignedMessage.seal(key, MARK + postcard.encode(Letter(run, count, said)))


def is_letter(data: bytes) -> bool:
    """Whether ``data`` is a letter, or one that is repeated."""
    return data.startswith((MARK, AGAIN))


def letter_in(data: bytes) -> bytes:
    """The letter itself, also if another peer repeats it."""
    return data[len(AGAIN) + _COUNT_SIZE :] if data.startswith(AGAIN) else data


def repeat_letter(count: int, sealed: bytes) -> bytes:
    """The bytes by which another peer repeats a letter; :func:`letter_in` is the way back."""
    return AGAIN + count.to_bytes(_COUNT_SIZE, "little") + sealed


def open_letter(run: bytes, sealed: bytes) -> tuple[bytes, Said]:
    """Who says what; the signature is verified, and that the sender speaks for itself.

    Raises:
        ProtocolError: it is malformed, of another run, or not signed by the one that it is about.
    """
    if not sealed.startswith(MARK):
        raise ProtocolError("it does not begin as what is said about the host does")
    message = SignedMessage.open(sealed[len(MARK) :])
    if not message.data.startswith(MARK):
        raise ProtocolError("something else was signed")
    letter: Letter = postcard.decode(Letter, message.data[len(MARK) :])
    if letter.run != run:
        raise ProtocolError("it is about another run")
    said = letter.said
    if key_of(_speaker(said)) != message.sender:
        raise ProtocolError("somebody speaks for another peer")
    return message.sender, said


def _speaker(said: Said) -> bytes:
    match said:
        case Here():
            return said.name
        case Proposal() | EstatePart():
            return said.host
        case Pledge() | Ballot():
            return said.voter
        case _:
            return said.candidate
