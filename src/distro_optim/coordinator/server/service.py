"""The whole coordinator server but for its sockets: connections in front of a :class:`~.host.RunHost`.

Bytes, departures and the time go in; :meth:`CoordinatorService.take_output` says which connections have frames to
write, which are to be closed, and what happened. :mod:`.server` moves the bytes.

Protocol: PsycheFoundation/psyche, ``architectures/centralized/server/src/app.rs``. Every client with a proved key gets
the state at once, with every tick, and when the phase changes. Ours differ: one connection for each key (a newer one
replaces the older, and the client stays in the run), a client that is refused is told so by a closed connection, a
client that goes is forgotten on every path, and clients of ours get only what has changed (:mod:`...comm.changes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from ...comm import changes
from ...comm.framing import CHALLENGE_SIZE, Else, encode_frame
from ...comm.iroh.meeting_place import MeetingPlace
from ...comm.serving.connection import Connection
from ...comm.serving.limits import ServerLimits
from ...comm.serving.service import CLOSED_BY_CLIENT, ConnectionService, Output
from ...comm.streams import place_of
from ...errors import LimitExceededError, PeerRefusedError, ProtocolError
from ..client.state_feed import StateFeed
from ..messages import CLIENT_TO_SERVER, SERVER_TO_CLIENT, ClientToServerMessage, CoordinatorMessage, Join
from ..types import Coordinator, NodeIdentity
from ..watchers import WHO_WATCHES, encode_watchers
from ..why_closed import WHY_CLOSED, Reasons
from .host import Event, PhaseChanged, Refused, RunHost
from .in_process import LocalParticipants

__all__ = ["Connected", "CoordinatorService", "Disconnected", "Output", "ServiceEvent", "Woke"]

RETURN_SECONDS: Final = 20.0
"""After this process has slept, its clients have so long to come back, which takes them a dial and a pause of
:data:`~distro_optim.coordinator.client.remote.RECONNECTING`."""

REDIRECTED_SECONDS: Final = 3.0
"""Meanwhile, for one that has closed its connection itself after it had come back: it may have heard once more who
hosts, and dials anew; or it leaves. Chosen arbitrarily, above a dial."""

SEED_SIZE: Final = 8


@dataclass(frozen=True, kw_only=True)
class Connected:
    """A client has proved its key."""

    client: NodeIdentity
    address: str


@dataclass(frozen=True, kw_only=True)
class Disconnected:
    """A connection is over; ``client`` is None if no key had been proved."""

    client: NodeIdentity | None
    address: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Woke:
    """This process was stopped, or its machine slept; the run's clock stood still meanwhile."""

    seconds: float


ServiceEvent = Event | Connected | Disconnected | Woke


class CoordinatorService(ConnectionService):
    """A coordinator for any number of connections.

    Times are monotonic seconds. Unix time is made from them with an offset that is fixed at the start, so that a clock
    which is set while the server runs moves no phase. Neither does a sleep of this process, see :meth:`woke`.

    Args:
        host: the run.
        draw: returns that many random bytes; ``os.urandom``, or a seeded generator in tests.
        unix_offset: Unix time minus monotonic time, in seconds.
        limits: how much one stranger may ask for.
        sends_changes: whether clients of ours get what has changed in the state, in place of all of it.
        watchers: public keys of those that may watch: they get the states, whoever else may join, and are cut off if
            they say anything.

    Attributes:
        local: participants in this process. They get the states when the connected clients get them.
        meeting_place: where the members tell each other where they are.
    """

    def __init__(
        self,
        host: RunHost,
        *,
        draw: Callable[[int], bytes],
        unix_offset: float,
        limits: ServerLimits | None = None,
        sends_changes: bool = True,
        watchers: Collection[bytes] = (),
    ) -> None:
        self.host = host
        self.watchers = frozenset(watchers)
        self.limits = limits or ServerLimits()
        self.local = LocalParticipants(host)
        self.meeting_place = MeetingPlace(host.is_pending)
        self.meeting_place.watchers = self.watchers
        self._draw = draw
        self._sends_changes = sends_changes
        self._unix_offset = unix_offset
        self._connections: set[Connection] = set()
        self._unproved: dict[Connection, None] = {}  # the oldest first
        self._by_client: dict[NodeIdentity, Connection] = {}
        self._addresses: Counter[str] = Counter()
        self._places: dict[Connection, str] = {}
        self._output = Output()
        self._framed: tuple[Coordinator, bytes] | None = None
        self._reasons = Reasons()
        # After we have slept: until when clients may come back, and which have not yet.
        self._back_by: float | None = None
        self._away: set[NodeIdentity] = set()
        # Connections from before this process slept: their clients may have given them up.
        self._shaken: set[Connection] = set()
        # Those that had come back and have closed their connection: when they count as gone, from the next tick on.
        self._closed: dict[NodeIdentity, float | None] = {}

    @property
    def num_connections(self) -> int:
        """Open connections, with and without a proved key."""
        return len(self._connections)

    @property
    def clients(self) -> dict[NodeIdentity, Connection]:
        """The connections whose key is proved."""
        return self._by_client

    @override
    def has(self, connection: Connection) -> bool:
        """Whether the connection is still served."""
        return connection in self._connections

    def unix_time(self, now: float) -> int:
        """Whole Unix seconds."""
        return int(self.unix_seconds(now))

    def unix_seconds(self, now: float) -> float:
        """Unix seconds, with their parts."""
        return now + self._unix_offset

    @override
    def take_output(self) -> Output:
        """What has to be done since the last call."""
        output, self._output = self._output, Output()
        return output

    # -- inputs --------------------------------------------------------------------------------------------------------

    @override
    def connect(self, address: str, now: float, place: str | None = None) -> Connection:
        """A client connects.

        Args:
            address: host and port, or whatever names it in messages.
            now: monotonic time in seconds.
            place: where it is in the network; None takes the host of ``address``.

        Raises:
            LimitExceededError: too many are connected; close the connection.
        """
        place = place or place_of(address)
        if len(self._connections) >= self.limits.connections:
            raise LimitExceededError(f"{self.limits.connections} connections are open already")
        if len(self._unproved) >= self.limits.unproved:
            # An honest client answers within a round trip. One that only holds a place has to make room first.
            self._close(next(iter(self._unproved)), "it had not proved its key when others needed the place")
        if self._addresses[place] >= self.limits.per_address:
            raise LimitExceededError(f"{self.limits.per_address} connections from {place} are open already")
        connection = Connection(
            changes.announce(self._draw(changes.NONCE_SIZE)) if self._sends_changes else self._draw(CHALLENGE_SIZE),
            CLIENT_TO_SERVER,
            SERVER_TO_CLIENT,
            address=address,
            limits=self.limits,
            now=now,
            takes_questions=True,
        )
        self._connections.add(connection)
        self._unproved[connection] = None
        self._places[connection] = place
        self._addresses[place] += 1
        self._output.writable.add(connection)
        return connection

    @override
    def receive(self, connection: Connection, data: bytes, now: float) -> None:
        """Bytes of a connection. What is wrong with them ends it, and nothing else."""
        if connection not in self._connections:
            return  # closed while these bytes were on their way
        try:
            was_open = connection.is_open
            messages = connection.receive(data, now)
            if connection.is_open and not was_open:
                if connection.question is not None:
                    self._answer(connection, connection.question, now)
                    return
                self._admit(connection, now)
        except ProtocolError as error:
            self._close(connection, str(error))
            return
        if messages and connection.peer in self.watchers:
            reason = "the key may watch this run, and say nothing: to take part, use another key"
            self._reasons.note(self._client_of(connection).p2p_identity, reason)
            self._close(connection, reason)
            return
        for message in messages:
            if connection not in self._connections:
                return
            events = self.host.receive(self._client_of(connection), message, self.unix_seconds(now), self._seed())
            self._note(events, now)
            refusals = [event.reason for event in events if isinstance(event, Refused)]
            if isinstance(message, Join) and refusals:
                self._reasons.note(self._client_of(connection).p2p_identity, refusals[0])
                self._close(connection, "its join was refused")

    @override
    def disconnect(self, connection: Connection, reason: str = CLOSED_BY_CLIENT) -> None:
        """A connection is gone, whichever side ended it. Calling it again does nothing."""
        self._forget(connection, reason)

    @override
    def tick(self, now: float) -> None:
        """Time passes. Call it about twice a second."""
        for connection in list(self._connections):
            reason = connection.overdue(now)
            if reason is not None:
                self._close(connection, reason)
        for client, gone_at in list(self._closed.items()):
            if gone_at is None:
                self._closed[client] = now + REDIRECTED_SECONDS
            elif now >= gone_at:
                del self._closed[client]
                self._output.events += self.host.disconnect(client)
        if self._back_by is not None and now >= self._back_by:
            self._back_by, away, self._away = None, self._away, set()
            self._shaken.clear()
            for client in away:
                self._output.events += self.host.disconnect(client)
        self._note(self.host.tick(self.unix_seconds(now), self._seed()), now, broadcast=False)
        self.broadcast(now)

    def woke(self, now: float, seconds: float) -> None:
        """This process has not run for so many seconds.

        The run's clock stood still meanwhile, and clients that seem to be gone because of that may come back. Call it
        before anything else that has happened meanwhile is put in.
        """
        self._unix_offset -= seconds
        for connection in self._connections:
            connection.excuse(seconds)
        self._back_by, self._shaken = now + RETURN_SECONDS, set(self._by_client.values())
        self._output.events.append(Woke(seconds=seconds))

    def expect(self, clients: Iterable[NodeIdentity], now: float) -> None:
        """Clients that are in the run without a connection here may come within :data:`RETURN_SECONDS`."""
        self._back_by, self._away = now + RETURN_SECONDS, set(clients).difference(self._by_client)

    def broadcast(self, now: float, *, news: bool = False) -> None:
        """Sends the state to every client; if it is ``news`` between two ticks, not to those that do nothing."""
        self.local.publish()
        if not self._by_client:
            return  # no one to encode it for
        frame, idle = self._state_frame(), self.host.idle if news else frozenset()
        for client, connection in self._by_client.items():
            if client not in idle:
                connection.send(frame, now)
                self._output.writable.add(connection)

    def note(self, events: Iterable[Event], now: float) -> None:
        """Reports what was done to the host from elsewhere, such as a pause by the operator."""
        self._note(events, now)

    # -- inputs of the operator ----------------------------------------------------------------------------------------

    def kick(self, public: bytes, now: float, reason: str = "the operator took it out of the run") -> None:
        """Takes the owner of a key out of the run and closes its connection. It may come again.

        A participant of this process stays.
        """
        client = NodeIdentity.from_single_key(public)
        if client in self.local:
            return
        connection = self._by_client.get(client)
        self._note(self.host.kick(client), now)
        self._reasons.note(public, reason)
        if connection is not None:
            self._close(connection, reason)

    def ban(self, public: bytes, now: float, reason: str = "the operator banned it") -> None:
        """:meth:`kick`, and it may not come again."""
        self.host.ban(public)
        self.kick(public, now, reason)

    def audited(self, public: bytes, now: float, *, passed: bool) -> bool:
        """Most auditors of a client say so. One that failed may not come again; returns whether it was taken out.

        A participant of this process stays.
        """
        client = NodeIdentity.from_single_key(public)
        self.host.audited(client, passed=passed)
        if passed or client in self.local:
            return False
        self.ban(public, now, "auditors found that it does not train what it is given")
        return True

    def let_in(self, allowed: Collection[bytes] | None, now: float) -> None:
        """From now on only the owners of these keys may take part; the others are taken out. None: everybody may."""
        self.host.let_in(allowed)
        for client in {*self._by_client, *self.host.pending}:
            if not self._may_come(client.signer):
                self.kick(client.signer, now, "the key is not on the list of this run any more")

    # -- inputs from this process --------------------------------------------------------------------------------------

    def join_locally(self, client: NodeIdentity, run_id: str, feed: StateFeed, now: float) -> None:
        """A participant of this process joins. It takes the place of a connection with the same key.

        Raises:
            JoinRefusedError, ConfigurationError: see :meth:`~.in_process.InProcessCoordinator.join`.
        """
        events = self.local.join(client, run_id, feed, self.unix_time(now), self._seed())
        older = self._by_client.pop(client, None)
        if older is not None:
            self._close(older, "the same key has joined within the server's own process")
        self._note(events, now)

    def receive_locally(self, client: NodeIdentity, message: ClientToServerMessage, now: float) -> None:
        """A message of a participant of this process; no limit on its rate applies."""
        self._note(self.host.receive(client, message, self.unix_seconds(now), self._seed()), now)

    def leave_locally(self, client: NodeIdentity, now: float) -> None:
        """A participant of this process leaves. Calling it again does nothing."""
        self._note(self.local.leave(client), now)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _admit(self, connection: Connection, now: float) -> None:
        """A key is proved."""
        client = self._client_of(connection)
        del self._unproved[connection]
        if not self._may_come(client.signer):
            raise ProtocolError("the key is not on the list of this run")
        if client in self.local:
            raise ProtocolError("the key is that of a participant in the server's own process")
        older = self._by_client.get(client)
        self._by_client[client] = connection
        self._away.discard(client)
        self._closed.pop(client, None)
        if older is not None:
            self._close(older, "the same key has connected again")
        self.host.came_from(client, self._places[connection])
        self._output.events.append(Connected(client=client, address=connection.address))
        connection.send(self._state_frame(), now)
        self._output.writable.add(connection)

    def _may_come(self, public: bytes) -> bool:
        """Whether the owner of a key may be connected: to take part, or to watch."""
        return self.host.is_allowed(public) or (public in self.watchers and public not in self.host.banned)

    def _answer(self, connection: Connection, question: bytes, now: float) -> None:
        """Somebody asks where the others are, or why it was turned away, over a connection that is for nothing else."""
        peer = self._client_of(connection).p2p_identity
        if question == WHY_CLOSED:
            may_come, banned = self._may_come(peer), peer in self.host.banned
            answer = self._reasons.answer(peer, is_allowed=may_come, is_banned=banned)
            connection.send(encode_frame(answer.encode()), now)
            told = "it was told why it was turned away"
        elif question == WHO_WATCHES:
            if not self.host.is_pending(peer) and peer not in self.watchers:
                raise ProtocolError("it is not in this run")
            connection.send(encode_frame(encode_watchers(self.watchers)), now)
            told = "it was told who watches"
        else:
            try:
                connection.send(self.meeting_place.answer(peer, question), now)
            except PeerRefusedError as error:
                raise ProtocolError(str(error)) from None
            told = "it was told where the others are"
        self._output.writable.add(connection)
        self._close(connection, told)

    def _note(self, events: Iterable[Event], now: float, *, broadcast: bool = True) -> None:
        events = list(events)
        events += self.local.rejoin(events, self.unix_time(now))
        self._output.events += events
        if broadcast and any(isinstance(event, PhaseChanged) for event in events):
            self.broadcast(now, news=True)

    def _close(self, connection: Connection, reason: str) -> None:
        self._output.closing.setdefault(connection, reason)
        self._forget(connection, reason)

    def _forget(self, connection: Connection, reason: str) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        is_shaken = connection in self._shaken
        self._shaken.discard(connection)
        self._unproved.pop(connection, None)
        self._output.writable.discard(connection)
        place = self._places.pop(connection)
        self._addresses[place] -= 1
        if not self._addresses[place]:
            del self._addresses[place]
        if connection.question is not None:
            return  # it was no client
        client = None if connection.peer is None else self._client_of(connection)
        self._output.events.append(Disconnected(client=client, address=connection.address, reason=reason))
        if client is not None and self._by_client.get(client) is connection:
            del self._by_client[client]
            if self._back_by is None:
                self._output.events += self.host.disconnect(client)
            elif is_shaken or reason != CLOSED_BY_CLIENT:
                self._away.add(client)
            else:
                self._closed[client] = None

    def _client_of(self, connection: Connection) -> NodeIdentity:
        if connection.peer is None:
            raise ProtocolError("no key is proved")
        return NodeIdentity.from_single_key(connection.peer)

    def _state_frame(self) -> bytes:
        state = self.host.state
        if self._framed is None or self._framed[0] is not state:
            self._framed = (state, frame_of(state))
        return self._framed[1]

    def _seed(self) -> int:
        return int.from_bytes(self._draw(SEED_SIZE), "little")


def frame_of(state: Coordinator) -> bytes:
    """The frame that carries a state to the clients."""
    return encode_frame(SERVER_TO_CLIENT.encode(Else(CoordinatorMessage(state))))
