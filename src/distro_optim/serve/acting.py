"""What a server's page can do to its run: pause it, let it go on, and turn a client away for good."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import Final

from ..coordinator.server.service import CoordinatorService
from ..errors import DistroError
from ..strategy.monitor.page import Act

__all__ = ["acts_on"]

ANSWER_SECONDS: Final = 5.0
"""For the server's loop to do what was asked. Chosen arbitrarily."""


def acts_on(service: CoordinatorService, loop: asyncio.AbstractEventLoop) -> dict[str, Act]:
    """The acts, to be called from another thread.

    Args:
        service: the coordinator.
        loop: on which it lives.
    """

    def pause(_: str) -> str:
        now = time.monotonic()
        service.note(service.host.pause(service.unix_time(now)), now)
        return "pausing after this epoch" if service.host.state.pending_pause else "paused"

    def resume(_: str) -> str:
        now = time.monotonic()
        service.note(service.host.resume(service.unix_time(now)), now)
        return "going on"

    def kick(peer: str) -> str:
        known = {client.signer.hex(): client for client in [*service.clients, *service.host.pending]}
        if peer not in known:
            raise DistroError("this client is not here (any more)")
        service.ban(known[peer].signer, time.monotonic())
        return f"{peer[:8]} was turned away"

    def on_the_loop(act: Callable[[str], str]) -> Act:
        async def do(peer: str) -> str:
            return act(peer)

        def call(peer: str) -> str:
            try:
                return asyncio.run_coroutine_threadsafe(do(peer), loop).result(ANSWER_SECONDS)
            except (TimeoutError, concurrent.futures.TimeoutError):
                raise DistroError("the server does not answer; try again") from None

        return call

    return {"pause": on_the_loop(pause), "resume": on_the_loop(resume), "kick": on_the_loop(kick)}
