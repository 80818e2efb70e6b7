"""What whoever hosts a run can do to it from its page: pause it, let it go on, and turn a client away for good."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final

from ...errors import DistroError
from .service import CoordinatorService

__all__ = ["Act", "acts_on", "from_another_thread"]

Act = Callable[[str], str]
"""Does something to the run: takes a public key in hexadecimal, or nothing, and answers with a sentence. Raises one of
our errors if it cannot be done."""

Submit = Callable[[Coroutine[Any, Any, str]], concurrent.futures.Future[str]]
"""Runs a coroutine on the coordinator's loop."""

ANSWER_SECONDS: Final = 5.0
"""For the coordinator's loop to do what was asked. Chosen arbitrarily."""


def acts_on(service: CoordinatorService, clock: Callable[[], float]) -> dict[str, Act]:
    """The acts by name, ``"pause"``, ``"resume"`` and ``"kick"``, to be called on the coordinator's loop.

    Args:
        service: the coordinator.
        clock: monotonic seconds.
    """

    def pause(_: str) -> str:
        now = clock()
        service.note(service.host.pause(service.unix_time(now)), now)
        return "pausing after this round" if service.host.state.pending_pause else "paused"

    def resume(_: str) -> str:
        now = clock()
        service.note(service.host.resume(service.unix_time(now)), now)
        return "going on"

    def kick(peer: str) -> str:
        known = {client.signer.hex(): client for client in [*service.clients, *service.host.pending]}
        if peer not in known:
            raise DistroError("this client is not here (any more)")
        if known[peer] in service.local:
            raise DistroError("the host itself stays for as long as its run")
        service.ban(known[peer].signer, clock())
        return f"{peer[:8]} was turned away"

    return {"pause": pause, "resume": resume, "kick": kick}


def from_another_thread(acts: Mapping[str, Act], submit: Submit) -> dict[str, Act]:
    """The same acts, to be called anywhere but on the coordinator's loop."""

    async def do(act: Act, peer: str) -> str:
        return act(peer)

    def call(act: Act, peer: str) -> str:
        try:
            return submit(do(act, peer)).result(ANSWER_SECONDS)
        except (TimeoutError, concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            raise DistroError("the coordinator does not answer; try again") from None

    return {name: partial(call, act) for name, act in acts.items()}
