"""What whoever hosts a run can do to it while it goes on: pause it, let it go on, and say who may be in it.

The same acts with the same meaning stand behind a session of the host's, a page that shows its run, and the page of
``distro-optim serve``. To **kick** a client is to take it out; it may come again. To **ban** it is to take it out for
good, until the ban is taken back; where the host keeps its key, its bans are kept as well (``comm/iroh/home.py``).
"""

from __future__ import annotations

import concurrent.futures
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

from typing_extensions import override

from ...comm.signing import PUBLIC_KEY_SIZE
from ...errors import ConfigurationError, DistroError
from ..types import NodeIdentity
from .service import CoordinatorService

__all__ = ["MIN_DIGITS", "Act", "HostActs", "ServiceActs", "named_acts"]

Act = Callable[[str], str]
"""Does something to the run: takes a public key in hexadecimal, or nothing, and answers with a sentence. Raises one of
our errors if it cannot be done."""

Submit = Callable[[Coroutine[Any, Any, str]], concurrent.futures.Future[str]]
"""Runs a coroutine on the coordinator's loop."""

MIN_DIGITS: Final = 8
"""Of a key, where only its beginning is given: as many as tables of peers show."""

ANSWER_SECONDS: Final = 5.0
"""For the coordinator's loop to do what was asked. Chosen arbitrarily."""


class HostActs(ABC):
    """See the module. For any thread but the coordinator's own; each act answers with a sentence.

    A client is named by its public key: 32 bytes, 64 hexadecimal digits or, if it is here, the first eight or more of
    them. Every method raises :class:`~distro_optim.errors.ConfigurationError` if that is no client's key, and another
    :class:`~distro_optim.errors.DistroError` if what is asked cannot be done.
    """

    @abstractmethod
    def pause(self) -> str:
        """Stops the run, after the present epoch if one is under way."""

    @abstractmethod
    def resume(self) -> str:
        """Goes on after a pause."""

    @abstractmethod
    def kick(self, peer: bytes | str) -> str:
        """Takes a client out of the run and closes its connection. It may come again."""

    @abstractmethod
    def ban(self, peer: bytes | str) -> str:
        """The same, and it may not come again, whatever :meth:`allow` says. Another key costs it nothing."""

    @abstractmethod
    def unban(self, peer: bytes | str) -> str:
        """Takes a ban back."""

    @abstractmethod
    def allow(self, peers: Collection[bytes | str] | None) -> str:
        """From now on only these and the host may be in the run; others are taken out. None lets everybody in that is
        not banned."""


def named_acts(acts: HostActs) -> dict[str, Act]:
    """Those that a page has buttons for, by name."""
    return {
        "pause": lambda _: acts.pause(),
        "resume": lambda _: acts.resume(),
        "kick": acts.kick,
        "ban": acts.ban,
    }


class ServiceActs(HostActs):
    """The acts on a run whose coordinator is in this process.

    Args:
        service: the coordinator.
        clock: monotonic seconds.
        submit: runs a coroutine on the coordinator's loop.
        own: public key of the host, if it takes part; it stays, and is always allowed.
        keep: told who is banned whenever that changes; returns whether it was written down. None: nobody keeps it.
    """

    def __init__(
        self,
        service: CoordinatorService,
        clock: Callable[[], float],
        submit: Submit,
        *,
        own: bytes | None = None,
        keep: Callable[[Collection[bytes]], bool] | None = None,
    ) -> None:
        self._service = service
        self._clock = clock
        self._submit = submit
        self._own = own
        self._keep = keep

    @override
    def pause(self) -> str:
        def act(now: float) -> str:
            service = self._service
            service.note(service.host.pause(service.unix_time(now)), now)
            return "pausing after this round" if service.host.state.pending_pause else "paused"

        return self._on_loop(act)

    @override
    def resume(self) -> str:
        def act(now: float) -> str:
            service = self._service
            service.note(service.host.resume(service.unix_time(now)), now)
            return "going on"

        return self._on_loop(act)

    @override
    def kick(self, peer: bytes | str) -> str:
        def act(now: float) -> str:
            key = self._key(peer, among_ours=True)
            self._service.kick(key, now)
            return f"{_short(key)} was taken out, and may come again"

        return self._on_loop(act)

    @override
    def ban(self, peer: bytes | str) -> str:
        def act(now: float) -> str:
            key = self._key(peer)
            self._service.ban(key, now)
            return f"{_short(key)} was taken out for good{self._kept()}"

        return self._on_loop(act)

    @override
    def unban(self, peer: bytes | str) -> str:
        def act(_: float) -> str:
            key = self._key(peer, among=self._service.host.banned)
            self._service.host.unban(key)
            return f"{_short(key)} may come again{self._kept()}"

        return self._on_loop(act)

    @override
    def allow(self, peers: Collection[bytes | str] | None) -> str:
        def act(now: float) -> str:
            own = [] if self._own is None else [self._own]
            keys = None if peers is None else frozenset([*own, *(self._key(peer, or_own=True) for peer in peers)])
            self._service.let_in(keys, now)
            return "everybody may join that is not banned" if keys is None else f"{len(keys)} keys may join now"

        return self._on_loop(act)

    def _kept(self) -> str:
        """Has the bans kept; what there is to add to a sentence if that is not so."""
        if self._keep is None:
            return ", for as long as this host runs: with a folder for its checkpoints it would keep that"
        if not self._keep(self._service.host.banned):
            return "; this could not be written down, and is forgotten when the host ends"
        return ""

    def _key(
        self,
        peer: bytes | str,
        *,
        among: Collection[bytes] | None = None,
        among_ours: bool = False,
        or_own: bool = False,
    ) -> bytes:
        """A public key, from what was given.

        Args:
            peer: that.
            among: keys of which the beginning is enough; None takes those of the clients that are here.
            among_ours: no other key will do.
            or_own: the host's own will do, too.

        Raises:
            ConfigurationError: it is no key, or the beginning of none, or of several; or the host's.
        """
        here = {client.signer for client in [*self._service.clients, *self._service.host.pending]}
        known = here if among is None else set(among)
        if isinstance(peer, bytes):
            found = {peer} if len(peer) == PUBLIC_KEY_SIZE else set()
        else:
            digits = peer.strip().lower()
            found = {key for key in known if key.hex().startswith(digits)} if len(digits) >= MIN_DIGITS else set()
            if not found and len(digits) == 2 * PUBLIC_KEY_SIZE:
                try:
                    found = {bytes.fromhex(digits)}
                except ValueError:
                    pass
        if len(found) != 1 or (among_ours and not found <= here):
            raise ConfigurationError(
                f"{peer!r} is not the key of a peer{' that is here' if among_ours else ''}: pass its "
                f"{PUBLIC_KEY_SIZE} bytes, its {2 * PUBLIC_KEY_SIZE} hexadecimal digits or, while it is here, the "
                f"first {MIN_DIGITS} or more of them",
                name="peer",
                value=peer,
            )
        key = found.pop()
        if not or_own and (key == self._own or NodeIdentity.from_single_key(key) in self._service.local):
            raise ConfigurationError(
                "this is the key of the host itself, which stays for as long as its run", name="peer", value=peer
            )
        return key

    def _on_loop(self, act: Callable[[float], str]) -> str:
        async def do() -> str:
            return act(self._clock())

        try:
            return self._submit(do()).result(ANSWER_SECONDS)
        except (TimeoutError, concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            raise DistroError("the coordinator does not answer; try again") from None


def _short(key: bytes) -> str:
    return key.hex()[:MIN_DIGITS]
