"""A client's side of a coordinator: one interface, whatever lies between.

:class:`CoordinatorClient` is that interface. :class:`RemoteCoordinator` speaks Psyche's TCP protocol over any stream of
bytes; :class:`~.server.in_process.InProcessClient` needs no network. Both pass the same suite,
:mod:`distro_optim.testing.coordinator`.

A coordinator does not answer. It sends its whole state again and again, and a client looks there to see whether its
message was taken. So the methods that send return as soon as the message is on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from typing_extensions import override

from ..comm.backoff import BackoffPolicy
from ..comm.framing import ClientLink, Else, LinkState, SecretKey, encode_frame
from ..comm.streams import Stream, open_tcp
from ..errors import ConfigurationError, CoordinatorLinkError, ExchangeError, JoinRefusedError, ProtocolError
from .messages import (
    CLIENT_TO_SERVER,
    SERVER_TO_CLIENT,
    ClientToServerMessage,
    CoordinatorMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from .remembering_codec import RememberingCodec
from .types import CommitteeProof, Coordinator, NodeIdentity, RunState, Witness, WitnessMetadata
from .unconfirmed_report import UnconfirmedReport
from .why_closed import WhyClosed, ask_why

__all__ = ["Connector", "CoordinatorClient", "RemoteCoordinator", "StateFeed", "tcp_connector"]

Connector = Callable[[], Awaitable[Stream]]
"""Opens a new stream to the same coordinator each time; raises OSError or ExchangeError if it cannot."""

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

MAX_UNREAD_STATES: Final = 64
"""States kept for a busy reader. A state holds all that matters of the last four rounds, so older ones may go."""

READ_BYTES: Final = 64 * 1024
"""Read from the stream at once; chosen so that most states come in one piece."""

STATES_TO_JOIN: Final = 2
"""States to wait for after asking to join. A server sends the first as soon as our key is proved, and closes the
connection if it refuses us. The second, sent with its next tick, shows that it has read our join and accepts it."""

SHORT_LINKS: Final = 3
"""Links in a row that the coordinator closed soon. Twice can be a restart of the coordinator, or of ours after a crash
that it had not noticed. Chosen arbitrarily."""

SHORT_LINK_SECONDS: Final = 10.0
"""A link that ends within so many seconds was short; two clients with one key drive each other out in less. Chosen
arbitrarily."""

MAX_UNSENT: Final = 64
"""Messages kept while there is no link. A round needs three."""

WHY_SECONDS: Final = 5.0
"""To hear why the coordinator has closed our link, once it takes connections again. Chosen arbitrarily."""

BESIDE_SECONDS: Final = 1.5
"""Without a byte, after which a new link is opened beside the silent one. A coordinator sends twice a second; one whose
program is busy for longer loses nothing but the old link."""

RECONNECTING: Final = BackoffPolicy(first=0.5, longest=8.0)
"""Begins later than a peer's, since every client of a run comes back to the one coordinator; and ends sooner, so that
all of them are back half a minute after it was started again, a dial that is not answered included."""


class CoordinatorClient(ABC):
    """One participant's link to the coordinator of a run.

    ``join`` comes first and once, ``close`` last; the rest may be called in between from one task or several. Before
    ``join`` may come ``look``, for those who want to see the run before they are in it.
    """

    run_id: str
    identity: NodeIdentity

    @property
    @abstractmethod
    def state(self) -> Coordinator | None:
        """The newest state; None before :meth:`look` and :meth:`join`."""

    @property
    def connected(self) -> bool:
        """Whether there is a link at the moment. Without one, messages wait for the next link."""
        return self.state is not None

    @property
    def gives_up_after(self) -> float | None:
        """Seconds without a link after which :meth:`states` fails; None if it never does."""
        return None

    @abstractmethod
    async def look(self) -> Coordinator:
        """Returns the state of the run without asking to be in it. :attr:`state` is kept up to date from then on.

        Raises:
            JoinRefusedError: the coordinator hosts another run, or refuses our key.
            CoordinatorLinkError, ProtocolError: as :meth:`join`.
        """

    @abstractmethod
    async def join(self) -> Coordinator:
        """Asks to be in every epoch from now on, and returns the state of the run at that time.

        Raises:
            JoinRefusedError: the coordinator hosts another run, or refuses us.
            CoordinatorLinkError: it could not be reached or did not answer in time.
            ProtocolError: what answers is not a coordinator.
        """

    @abstractmethod
    def states(self) -> AsyncIterator[Coordinator]:
        """Every new state, from that of :meth:`join` on; equal states in a row come once. Ends at :meth:`close`.

        A reader that falls far behind misses the oldest ones. There is only one such stream: two readers share it.

        Raises:
            JoinRefusedError, CoordinatorLinkError: the link is gone for good.
        """

    @abstractmethod
    async def send(self, message: ClientToServerMessage) -> None:
        """Sends a message, or keeps it until there is a link again.

        Raises:
            CoordinatorLinkError: not joined, or closed.
        """

    @abstractmethod
    async def close(self) -> None:
        """Leaves the run. May be called twice."""

    async def witness(self, report: Witness, metadata: WitnessMetadata) -> None:
        """Reports on a round, as an elected witness."""
        await self.send(WitnessMessage(WitnessStep(report, metadata)))

    async def warmup_witness(self, report: Witness) -> None:
        """Says that this client and its peers are ready for training."""
        await self.send(WitnessMessage(WarmupStep(report)))

    async def health_check(self, checks: Sequence[tuple[NodeIdentity, CommitteeProof]]) -> None:
        """Names clients that did no work."""
        await self.send(HealthCheckMessage(tuple(checks)))

    async def __aenter__(self) -> CoordinatorClient:
        await self.join()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class StateFeed:
    """What :meth:`CoordinatorClient.states` reads from: states go in, each reader takes the next."""

    def __init__(self) -> None:
        self.latest: Coordinator | None = None
        self._unread: deque[Coordinator] = deque(maxlen=MAX_UNREAD_STATES)
        self._news = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None

    def put(self, state: Coordinator) -> None:
        """Adds a state, unless it equals the one before."""
        if self._ended or state is self.latest or state == self.latest:
            return
        self.latest = state
        self._unread.append(state)
        self._news.set()

    @property
    def error(self) -> Exception | None:
        """With which it has ended; None if it goes on, or has ended well."""
        return self._error

    def skip(self) -> None:
        """Forgets the states that nobody has read, but for the newest."""
        while len(self._unread) > 1:
            self._unread.popleft()

    def end(self, error: Exception | None = None) -> None:
        """No state will follow; readers get ``error``, if there is one, once they have read what is there."""
        if not self._ended:
            self._ended, self._error = True, error
            self._news.set()

    async def read(self) -> AsyncIterator[Coordinator]:
        """Yields the states until :meth:`end`; raises the error that was given there."""
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            self._news.clear()
            await self._news.wait()


class RemoteCoordinator(CoordinatorClient):
    """The link to a coordinator on another machine, ours or Psyche's.

    If the link breaks, it is opened again, with growing pauses, and joins the run again; Psyche's own client gives up
    instead. A report on a round that was under way when the link broke is sent again if it got lost. Other messages may
    be lost.

    Args:
        connect: opens a stream; see :func:`tcp_connector`, and :func:`~.ticket.connector` for iroh.
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
        self._connect = connect
        self._key = key
        self._name = name
        self._timeout = timeout
        self._silence = silence
        self.beside = beside
        self._heard_at = 0.0
        self._give_up_after = give_up_after
        self._backoff = backoff
        self._generator = generator or random.Random()
        self._on_bytes = on_bytes
        self._feed = feed or StateFeed()
        self._redirected = asyncio.Event()
        self._connection: _Connection | None = None
        self._unsent: deque[bytes] = deque(maxlen=MAX_UNSENT)
        self._report = UnconfirmedReport()
        self._task: asyncio.Task[None] | None = None
        # Whether we have asked to be in the run, and, while we wait to see that taken, who waits.
        self._asked = False
        self._joining: _Joining | None = None
        self._closed = False
        self._short_links = 0
        # Whether the coordinator is one of ours, which can be asked why it has closed a link.
        self._is_ours = False
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
        if self._asked or self._closed:
            raise ConfigurationError("join() is called once, before close()")
        self._asked = True
        if self._task is None:
            return await self._open_first()
        return await self._join_over_open_link()

    def follow(self) -> None:
        """Joins in the background, as after a link that broke; in place of :meth:`join`, for one that was in before."""
        if self._task is not None or self._closed:
            raise ConfigurationError("follow() is called once, before join() and close()")
        self._asked = True
        self._task = asyncio.create_task(self._keep_up(None), name=f"link to {self._name}")

    def redirect(self, name: str | None = None) -> None:
        """Opens a new link at once, since ``connect`` leads elsewhere now; ``name`` is what errors call it then."""
        self._name = name or self._name
        self._redirected.set()

    async def _open_first(self) -> Coordinator:
        try:
            connection, state = await self._open_within_timeout()
        except JoinRefusedError as error:
            raise await self._explained(error) from error
        self._connection = connection
        self._task = asyncio.create_task(self._keep_up(connection), name=f"link to {self._name}")
        return state

    async def _join_over_open_link(self) -> Coordinator:
        """Joins where a link is open already; where one is just being opened again, that joins, too."""
        self._feed.skip()
        if self._feed.error is not None:
            raise self._feed.error
        joining = self._joining = _Joining()
        try:
            async with asyncio.timeout(self._timeout):
                connection = self._connection
                if connection is not None:
                    try:
                        await self._ask(connection)
                    except OSError as error:
                        raise await self._explained(self._refused()) from error
                return await joining.seen
        except TimeoutError as error:
            raise CoordinatorLinkError(
                f"{self._name}: no answer within {self._timeout:g} s: it sent no state after we asked to join"
            ) from error
        finally:
            self._joining = None

    @override
    def states(self) -> AsyncIterator[Coordinator]:
        return self._feed.read()

    @override
    async def send(self, message: ClientToServerMessage) -> None:
        if not self._asked or self._task is None or self._closed:
            raise CoordinatorLinkError(
                f"no message can go to {self._name}: " + ("closed" if self._closed else "not joined")
            )
        is_report = isinstance(message, WitnessMessage)
        if isinstance(message, WitnessMessage) and self._feed.latest is not None:
            self._report.sent(message, self._feed.latest)
        frame = _encode(message)
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
        # A task that is cancelled before its first step leaves the connection to us.
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    # -- the background task -------------------------------------------------------------------------------------------

    async def _keep_up(self, connection: _Connection | None) -> None:
        try:
            await self._follow(connection)
        except Exception as error:  # a reader of the states must not wait forever
            self._give_up(error)

    async def _follow(self, connection: _Connection | None) -> None:
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
            newer: tuple[_Connection, Coordinator] | None = None
            is_ended = False
            try:
                if self._asked and not connection.asked:  # join() came while this link was being opened
                    await self._ask(connection)
                if lost is not None:
                    await connection.write(_encode(lost))
                await self._flush(connection)
                newer = await self._unless_redirected(self._read_until_left(connection))
            except (OSError, ProtocolError, TimeoutError) as error:
                _log.info("link to %s lost, reconnecting: %s", self._name, error)
                is_ended = isinstance(error, _StreamEnded)
                if is_ended and loop.time() - opened_at < SHORT_LINK_SECONDS:
                    self._closed_soon()
                else:
                    self._short_links = 0
                if self._joining is not None and self._joining.sent:
                    self._give_up(await self._explained(self._refused()))
                    return
            finally:
                self._connection = None
                await connection.close()
            reopened = newer or await self._reopen()
            if reopened is None:
                return
            connection, state = reopened
            try:
                why = await self._why_closed() if is_ended and newer is None else None
            except BaseException:
                await connection.close()  # nobody else knows of it yet
                raise
            if why is not None:
                self.on_told(f"{self._name} had taken this peer out of the run: {why.reason}; it has joined again")
            if self._joining is not None and connection.asked:
                self._joining.succeed(state)
            lost = self._report.missing_in(state)

    async def _why_closed(self) -> WhyClosed | None:
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
            _log.info("%s does not say why it has closed the link: %s", self._name, error)
            return None

    async def _explained(self, error: JoinRefusedError, why: WhyClosed | None = None) -> JoinRefusedError:
        """The same error with what the coordinator says, if it says anything."""
        if error.hosted is not None or (why := why or await self._why_closed()) is None:
            return error
        return JoinRefusedError(
            f"{self._name} has turned this peer away, whose key is {self.identity.signer.hex()}: {why.reason}",
            wanted=self.run_id,
        )

    def _closed_soon(self) -> None:
        """The coordinator closed a link that had hardly been opened."""
        self._short_links += 1
        if self._short_links == SHORT_LINKS:
            _log.warning(
                "%s has closed %d links in a row soon after they were opened, as it does when another process is in "
                "the run with the same secret key: give each process a key of its own, or end the other; or its "
                "operator has turned this key away",
                self._name,
                SHORT_LINKS,
            )

    async def _ask(self, connection: _Connection) -> None:
        """Joins over a link that is open."""
        connection.asked = True
        if self._joining is not None:
            self._joining.sent = True
        await connection.write(_encode(Join(self.run_id)))

    async def _flush(self, connection: _Connection) -> None:
        while self._unsent:
            frame = self._unsent.popleft()
            try:
                await connection.write(frame)
            except OSError:
                self._unsent.appendleft(frame)
                raise

    async def _read_until_left(self, connection: _Connection) -> tuple[_Connection, Coordinator] | None:
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

    async def _open_beside(self, reading: asyncio.Future[None]) -> tuple[_Connection, Coordinator] | None:
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
            _log.info("nothing comes from %s: a new link is opened beside the old one", self._name)
            try:
                return await self._open_within_timeout()
            except (CoordinatorLinkError, ProtocolError) as error:
                failures += 1
                _log.info("no new link to %s yet: %s", self._name, error)
        return None

    async def _read(self, connection: _Connection) -> None:
        """Feeds states until the link breaks, which it says by raising."""
        while True:
            async with asyncio.timeout(self._silence):
                states = await connection.receive()
            self._heard_at = asyncio.get_running_loop().time()
            self._on_bytes()
            for state in states:
                self._expect_run(state)
                before = self._feed.latest
                self._feed.put(state)
                if self._joining is not None:
                    self._joining.saw(state)
                if self._asked and _waits_again(before, state):
                    await connection.write(_encode(Join(self.run_id)))

    def _give_up(self, error: Exception) -> None:
        """There will be no link any more."""
        self._feed.end(error)
        if self._joining is not None:
            self._joining.fail(error)

    async def _reopen(self) -> tuple[_Connection, Coordinator] | None:
        """A new link and its newest state; None after giving up, when the reader of the states has been told why."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._give_up_after
        failures = 0
        while True:
            failures = 0 if self._redirected.is_set() else failures + 1
            await self._pause(failures)
            try:
                opened = await self._unless_redirected(self._open_within_timeout())
                if opened is not None:
                    return opened
            except (CoordinatorLinkError, ProtocolError) as error:
                other_run = isinstance(error, JoinRefusedError) and error.hosted is not None
                if isinstance(error, JoinRefusedError) and not other_run:
                    why = await self._why_closed()
                    if why is not None and not why.may_return:
                        self._give_up(await self._explained(error, why))
                        return None
                if other_run or loop.time() >= give_up_at:
                    self._give_up(error)
                    return None
                if isinstance(error.__cause__, _StreamEnded):
                    self._closed_soon()
                _log.info("no link to %s yet: %s", self._name, error)

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

    # -- opening a link ------------------------------------------------------------------------------------------------

    async def _open_within_timeout(self) -> tuple[_Connection, Coordinator]:
        """A new link, joined to the run if we want to be in it, and the newest state that came over it."""
        progress = "it did not take the connection"
        is_coordinator = False
        try:
            async with asyncio.timeout(self._timeout):
                stream = await self._connect()
                connection = _Connection(
                    stream,
                    ClientLink(self._key, RememberingCodec.of(SERVER_TO_CLIENT), CLIENT_TO_SERVER, takes_changes=True),
                )
                try:
                    progress = "it sent no challenge; is it a Psyche coordinator?"
                    await self._shake_hands(connection)
                    progress = "it sent no state, though the handshake is done"
                    is_coordinator = True
                    state = await (self._join_run(connection) if self._asked else self._first_state(connection))
                except BaseException:
                    await connection.close()
                    raise
                return connection, state
        except TimeoutError as error:
            raise CoordinatorLinkError(f"{self._name}: no answer within {self._timeout:g} s: {progress}") from error
        except (OSError, ExchangeError) as error:
            raise CoordinatorLinkError(f"{self._name} cannot be reached: {error}") from error
        except ProtocolError as error:
            if is_coordinator:
                raise ProtocolError(
                    f"{self._name} sends a state that cannot be read ({error}): it is probably of a newer version of "
                    "Psyche's protocol; look for a newer distro_optim"
                ) from error
            raise ProtocolError(f"{self._name} does not speak the protocol of a coordinator: {error}") from error

    async def _shake_hands(self, connection: _Connection) -> None:
        try:
            while connection.link.state is not LinkState.OPEN:
                for state in await connection.receive():
                    self._expect_run(state)
            self._is_ours = connection.link.gets_changes
        except _StreamEnded as error:
            raise CoordinatorLinkError(
                f"{self._name} closed the connection before any challenge; it is overloaded, or not a coordinator"
            ) from error

    async def _join_run(self, connection: _Connection) -> Coordinator:
        """Joins, waits for the states that show it (see :data:`STATES_TO_JOIN`), and returns the last of them."""
        connection.asked = True
        try:
            await connection.write(_encode(Join(self.run_id)))
        except OSError as error:
            raise self._refused() from error
        return await self._receive_states(connection, STATES_TO_JOIN)

    async def _first_state(self, connection: _Connection) -> Coordinator:
        """The state that every client gets whose key is proved, whether it joins or not."""
        return await self._receive_states(connection, 1)

    async def _receive_states(self, connection: _Connection, count: int) -> Coordinator:
        """Waits for so many states and returns the last of them."""
        states: list[Coordinator] = []
        try:
            while len(states) < count:
                for state in await connection.receive():
                    self._expect_run(state)
                    self._feed.put(state)
                    states.append(state)
        except OSError as error:
            raise self._refused() from error
        return states[-1]

    def _refused(self) -> JoinRefusedError:
        when = f"when we asked to join {self.run_id!r}" if self._asked else f"before it told of {self.run_id!r}"
        return JoinRefusedError(
            f"{self._name} closed the connection {when}: it hosts another run, is full, or the key "
            f"{self.identity.signer.hex()} is not on its list, or is in use by another process",
            wanted=self.run_id,
        )

    def _expect_run(self, state: Coordinator) -> None:
        if state.run_id != self.run_id:
            raise JoinRefusedError(
                f"{self._name} hosts the run {state.run_id!r}, not {self.run_id!r}",
                wanted=self.run_id,
                hosted=state.run_id,
            )


def tcp_connector(host: str, port: int) -> Connector:
    """Opens plain TCP connections, as Psyche's coordinator takes them."""
    return lambda: open_tcp(host, port)


def _waits_again(before: Coordinator | None, state: Coordinator) -> bool:
    """Whether the run has begun to wait for members: time for a client that it has dropped to ask again.

    Psyche's client asks once. When it was dropped, it stays outside until it is restarted.
    """
    waiting = RunState.WAITING_FOR_MEMBERS
    return state.run_state is waiting and (before is None or before.run_state is not waiting)


def _encode(message: ClientToServerMessage) -> bytes:
    return encode_frame(CLIENT_TO_SERVER.encode(Else(message)))


class _Joining:
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


class _StreamEnded(ConnectionError):
    """The peer ended the stream properly."""


class _Connection:
    """One connection: a stream and the protocol on it.

    Attributes:
        asked: whether we have asked over it to be in the run.
    """

    def __init__(self, stream: Stream, link: ClientLink) -> None:
        self.link = link
        self.asked = False
        self._stream = stream
        self._writing = asyncio.Lock()

    async def receive(self) -> list[Coordinator]:
        """The states in the next bytes, perhaps none. Answers the challenge on the way.

        Raises:
            OSError: the link is gone.
            ProtocolError: the bytes make no sense.
        """
        data = await self._stream.read(READ_BYTES)
        if not data:
            raise _StreamEnded("the coordinator closed the connection")
        messages: list[CoordinatorMessage] = self.link.receive(data)
        answer = self.link.data_to_send()
        if answer:
            await self.write(answer)
        return [message.state for message in messages]

    async def write(self, frame: bytes) -> None:
        """Sends a frame; raises OSError if the link is gone."""
        async with self._writing:
            await self._stream.write(frame)

    async def close(self) -> None:
        self.link.close()
        await self._stream.close()
