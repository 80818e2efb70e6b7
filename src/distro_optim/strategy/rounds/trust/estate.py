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

__all__ = ["MAX_KEYS", "MAX_PARTS", "PART_SIZE", "Estate", "EstateParts", "LedgerEnd"]

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
