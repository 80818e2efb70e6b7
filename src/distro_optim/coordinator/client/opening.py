"""How a link to a coordinator is opened: stream, handshake, first states; and what is said where that fails."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ...comm.framing import LinkState, SecretKey
from ...errors import CoordinatorLinkError, ExchangeError, JoinRefusedError, ProtocolError
from ..messages import Join
from ..types import Coordinator, NodeIdentity
from ..why_closed import WhyClosed, ask_why
from .connection import Connection, Connector, StreamEnded, encode
from .state_feed import StateFeed

__all__ = ["STATES_TO_JOIN", "Opening"]

_log = logging.getLogger(__name__)

STATES_TO_JOIN: Final = 2
"""States to wait for after asking to join. A server sends the first as soon as our key is proved, and closes the
connection if it refuses us. The second, sent with its next tick, shows that it has read our join and accepts it."""

WHY_SECONDS: Final = 5.0
"""To hear why the coordinator has closed our link, once it takes connections again. Chosen arbitrarily."""


class Opening:
    """Opens links to one coordinator, one after the other.

    Args:
        connect, key, run_id, name, timeout, feed: see :class:`~.remote.RemoteCoordinator`.

    Attributes:
        name: what errors call the coordinator.
        joins: whether the links that are opened ask to be in the run.
    """

    def __init__(
        self, connect: Connector, key: SecretKey, run_id: str, *, name: str, timeout: float, feed: StateFeed
    ) -> None:
        self.name = name
        self.joins = False
        self._connect = connect
        self._key = key
        self._run_id = run_id
        self._timeout = timeout
        self._feed = feed
        # Whether the coordinator is one of ours, which can be asked why it has closed a link.
        self._is_ours = False
        # Those that are not closed. One may be lost on its way to who asked for it, who was cancelled meanwhile.
        self._opened: list[Connection] = []

    async def open(self) -> tuple[Connection, Coordinator]:
        """A new link, joined to the run if we want to be in it, and the newest state that came over it.

        Raises:
            JoinRefusedError: another run is hosted there, or we are turned away.
            CoordinatorLinkError: nothing can be reached, or does not answer in time.
            ProtocolError: what answers is no coordinator, or of another version.
        """
        progress = "it did not take the connection"
        is_coordinator = False
        try:
            async with asyncio.timeout(self._timeout):
                connection = Connection(await self._connect(), self._key)
                self._opened = [*(one for one in self._opened if not one.is_closed), connection]
                try:
                    progress = "it sent no challenge; is it a Psyche coordinator?"
                    await self._shake_hands(connection)
                    progress = "it sent no state, though the handshake is done"
                    is_coordinator = True
                    state = await (self._join_run(connection) if self.joins else self._receive_states(connection, 1))
                except BaseException:
                    await connection.close()
                    raise
                return connection, state
        except TimeoutError as error:
            raise CoordinatorLinkError(f"{self.name}: no answer within {self._timeout:g} s: {progress}") from error
        except (OSError, ExchangeError) as error:
            raise CoordinatorLinkError(f"{self.name} cannot be reached: {error}") from error
        except ProtocolError as error:
            if is_coordinator:
                raise ProtocolError(
                    f"{self.name} sends a state that cannot be read ({error}): it is probably of a newer version of "
                    "Psyche's protocol; look for a newer distro_optim"
                ) from error
            raise ProtocolError(f"{self.name} does not speak the protocol of a coordinator: {error}") from error

    async def close(self) -> None:
        """Closes the links that nobody has closed."""
        opened, self._opened = self._opened, []
        for connection in opened:
            if not connection.is_closed:
                await connection.close()

    async def why_closed(self) -> WhyClosed | None:
        """What the coordinator says of why it has closed our link; None if it says nothing."""
        if not self._is_ours:
            return None
        try:
            async with asyncio.timeout(WHY_SECONDS):
                stream = await self._connect()
                try:
                    return await ask_why(stream, self._key)
                finally:
                    await stream.close()
        except (OSError, ExchangeError, ProtocolError) as error:
            _log.info("%s does not say why it has closed the link: %s", self.name, error)
            return None

    async def explained(self, error: JoinRefusedError, why: WhyClosed | None = None) -> JoinRefusedError:
        """The same error with what the coordinator says, if it says anything."""
        if error.hosted is not None or (why := why or await self.why_closed()) is None:
            return error
        return JoinRefusedError(
            f"{self.name} has turned this peer away, whose key is {self._signer}: {why.reason}", wanted=self._run_id
        )

    def refused(self) -> JoinRefusedError:
        """What is known of a link that was closed, when nothing more is said."""
        when = f"when we asked to join {self._run_id!r}" if self.joins else f"before it told of {self._run_id!r}"
        return JoinRefusedError(
            f"{self.name} closed the connection {when}: it hosts another run, is full, or the key "
            f"{self._signer} is not on its list, or is in use by another process",
            wanted=self._run_id,
        )

    def expect_run(self, state: Coordinator) -> None:
        """Raises JoinRefusedError if that is the state of another run."""
        if state.run_id != self._run_id:
            raise JoinRefusedError(
                f"{self.name} hosts the run {state.run_id!r}, not {self._run_id!r}",
                wanted=self._run_id,
                hosted=state.run_id,
            )

    @property
    def _signer(self) -> str:
        return NodeIdentity.from_single_key(self._key.public).signer.hex()

    async def _shake_hands(self, connection: Connection) -> None:
        try:
            while connection.link.state is not LinkState.OPEN:
                for state in await connection.receive():
                    self.expect_run(state)
            self._is_ours = connection.link.gets_changes
        except StreamEnded as error:
            raise CoordinatorLinkError(
                f"{self.name} closed the connection before any challenge; it is overloaded, or not a coordinator"
            ) from error

    async def _join_run(self, connection: Connection) -> Coordinator:
        """Joins, waits for the states that show it (see :data:`STATES_TO_JOIN`), and returns the last of them."""
        connection.asked = True
        try:
            await connection.write(encode(Join(self._run_id)))
        except OSError as error:
            raise self.refused() from error
        return await self._receive_states(connection, STATES_TO_JOIN)

    async def _receive_states(self, connection: Connection, count: int) -> Coordinator:
        """Waits for so many states and returns the last of them; one comes as soon as a key is proved."""
        states: list[Coordinator] = []
        try:
            while len(states) < count:
                for state in await connection.receive():
                    self.expect_run(state)
                    self._feed.put(state)
                    states.append(state)
        except OSError as error:
            raise self.refused() from error
        return states[-1]
