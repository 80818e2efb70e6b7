"""The way into a run, with something between us and its peers: bad weather, lies, or whatever a test thinks of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from typing_extensions import override

from ..comm.swarm import Swarm
from ..strategy.network.link import RunLink, RunSource

__all__ = ["DisturbedRun"]


class DisturbedRun(RunSource):
    """Another way into a run, with its swarm wrapped.

    Args:
        inner: the way that is gone.
        disturb: makes of the swarm what is used in its place.
    """

    def __init__(self, inner: RunSource, disturb: Callable[[Swarm], Swarm]) -> None:
        self.key = inner.key
        self.run_id = inner.run_id
        self.is_host = inner.is_host
        self._inner = inner
        self._disturb = disturb

    @override
    async def open(self) -> RunLink:
        self._inner.on_note = self.on_note
        link = await self._inner.open()
        return replace(link, swarm=self._disturb(link.swarm))
