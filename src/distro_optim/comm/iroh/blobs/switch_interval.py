"""Lets the network thread have its turn soon while a blob is on its way and the main thread computes in Python.

A thread that waits for the interpreter lock asks for it after the switch interval, 5 ms by default. A transfer takes
the lock some thousand times a second, so beside a thread that is busy in pure Python it spends its time waiting.
``benchmarks/transport.py`` shows the rate beside such a thread; where the main thread is in torch or numpy, which let
go of the lock, the interval changes nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["prompt_switching"]

SWITCH_SECONDS: Final = 0.0005

_lock = threading.Lock()
_users = 0
_before = 0.0


@contextmanager
def prompt_switching() -> Iterator[None]:
    """Shortens the interpreter's switch interval to 0.5 ms as long as anybody is within, then restores it.

    An interval that is shorter already, or that somebody else sets meanwhile, is left alone.
    """
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            _before = sys.getswitchinterval()
            sys.setswitchinterval(min(_before, SWITCH_SECONDS))
            ours = sys.getswitchinterval()
        else:
            ours = min(_before, SWITCH_SECONDS)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and abs(sys.getswitchinterval() - ours) < 2e-6:
                sys.setswitchinterval(_before)
