"""The text around a ticket: how its bytes are written, and what people make of it when they copy it. No I/O.

Imports next to nothing, so that a damaged ticket is noticed before what takes seconds to import.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Final

from ..errors import ProtocolError

__all__ = [
    "MAX_TEXT",
    "SOLANA",
    "WHAT_TO_COPY",
    "check_text",
    "decode_text",
    "encode_text",
    "is_ticket",
    "pasted",
    "run_on_solana",
]

PREFIX: Final = "psyche1"

SOLANA: Final = "solana:"
"""In front of the name of a run that is coordinated on Solana."""

MAX_TEXT: Final = 4096
"""Characters; room for as many ways to a coordinator as a ticket has."""

WHAT_TO_COPY: Final = "Copy all of the ticket that the host printed (psyche1...), or write host:port/run-id"
"""What to do about a text that names no run."""

_CHECK_SIZE: Final = 4

_MAX_NAME: Final = 32
"""Bytes; the name of a run on Solana is part of an address, and those are made of parts of at most 32."""

_HOST_CALLED_SOLANA: Final = re.compile(r"solana:\d{1,5}/", re.IGNORECASE)

_QUOTES: Final = "\"'`\u201c\u201d\u201e\u2018\u2019\u201a\u00ab\u00bb\u2039\u203a"
"""Straight ones, and those that word processors and messengers put in their place."""

_AROUND: Final = _QUOTES + "<>()[]{},.;:"
"""What sentences, lists and programs have around a ticket."""

_UNSEEN: Final = re.compile(r"[\s\u200b\u200c\u200d\u2060\ufeff]+")
"""White space, line ends among it, and characters that take no room."""

_NAMED: Final = re.compile(r"^(distro_optim_)?run=", re.IGNORECASE)
"""The variable or the argument, copied along with what it holds."""


def encode_text(payload: bytes) -> str:
    """``payload`` as a ticket."""
    data = hashlib.sha256(payload).digest()[:_CHECK_SIZE] + payload
    return PREFIX + base64.b32encode(data).decode("ascii").rstrip("=").lower()


def decode_text(text: str) -> bytes:
    """The payload of a ticket, however it was copied.

    Raises:
        ProtocolError: it was damaged on its way, or is none.
    """
    text = pasted(text)
    if not is_ticket(text):
        raise ProtocolError(f"a run is named by a ticket ({PREFIX}...) or as host:port/run-id, got {text[:40]!r}")
    digits = text[len(PREFIX) :].upper()
    try:
        data = base64.b32decode(digits + "=" * (-len(digits) % 8))
    except (binascii.Error, ValueError):
        data = b""
    check, payload = data[:_CHECK_SIZE], data[_CHECK_SIZE:]
    # Leftover bits would allow several texts for one ticket.
    whole = base64.b32encode(data).decode("ascii").rstrip("=") == digits
    if not payload or not whole or hashlib.sha256(payload).digest()[:_CHECK_SIZE] != check:
        raise ProtocolError("the ticket is damaged: it was changed, or not copied whole")
    return payload


def check_text(text: str) -> None:
    """Looks whether ``text`` can name a run, as far as that is seen without reading what it says.

    Raises:
        ProtocolError: it is a damaged ticket, or neither a ticket nor ``host:port/run-id`` nor ``solana:run-id``.
    """
    if run_on_solana(text) is None and "/" not in pasted(text):
        decode_text(text)


def run_on_solana(text: str) -> str | None:
    """The name of the run on Solana that ``text`` means, as in ``solana:my-run``; None if it means another kind.

    Raises:
        ProtocolError: no run on Solana can have this name.
    """
    if len(text) > MAX_TEXT:
        return None  # nor any other kind, as those who read it next say
    found = pasted(text)
    if not found.lower().startswith(SOLANA) or _HOST_CALLED_SOLANA.match(found):
        return None
    name = found[len(SOLANA) :].strip()
    size = len(name.encode(errors="surrogatepass"))
    if not 0 < size <= _MAX_NAME:
        raise ProtocolError(f"the name of a run on Solana has 1 to {_MAX_NAME} bytes, got {size}: write {SOLANA}RUN-ID")
    return name


def is_ticket(text: str) -> bool:
    """Whether ``text`` is meant to be a ticket, damaged or not, and not ``host:port/run-id``."""
    found = pasted(text)
    return found.startswith(PREFIX) and "/" not in found


def pasted(text: str) -> str:
    """What names a run, without what came along when it was copied.

    Of a ticket: quotes, brackets, commas and stops around it, line ends within it, capitals, and a name in front. Of
    ``host:port/run-id``, where all of these can belong to the name: quotes around all of it, and a comma behind them.

    Raises:
        ProtocolError: it is longer than any ticket.
    """
    if len(text) > MAX_TEXT:
        raise ProtocolError(f"a ticket has at most {MAX_TEXT} characters, got {len(text)}")
    bare = _NAMED.sub("", _UNSEEN.sub("", text).strip(_AROUND)).strip(_AROUND).lower()
    if bare.startswith(PREFIX) and "/" not in bare:
        return bare
    typed = text.strip()
    quoted = typed.rstrip(",")
    if len(quoted) > 1 and quoted[0] in _QUOTES and quoted[-1] in _QUOTES:
        return quoted[1:-1].strip()
    return typed
