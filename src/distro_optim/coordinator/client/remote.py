"""A participant's link to a coordinator elsewhere, by Psyche's TCP protocol over any stream of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

from typing_extensions import override

from ...comm.backoff import BackoffPolicy
from ...comm.framing import SecretKey
from ...errors import ConfigurationError, CoordinatorLinkError, JoinRefusedError, ProtocolError
from ..messages import ClientToServerMessage, Join, WitnessMessage
from ..types import Coordinator, NodeIdentity
from ..unconfirmed_report import UnconfirmedReport
from .connection import Connection, Connector, StreamEnded, encode
from .interface import CoordinatorClient
from .joining import Joining, waits_again
from .opening import Opening
from .state_feed import StateFeed

__all__ = ["BESIDE_SECONDS", "RemoteCoordinator"]

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

SHORT_LINKS: Final = 3
"""Links in a row that the coordinator closed soon. Twice can be a restart of the coordinator, or of ours after a crash
that it had not noticed. Chosen arbitrarily."""

SHORT_LINK_SECONDS: Final = 10.0
"""A link that ends within so many seconds was short; two clients with one key drive each other out in less. Chosen
arbitrarily."""

MAX_UNSENT: Final = 64
"""Messages kept while there is no link. A round needs three."""

BESIDE_SECONDS: Final = 1.5
"""Without a byte, after which a new link is opened beside the silent one. A coordinator sends twice a second; one whose
program is busy for longer loses nothing but the old link."""

RECONNECTING: Final = BackoffPolicy(first=0.5, longest=8.0)
"""Begins later than a peer's, since every client of a run comes back to the one coordinator; and ends sooner, so that
all of them are back half a minute after it was started again, a dial that is not answered included."""


class RemoteCoordinator(CoordinatorClient):
    """The link to a coordinator on another machine, ours or Psyche's.

    If the link breaks, it is opened again, with growing pauses, and joins the run again; Psyche's own client gives up
    instead. A report on a round that was under way when the link broke is sent again if it got lost. Other messages may
    be lost.

    Args:
        connect: opens a stream; see :func:`~.connection.tcp_connector`, and :func:`~..ticket.connector` for iroh.
        key: our secret key. Its public key is both signer and peer-to-peer identity.
        run_id: the run to join.
        name: what errors call the coordinator, such as its address.
        timeout: seconds for connecting, handshake and first state together.
        silence: seconds without a byte after which the link counts as broken. A coordinator sends twice a second.
        beside: seconds without a byte after which a new link is opened beside it, which replaces it as soon as it
            stands; None waits until the link is broken.
        give_up_after: seconds without a link after which :meth:`states` fails.
        backoff: pauses between attempts.
        generator: draws the random part of the pauses.
        on_bytes: called whenever something comes; returns at once.
        feed: where states go; a new one if None.

    Attributes:
        on_told: called with what the coordinator says of why it had taken us out, if we may come again, in words.

    Raises:
        ConfigurationError: a number of seconds is not above 0.
    """

    def __init__(
        self,
        connect: Connector,
        key: SecretKey,
        run_id: str,
        *,
        name: str = "the coordinator",
        timeout: float = 10.0,
        silence: float = 60.0,
        beside: float | None = None,
        give_up_after: float = 600.0,
        backoff: BackoffPolicy = RECONNECTING,
        generator: random.Random | None = None,
        on_bytes: Callable[[], None] = lambda: None,
        feed: StateFeed | None = None,
    ) -> None:
        given = (("timeout", timeout), ("silence", silence), ("beside", beside), ("give_up_after", give_up_after))
        for setting, seconds in given:
            if seconds is not None and not seconds > 0:
                raise ConfigurationError(
                    f"{setting} must be above 0 seconds, got {seconds}", name=setting, value=seconds
                )
        self.run_id = run_id
        self.identity = NodeIdentity.from_single_key(key.public)
        self._timeout = timeout
        self._silence = silence
        self.beside = beside
        self._heard_at = 0.0
        self._give_up_after = give_up_after
        self._backoff = backoff
        self._generator = generator or random.Random()
        self._on_bytes = on_bytes
        self._feed = feed or StateFeed()
        self._opening = Opening(connect, key, run_id, name=name, timeout=timeout, feed=self._feed)
        self._redirected = asyncio.Event()
        self._connection: Connection | None = None
        self._unsent: deque[bytes] = deque(maxlen=MAX_UNSENT)
        self._report = UnconfirmedReport()
        self._task: asyncio.Task[None] | None = None
        # While we have asked to be in the run and wait to see that taken: who waits.
        self._joining: Joining | None = None
        self._closed = False
        self._short_links = 0
        self.on_told: Callable[[str], None] = lambda text: _log.warning("%s", text)

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._feed.latest

    @property
    @override
    def connected(self) -> bool:
        return self._connection is not None

    @property
    @override
    def gives_up_after(self) -> float:
        return self._give_up_after

    @override
    async def look(self) -> Coordinator:
        if self._task is not None or self._closed:
            raise ConfigurationError("look() is called once, before join() and close()")
        return await self._open_first()

    @override
    async def join(self) -> Coordinator:
        if self._opening.joins or self._closed:
            raise ConfigurationError("join() is called once, before close()")
        self._opening.joins = True
        if self._task is None:
            return await self._open_first()
        return await self._join_over_open_link()

    def follow(self) -> None:
        """Joins in the background, as after a link that broke; in place of :meth:`join`, for one that was in before."""
        if self._task is not None or self._closed:
            raise ConfigurationError("follow() is called once, before join() and close()")
        self._opening.joins = True
        self._task = asyncio.create_task(self._keep_up(None), name=f"link to {self._opening.name}")

    def redirect(self, name: str | None = None) -> None:
        """Opens a new link at once, since ``connect`` leads elsewhere now; ``name`` is what errors call it then."""
        self._opening.name = name or self._opening.name
        self._redirected.set()

    async def _open_first(self) -> Coordinator:
        try:
            connection, state = await self._opening.open()
        except JoinRefusedError as error:
            raise await self._opening.explained(error) from error
        self._connection = connection
        self._task = asyncio.create_task(self._keep_up(connection), name=f"link to {self._opening.name}")
        return state

    async def _join_over_open_link(self) -> Coordinator:
        """Joins where a link is open already; where one is just being opened again, that joins, too."""
        self._feed.skip()
        if self._feed.error is not None:
            raise self._feed.error
        joining = self._joining = Joining()
        try:
            async with asyncio.timeout(self._timeout):
                connection = self._connection
                if connection is not None:
                    try:
                        await self._ask(connection)
                    except OSError as error:
                        raise await self._opening.explained(self._opening.refused()) from error
                return await joining.seen
        except TimeoutError as error:
            raise CoordinatorLinkError(
                f"{self._opening.name}: no answer within {self._timeout:g} s: it sent no state after we asked to join"
            ) from error
        finally:
            self._joining = None

    @override
    def states(self) -> AsyncIterator[Coordinator]:
        return self._feed.read()

    @override
    async def send(self, message: ClientToServerMessage) -> None:
        if not self._opening.joins or self._task is None or self._closed:
            raise CoordinatorLinkError(
                f"no message can go to {self._opening.name}: " + ("closed" if self._closed else "not joined")
            )
        is_report = isinstance(message, WitnessMessage)
        if isinstance(message, WitnessMessage) and self._feed.latest is not None:
            self._report.sent(message, self._feed.latest)
        frame = encode(message)
        connection = self._connection
        try:
            if connection is not None:
                await connection.write(frame)
                return
        except OSError:
            pass  # the reader finds the same and opens a new link
        if not is_report:  # of a report the new link's first state tells whether it is still wanted
            self._unsent.append(frame)

    @override
    async def close(self) -> None:
        self._closed = True
        self._feed.end()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        # A task that is cancelled before its first step, or while a new link is on its way to it, leaves that to us.
        self._connection = None
        await self._opening.close()

    # -- the background task -------------------------------------------------------------------------------------------

    async def _keep_up(self, connection: Connection | None) -> None:
        try:
            await self._follow(connection)
        except Exception as error:  # a reader of the states must not wait forever
            self._give_up(error)

    async def _follow(self, connection: Connection | None) -> None:
        """Reads states for as long as there is a link, and opens new ones."""
        lost: WitnessMessage | None = None
        loop = asyncio.get_running_loop()
        if connection is None:
            reopened = await self._reopen()
            if reopened is None:
                return
            connection, _ = reopened
        while True:
            self._connection = connection
            opened_at = self._heard_at = loop.time()
            newer: tuple[Connection, Coordinator] | None = None
            is_ended = False
            try:
                if self._opening.joins and not connection.asked:  # join() came while this link was being opened
                    await self._ask(connection)
                if lost is not None:
                    await connection.write(encode(lost))
                await self._flush(connection)
                newer = await self._unless_redirected(self._read_until_left(connection))
            except (OSError, ProtocolError, TimeoutError) as error:
                _log.info("link to %s lost, reconnecting: %s", self._opening.name, error)
                is_ended = isinstance(error, StreamEnded)
                if is_ended and loop.time() - opened_at < SHORT_LINK_SECONDS:
                    self._closed_soon()
                else:
                    self._short_links = 0
                if self._joining is not None and self._joining.sent:
                    self._give_up(await self._opening.explained(self._opening.refused()))
                    return
            finally:
                self._connection = None
                await connection.close()
            reopened = newer or await self._reopen()
            if reopened is None:
                return
            connection, state = reopened
            try:
                asks = is_ended and newer is None
                why = await self._unless_redirected(self._opening.why_closed()) if asks else None
            except BaseException:
                await connection.close()  # nobody else knows of it yet
                raise
            if why is not None:
                self.on_told(
                    f"{self._opening.name} had taken this peer out of the run: {why.reason}; it has joined again"
                )
            if self._joining is not None and connection.asked:
                self._joining.succeed(state)
            lost = self._report.missing_in(state)

    def _closed_soon(self) -> None:
        """The coordinator closed a link that had hardly been opened."""
        self._short_links += 1
        if self._short_links == SHORT_LINKS:
            _log.warning(
                "%s has closed %d links in a row soon after they were opened, as it does when another process is in "
                "the run with the same secret key: give each process a key of its own, or end the other; or its "
                "operator has turned this key away",
                self._opening.name,
                SHORT_LINKS,
            )

    async def _ask(self, connection: Connection) -> None:
        """Joins over a link that is open."""
        connection.asked = True
        if self._joining is not None:
            self._joining.sent = True
        await connection.write(encode(Join(self.run_id)))

    async def _flush(self, connection: Connection) -> None:
        while self._unsent:
            frame = self._unsent.popleft()
            try:
                await connection.write(frame)
            except OSError:
                self._unsent.appendleft(frame)
                raise

    async def _read_until_left(self, connection: Connection) -> tuple[Connection, Coordinator] | None:
        """Feeds states until there is a newer link, which it returns; raises if the link breaks before."""
        reading = asyncio.ensure_future(self._read(connection))
        try:
            newer = await self._open_beside(reading)
            if newer is None:
                await reading
            return newer
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _open_beside(self, reading: asyncio.Future[None]) -> tuple[Connection, Coordinator] | None:
        """A newer link, opened because nothing comes over the present one; None when that has ended.

        An attempt is not given up when the old link ends: the coordinator ends it when it has taken the new one.
        """
        loop = asyncio.get_running_loop()
        failures = 0
        while not reading.done():
            beside = BESIDE_SECONDS if self.beside is None else self.beside
            pause = self._backoff.delay(failures, self._generator.random()) if failures else 0.0
            due = max(loop.time() + pause, self._heard_at + beside) if self.beside else loop.time() + beside
            await asyncio.wait([reading], timeout=due - loop.time())
            if reading.done():
                break
            if loop.time() - due > beside:
                self._heard_at = loop.time()  # it is we who slept, and what came meanwhile has not been read yet
            if self.beside is None or loop.time() - self._heard_at < beside:
                failures = 0
                continue
            _log.info("nothing comes from %s: a new link is opened beside the old one", self._opening.name)
            try:
                return await self._opening.open()
            except (CoordinatorLinkError, ProtocolError) as error:
                failures += 1
                _log.info("no new link to %s yet: %s", self._opening.name, error)
        return None

    async def _read(self, connection: Connection) -> None:
        """Feeds states until the link breaks, which it says by raising."""
        while True:
            async with asyncio.timeout(self._silence):
                states = await connection.receive()
            self._heard_at = asyncio.get_running_loop().time()
            self._on_bytes()
            for state in states:
                self._opening.expect_run(state)
                before = self._feed.latest
                self._feed.put(state)
                if self._joining is not None:
                    self._joining.saw(state)
                if self._opening.joins and waits_again(before, state):
                    await connection.write(encode(Join(self.run_id)))

    def _give_up(self, error: Exception) -> None:
        """There will be no link any more."""
        self._feed.end(error)
        if self._joining is not None:
            self._joining.fail(error)

    async def _reopen(self) -> tuple[Connection, Coordinator] | None:
        """A new link and its newest state; None after giving up, when the reader of the states has been told why."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._give_up_after
        failures = 0
        while True:
            failures = 0 if self._redirected.is_set() else failures + 1
            await self._pause(failures)
            try:
                opened = await self._unless_redirected(self._opening.open())
                if opened is not None:
                    return opened
            except (CoordinatorLinkError, ProtocolError) as error:
                other_run = isinstance(error, JoinRefusedError) and error.hosted is not None
                if isinstance(error, JoinRefusedError) and not other_run:
                    why = await self._unless_redirected(self._opening.why_closed())
                    if why is not None and not why.may_return:
                        self._give_up(await self._opening.explained(error, why))
                        return None
                if other_run or loop.time() >= give_up_at:
                    self._give_up(error)
                    return None
                if isinstance(error.__cause__, StreamEnded):
                    self._closed_soon()
                _log.info("no link to %s yet: %s", self._opening.name, error)

    async def _unless_redirected(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """What comes of ``work``; None if we are redirected first, which ends it."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._redirected.wait())
        try:
            await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _pause(self, failures: int) -> None:
        """After so many attempts in a row that failed; not after :meth:`redirect`."""
        if failures:
            delay = self._backoff.delay(failures, self._generator.random())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._redirected.wait(), delay)
        self._redirected.clear()
