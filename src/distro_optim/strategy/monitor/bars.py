"""Progress bars of ``tqdm`` in the terminal, which leave the cursor behind them: what is said beside one is cut."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["above_bars"]


@contextmanager
def above_bars() -> Iterator[None]:
    """For writing a line to the standard error: bars are taken away for it, and drawn again below it."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bars is None:
        yield
        return
    # Without tqdm's lock: a log handler of the script's may hold its own while it waits for that one.
    with bars.external_write_mode(file=sys.stderr, nolock=True):
        yield
