"""A participant that looks at a run first, and then asks to be in it."""

from __future__ import annotations

import asyncio

from ..types import Coordinator, RunState
from .opening import STATES_TO_JOIN

__all__ = ["Joining", "waits_again"]


class Joining:
    """We have asked to join over an open link, and wait to see that the coordinator took it.

    Attributes:
        seen: the state that shows it, or why there is none.
        sent: we asked over the present link, which is closed if the answer is no.
    """

    def __init__(self) -> None:
        self.seen: asyncio.Future[Coordinator] = asyncio.get_running_loop().create_future()
        self.sent = False
        self._states = 0

    def saw(self, state: Coordinator) -> None:
        """A state came."""
        self._states += self.sent
        if self._states >= STATES_TO_JOIN:
            self.succeed(state)

    def succeed(self, state: Coordinator) -> None:
        """The coordinator has taken us."""
        if not self.seen.done():
            self.seen.set_result(state)

    def fail(self, error: Exception) -> None:
        """It has not."""
        if not self.seen.done():
            self.seen.set_exception(error)


def waits_again(before: Coordinator | None, state: Coordinator) -> bool:
    """Whether the run has begun to wait for members: time for a client that it has dropped to ask again.

    Psyche's client asks once. When it was dropped, it stays outside until it is restarted.
    """
    waiting = RunState.WAITING_FOR_MEMBERS
    return state.run_state is waiting and (before is None or before.run_state is not waiting)
