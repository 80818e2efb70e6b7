"""Ctrl-C and SIGTERM wait until the weights are those of a step again.

Python raises ``KeyboardInterrupt`` wherever the training thread is. In the midst of a change that would leave weights
which mean nothing and cannot be saved: what was trained since the last checkpoint would be lost.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

__all__ = ["interrupts_held"]

_Handler = Callable[[int, FrameType | None], object]

_NUMBERS: Final[tuple[int, ...]] = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """For the time of a ``with`` block the first signal waits; its handler is called at the end of the block.

    A second one is handled at once: somebody is in a hurry. What has no handler in Python keeps its effect, and so has
    everything in other threads than the first, where no signals arrive.
    """
    held: list[tuple[_Handler, int, FrameType | None]] = []
    before: dict[int, _Handler] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        handler = before[number]
        if held:
            handler(number, frame)
        else:
            held.append((handler, number, frame))

    try:
        with suppress(ValueError):  # in another thread
            for number in _NUMBERS:
                if callable(handler := signal.getsignal(number)):
                    before[number] = handler
                    signal.signal(number, hold)
        yield
    finally:
        with suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)
        for handler, number, frame in held:
            handler(number, frame)
