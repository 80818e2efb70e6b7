"""What a host tells people, so that they can join."""

from __future__ import annotations

from .session import SwarmSession

__all__ = ["invitation"]


def invitation(session: SwarmSession, line: str) -> str:
    """The ticket in the line of code that others write.

    Args:
        session: hosting.
        line: that line, with ``{ticket!r}`` in it.
    """
    code = line.format(ticket=session.ticket)
    return f"Hosting the run {session.run_id!r}. Others join with the same script and\n\n    {code}\n"
