"""What a host decides by, beside the run's state, and leaves to whoever hosts after it. No I/O.

The state of the run is known to all; who may come into it, who is banned and where the ledger stands only the host
knows. So it tells the others, signed as all that it says (:mod:`.succession_messages`), in parts that fit in an
announcement; and beside the voters it says which estate is the latest, so that a peer without it does not stand for
election: a run with a list of guests is never opened to everybody by accident.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

from ....comm import postcard
from ....comm.postcard import U32, Bytes32, Limit
from ....coordinator.rules.outlook import USUAL_WAIT_SECONDS
from ....errors import ProtocolError

__all__ = ["MAX_KEYS", "MAX_PARTS", "PART_SIZE", "Estate", "EstateBook", "EstateParts", "LedgerEnd"]

MAX_KEYS: Final = 1024
"""On the list of guests, and likewise of those that are banned. Chosen so that all of it is said in 33 parts."""

PART_SIZE: Final = 2048
"""Bytes of a part; with its envelope it fits in an announcement, which has some 3,900."""

_MAX_BYTES: Final = 2 * MAX_KEYS * 32 + 256
MAX_PARTS: Final = -(-_MAX_BYTES // PART_SIZE)

Keys = Annotated[tuple[Bytes32, ...], Limit(MAX_KEYS)]


@dataclass(frozen=True)
class LedgerEnd:
    """The last line of a host's ledger.

    Attributes:
        host: public key that signs it.
        line: hash of the line, 32 bytes.
    """

    host: Bytes32
    line: Bytes32


@dataclass(frozen=True)
class Estate:
    """See the module.

    Attributes:
        allowed: public keys that may be in the run, sorted; None lets everybody in.
        banned: public keys that may not, sorted.
        joiner_wait_time: see :class:`~distro_optim.strategy.config.RunConfig`.
        keeps_books: whether states and a ledger are written down, as ``save_dir`` says.
        ledger: where the ledger ends, if there is one with a line in it.
    """

    allowed: Keys | None = None
    banned: Keys = ()
    joiner_wait_time: U32 | None = USUAL_WAIT_SECONDS
    keeps_books: bool = False
    ledger: LedgerEnd | None = None

    def parts(self) -> list[bytes]:
        """Its bytes, in parts of at most :data:`PART_SIZE`."""
        data = postcard.encode(self)
        return [data[start : start + PART_SIZE] for start in range(0, len(data), PART_SIZE)]


@dataclass
class EstateParts:
    """The parts of the latest estate, of which some may still be missing; they come in any order, again and again.

    Attributes:
        which: term of the host, and the number of the estate in it; earlier ones count no more.
    """

    which: tuple[int, int] = (0, 0)
    _count: int = 0
    _parts: dict[int, bytes] = field(default_factory=dict)

    def add(self, which: tuple[int, int], place: int, count: int, data: bytes) -> Estate | None:
        """A part; returns the estate if nothing is missing any more.

        Raises:
            ProtocolError: this cannot be, or the parts make no estate.
        """
        if not 0 <= place < count <= MAX_PARTS:
            raise ProtocolError(f"part {place} of {count} of what a host leaves behind: at most {MAX_PARTS}")
        if which < self.which:
            return None
        if (which, count) != (self.which, self._count):
            self.which, self._count, self._parts = which, count, {}
        self._parts[place] = data
        if len(self._parts) < count:
            return None
        whole, self._parts = b"".join(self._parts[number] for number in range(count)), {}
        estate: Estate = postcard.decode(Estate, whole)
        return estate


class EstateBook:
    """What a peer has of its host's estate, or leaves behind itself. Which one it is, is told by the host's term and a
    number in it; number 0 is that of an estate that nobody needs to be told.

    Attributes:
        ours: the estate that we have.
        latest: which the host's latest is.
    """

    def __init__(self) -> None:
        self.ours = Estate()
        self.latest = (0, 0)
        self._has = (0, 0)
        self._parts = EstateParts()

    @property
    def is_complete(self) -> bool:
        """Whether the host's latest is ours."""
        return self._has == self.latest

    @property
    def has_any(self) -> bool:
        """Whether a host has told us one, if not the latest."""
        return self._has[1] > 0

    def write(self, estate: Estate, term: int) -> bool:
        """As a host: this is what we leave behind; whether it is another one than before."""
        if estate == self.ours:
            return False
        self.ours = estate
        self._has = self.latest = (term, self.latest[1] + 1)
        return True

    def take_over(self, term: int) -> None:
        """We host from now on: what we have is said again, in our term, if there is anything to say."""
        self._has = self.latest = (term, int(self.has_any))

    def announced(self, which: tuple[int, int]) -> Estate | None:
        """The host says which is its latest; returns the estate if we have it by that, and it is new."""
        self.latest = max(self.latest, which)
        return self._take(Estate(), which) if self.latest == which and not which[1] else None

    def hear(self, which: tuple[int, int], place: int, count: int, data: bytes) -> Estate | None:
        """A part; returns the estate if it is whole by that, and new.

        Raises:
            ProtocolError: see :meth:`EstateParts.add`.
        """
        estate = self._parts.add(which, place, count, data)
        return None if estate is None else self._take(estate, which)

    def _take(self, estate: Estate, which: tuple[int, int]) -> Estate | None:
        self._has, self.latest = which, max(self.latest, which)
        if estate == self.ours:
            return None
        self.ours = estate
        return estate
