"""What we say to the peers, in the order in which it was decided: results, announcements, reports on weights.

At the start of a round a peer says two things within moments: here is my result of the last round, and these are my
weights. Among few peers of our own kind both are small and go to each of the others directly, so that the second one
costs as much again as the first: a write, a packet and its acknowledgement to each, and each of them wakes for it. So
the first one waits a moment for the second, and they travel together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from ...comm.carrying import MAX_CARRIED
from ...comm.swarm import Channel, Swarm
from ...errors import DistroError
from ..rounds import actions as act

__all__ = ["GATHER_SECONDS", "Speech", "ToPeers"]

Speech = act.StoreBlob | act.Announce | act.AnnounceWeights

GATHER_SECONDS: Final = 0.05
"""For which a result that goes along with its announcement waits for the report on our weights. It is needed at the end
of the round; a small model is applied and hashed in less. Chosen arbitrarily."""


class ToPeers:
    """See the module. It belongs to one event loop.

    Args:
        swarm: of the run.
        on_result: called with the tag and the bytes of each result of ours.
        on_lost: called with words if something could not be said. It is repeated later.
    """

    def __init__(
        self, swarm: Swarm, *, on_result: Callable[[str, bytes], None], on_lost: Callable[[str], None]
    ) -> None:
        self._swarm = swarm
        self._on_result = on_result
        self._on_lost = on_lost
        self._queue: asyncio.Queue[Speech] = asyncio.Queue()
        self._no_report_due = asyncio.Event()
        self._no_report_due.set()

    def put(self, speech: Speech) -> None:
        """To be said after what was put before."""
        if isinstance(speech, act.AnnounceWeights):
            self._no_report_due.set()
        self._queue.put_nowait(speech)

    def expect_report(self) -> None:
        """Our weights are being hashed: the report on them will be put soon."""
        self._no_report_due.clear()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            speech = await self._queue.get()
            if isinstance(speech, act.Announce) and speech.carrying is not None and len(speech.carrying) <= MAX_CARRIED:
                await self._gather()
            try:
                await self._say(speech)
            except DistroError as error:
                # If the swarm is closed, the task that listens to it ends the run.
                self._on_lost(f"a message to the peers was lost: {error}")

    async def _gather(self) -> None:
        """Waits for the report that is due, if one is, so that it follows at once."""
        if self._no_report_due.is_set():
            return
        try:
            async with asyncio.timeout(GATHER_SECONDS):
                await self._no_report_due.wait()
        except TimeoutError:
            self._no_report_due.set()  # it is not waited for twice

    async def _say(self, speech: Speech) -> None:
        match speech:
            case act.StoreBlob(data=data, tag=tag):
                self._on_result(tag, data)
                await self._swarm.publish(data, tag)
            case act.Announce(data=data, carrying=carrying):
                await self._swarm.announce(data, carrying=carrying)
            case act.AnnounceWeights(data):
                await self._swarm.announce(data, channel=Channel.OWN_KIND)
