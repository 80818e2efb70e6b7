"""How often a thread that waits looks whether it should go on waiting."""

from __future__ import annotations

from typing import Final

__all__ = ["POLL_SECONDS"]

POLL_SECONDS: Final = 0.1
"""A wait is made of pieces of this length, since on some systems Ctrl-C does not end a wait on a lock.

Well below what a person notices, and long enough to cost nothing.
"""
