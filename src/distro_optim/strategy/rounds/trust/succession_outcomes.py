"""What a peer has to do so that its run keeps a host, as :mod:`.succeeding` decides. Declarations only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ....comm.addresses import EndpointAddr
from .estate import Estate

__all__ = ["HOSTS_NOW", "Follow", "Inherit", "Leave", "Outcome", "Say", "TakeOver", "Tell"]

HOSTS_NOW: Final = "this peer hosts the run now"
"""What a peer says when it was elected."""


@dataclass(frozen=True)
class Say:
    """This is to be announced to all."""

    data: bytes


@dataclass(frozen=True)
class Leave:
    """We have voted against the host: nothing of it is to be taken any more."""


@dataclass(frozen=True)
class Follow:
    """Somebody else hosts.

    Attributes:
        host: its public key.
        address: where it is.
    """

    host: bytes
    address: EndpointAddr


@dataclass(frozen=True)
class TakeOver:
    """We host, or go on hosting.

    Attributes:
        term: from now on.
        before: public key of the host before; None if we do not know it.
        estate: what that host left.
    """

    term: int
    before: bytes | None
    estate: Estate


@dataclass(frozen=True)
class Inherit:
    """The host said what it leaves behind: another estate than before."""

    estate: Estate


@dataclass(frozen=True)
class Tell:
    """Something that people should know."""

    text: str


Outcome = Say | Leave | Follow | TakeOver | Inherit | Tell
