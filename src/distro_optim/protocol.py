"""Which versions of this package can train together in a run of our own kind: a number, and who has to upgrade. No I/O.

Each peer speaks the protocols from :data:`OLDEST` to :data:`PROTOCOL`. Two that have one in common can be in one run.
:data:`PROTOCOL` grows by one when a peer of the version before could not take part, or would come to other weights:
when bytes that peers exchange change, or what they mean, or the arithmetic. It does not grow for what the other side
may leave out. :data:`OLDEST` grows when we no longer do what an older one needs.

Runs of Psyche's have their own numbers, and nothing of this is said in them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from ._version import __version__
from .errors import ProtocolError
from .words import shown

__all__ = ["OLDEST", "OURS", "PROTOCOL", "SILENT", "Speaks", "why_apart"]

PROTOCOL: Final = 1
"""The newest that we speak. 1: as in distro_optim 0.1."""

OLDEST: Final = 1
"""The oldest that we still speak."""

MAX_BYTES: Final = 1024
"""Of an introduction. Ours has 60; later ones may say more, which is passed over."""

_MAX_PROTOCOL: Final = 1_000_000

_MAX_VERSION: Final = 40
"""Characters of a version that are shown."""


@dataclass(frozen=True)
class Speaks:
    """What a peer says of itself.

    Attributes:
        oldest, newest: protocols that it speaks, and all between them.
        version: of its package; printable, empty if it does not say it.
    """

    oldest: int
    newest: int
    version: str = ""

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps({"protocols": [self.oldest, self.newest], "version": self.version}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Speaks:
        """Reads what a stranger says; what is not known here is passed over.

        Raises:
            ProtocolError: it is not an introduction.
        """
        if len(data) > MAX_BYTES:
            raise ProtocolError(f"an introduction has at most {MAX_BYTES} bytes")
        try:
            said = json.loads(data)
        except (ValueError, RecursionError):
            raise ProtocolError("an introduction is JSON") from None
        if not isinstance(said, dict) or not isinstance(said.get("version"), str):
            raise ProtocolError("an introduction says version and protocols")
        return cls.read(said.get("protocols"), said["version"])

    @classmethod
    def read(cls, protocols: object, version: str) -> Speaks:
        """From its parts, as a stranger says them.

        Raises:
            ProtocolError: they are no such numbers.
        """
        match protocols:
            case [int() as oldest, int() as newest] if not isinstance(oldest, bool) and not isinstance(newest, bool):
                if 1 <= oldest <= newest <= _MAX_PROTOCOL:
                    return cls(oldest, newest, shown(version, _MAX_VERSION))
        raise ProtocolError("protocols are two numbers, the oldest and the newest", field="protocols")

    @override
    def __str__(self) -> str:
        numbers = (
            f"protocol {self.newest}" if self.oldest == self.newest else f"protocols {self.oldest} to {self.newest}"
        )
        return f"distro_optim {self.version or 'of an older version'} ({numbers})"


OURS: Final = Speaks(OLDEST, PROTOCOL, __version__)
"""What we speak."""

SILENT: Final = Speaks(1, 1)
"""What counts for a peer that says nothing: those before the first that did."""


def common(one: Speaks, other: Speaks) -> int | None:
    """The protocol that the two train by; None if they cannot train together."""
    newest = min(one.newest, other.newest)
    return newest if newest >= max(one.oldest, other.oldest) else None


def why_apart(here: Speaks, there: Speaks, *, us: str, them: str) -> str | None:
    """Why two cannot be in one run, and who has to upgrade to what; None if they can.

    Args:
        here: what one speaks.
        there: what the other does.
        us: what to call the former, such as ``"this machine"``.
        them: what to call the latter.
    """
    if common(here, there) is not None:
        return None
    ahead, who = (there, us) if here.newest < there.oldest else (here, them)
    wanted = f"distro_optim {ahead.version}" if ahead.version else f"a distro_optim that speaks protocol {ahead.oldest}"
    return (
        f"{us} has {here}, {them} has {there}, and they cannot train together: {who} has to upgrade to {wanted}"
        f"{_how(ahead.version)}"
    )


def _how(version: str) -> str:
    """The line to type, if what a stranger calls its version can be typed."""
    is_plain = version and all(char.isascii() and (char.isalnum() or char in ".+-_") for char in version)
    return f" (pip install 'distro-optim=={version}')" if is_plain else ""
