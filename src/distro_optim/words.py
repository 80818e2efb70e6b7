"""Strings of strangers, cut and made printable, where they enter: what is shown later needs no further care."""

from __future__ import annotations

from typing import Final

__all__ = ["MAX_SHOWN", "shown"]

MAX_SHOWN: Final = 80
"""Characters of a stranger's string in a log line, an event or an exception. Versions and names of settings have some
twenty."""


def shown(text: str, limit: int = MAX_SHOWN) -> str:
    """``text`` with at most ``limit`` characters, and a question mark for each that cannot be printed: no escape
    sequence, no line break, nothing that turns the direction of writing.
    """
    cut = text[: limit + 1]
    cut = cut if len(cut) <= limit else f"{cut[: limit - 3]}..."
    return "".join(char if char.isprintable() else "?" for char in cut)
