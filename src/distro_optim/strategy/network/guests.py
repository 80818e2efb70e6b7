"""What the host of a run can do about those who are in it, from a thread of its own: see :class:`~..port.RunGuests`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final

from typing_extensions import override

from ...comm.loop import LoopThread
from ...comm.signing import PUBLIC_KEY_SIZE
from ...coordinator.server.service import CoordinatorService
from ...errors import ConfigurationError
from ..port import RunGuests

__all__ = ["MIN_DIGITS", "HostsGuests"]

MIN_DIGITS: Final = 8
"""Of a key, where only its beginning is given: as many as tables of peers show."""

ANSWER_SECONDS: Final = 5.0
"""For the network's thread to do what was asked. Chosen arbitrarily."""


class HostsGuests(RunGuests):
    """The guests of a run that is hosted here.

    Args:
        service: the coordinator.
        own: our own public key, which is always allowed.
        loop: on which the coordinator lives.
    """

    def __init__(self, service: CoordinatorService, own: bytes, loop: LoopThread) -> None:
        self._service = service
        self._own = own
        self._loop = loop

    @override
    def kick(self, peer: bytes | str) -> None:
        self._on_loop(lambda now: self._service.kick(self._key(peer, among_ours=True), now))

    @override
    def ban(self, peer: bytes | str) -> None:
        self._on_loop(lambda now: self._service.ban(self._key(peer), now))

    @override
    def allow(self, peers: Collection[bytes | str] | None) -> None:
        def let_in(now: float) -> None:
            keys = None if peers is None else frozenset([self._own, *(self._key(peer) for peer in peers)])
            self._service.let_in(keys, now)

        self._on_loop(let_in)

    def _key(self, peer: bytes | str, *, among_ours: bool = False) -> bytes:
        """A public key, from what was given.

        Raises:
            ConfigurationError: it is no key, or the beginning of none, or of several; or ours.
        """
        here = {client.signer for client in [*self._service.clients, *self._service.host.pending]}
        if isinstance(peer, bytes):
            found = {peer} if len(peer) == PUBLIC_KEY_SIZE else set()
        else:
            digits = peer.strip().lower()
            found = {key for key in here if key.hex().startswith(digits)} if len(digits) >= MIN_DIGITS else set()
            if not found and len(digits) == 2 * PUBLIC_KEY_SIZE:
                try:
                    found = {bytes.fromhex(digits)}
                except ValueError:
                    pass
        if len(found) != 1 or (among_ours and not found <= here):
            raise ConfigurationError(
                f"{peer!r} is not the key of a peer: pass its {PUBLIC_KEY_SIZE} bytes, its {2 * PUBLIC_KEY_SIZE} "
                f"hexadecimal digits or, while it is here, the first {MIN_DIGITS} or more of them",
                name="peer",
                value=peer,
            )
        key = found.pop()
        if key == self._own:
            raise ConfigurationError("this is our own key: a host leaves its run by close()", name="peer", value=peer)
        return key

    def _on_loop(self, act: Callable[[float], None]) -> None:
        async def do() -> None:
            act(time.monotonic())

        self._loop.run(do(), ANSWER_SECONDS)
