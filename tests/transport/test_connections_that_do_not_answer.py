"""Which connections count as silent, what is done about them, and what a stranger cannot make of it. No network."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from distro_optim.comm.iroh.connection import IDLE_LOOK_SECONDS, NUDGE_SECONDS, SILENT_REASON, Connection
from distro_optim.comm.iroh.node.vigil import REPLACED_SECONDS, Vigil, pause_with
from distro_optim.comm.iroh.traffic import TrafficMonitor
from distro_optim.comm.iroh.watching.beside import IDLE_SECONDS, MAX_BESIDE, EndpointsBeside
from distro_optim.comm.iroh.watching.silence import SENDINGS, SILENCE_SECONDS, SLEEP_SECONDS, Silence

LOOK = 0.25
LOOKS = 8
PEER, OTHER = bytes([1]) * 32, bytes([2]) * 32


# -- the rule ----------------------------------------------------------------------------------------------------------


def silent_by_the_book(history: list[tuple[bool, bool]]) -> bool:
    """The same rule, read off the whole history of looks: whether more had been sent, and whether more had come."""
    last_heard = max((index for index, (_, received) in enumerate(history) if received), default=0)
    vain = [index for index, (sent, _) in enumerate(history) if index > last_heard and sent]
    return len(vain) >= SENDINGS and (len(history) - 1 - vain[0]) * LOOK >= SILENCE_SECONDS


@pytest.mark.slow
def test_silent_is_what_sends_again_and_again_and_receives_nothing_whatever_came_before() -> None:
    steps = list(itertools.product((False, True), repeat=2))
    for history in itertools.product(steps, repeat=LOOKS):
        silence, sent, received = Silence(0.0), 0, 0
        seen = [(True, True)]
        silence.look(sent, received, 0.0)
        for index, (more_sent, more_received) in enumerate(history, start=1):
            sent, received = sent + more_sent, received + more_received
            seen.append((more_sent, more_received))
            assert silence.look(sent, received, index * LOOK) == silent_by_the_book(seen), seen


def test_one_packet_without_an_answer_may_be_an_acknowledgement() -> None:
    silence = Silence(0.0)
    silence.look(0, 0, 0.0)
    assert not any(silence.look(30, 0, step * LOOK) for step in range(1, 100))


def test_a_connection_without_any_path_cannot_even_send() -> None:
    silence = Silence(0.0)
    silence.look(0, 0, 0.0)
    found = [silence.look(0, 0, step * LOOK, has_way=False) for step in range(1, 10)]
    assert found == [False] * 4 + [True] * 5


def test_after_our_own_sleep_nobody_else_was_silent() -> None:
    silence = Silence(0.0)
    now = 0.0
    for _ in range(5):
        now += SLEEP_SECONDS + 0.1
        assert not silence.look(int(now), 0, now)


# -- what the watch does -----------------------------------------------------------------------------------------------


class Id(bytes):
    def to_bytes(self) -> bytes:
        return bytes(self)


@dataclass
class Path:
    """One way of a connection, with counters of its own."""

    is_selected: bool
    is_relay: bool = False
    udp_tx_bytes: int = 0
    udp_rx_bytes: int = 0

    @property
    def stats(self) -> Path:
        return self


@dataclass
class RawConnection:
    """What the package would give: counters that a test sets."""

    peer: bytes = PEER
    purpose: bytes = b"test"
    by_way: list[Path] = field(default_factory=list)
    udp_tx_bytes: int = 0
    udp_rx_bytes: int = 0
    looks: int = 0
    ways: int = 1
    reason: str | None = None
    nudges: int = 0
    closed_with: list[bytes] = field(default_factory=list)

    def remote_id(self) -> Id:
        return Id(self.peer)

    def alpn(self) -> bytes:
        return self.purpose

    def stats(self) -> RawConnection:
        self.looks += 1
        return self

    def paths(self) -> list[Path]:
        return self.by_way or [Path(is_selected=False) for _ in range(self.ways)]

    def close_reason(self) -> str | None:
        return self.reason

    def close(self, code: int, reason: bytes) -> None:
        self.reason = f"closed with {code}"
        self.closed_with.append(reason)

    def max_datagram_size(self) -> int:
        return 1200

    def send_datagram(self, data: bytes) -> None:
        assert data
        self.nudges += 1
        self.udp_tx_bytes += len(data)


class Watched:
    """A vigil over connections that a test makes, with a clock that a test moves."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.places = 0
        self.now = asyncio.get_running_loop().time()
        self.vigil = Vigil(lambda: self.connections, lambda: self.places)

    def connect(self, peer: bytes = PEER, purpose: bytes = b"test") -> tuple[RawConnection, Connection]:
        raw = RawConnection(peer, purpose)
        connection = Connection(raw, dialled=True)
        self.connections.append(connection)
        return raw, connection

    def go_on(
        self, looks: int, *, sending: tuple[RawConnection, ...] = (), hearing: tuple[RawConnection, ...] = ()
    ) -> None:
        for _ in range(looks):
            self.now += LOOK
            for raw in sending:
                raw.udp_tx_bytes += 100
            for raw in hearing:
                raw.udp_rx_bytes += 100
            self.vigil.look(self.now)


def watching(test: Callable[[Watched], None]) -> Callable[[], None]:
    """Runs a test in an event loop; nothing in it waits."""

    def run() -> None:
        async def inside() -> None:
            test(Watched())

        asyncio.run(inside())

    run.__name__ = test.__name__
    return run


@watching
def test_who_uses_a_connection_is_told_once_when_it_falls_silent(world: Watched) -> None:
    raw, connection = world.connect()
    told: list[bool] = []
    connection.on_silence(lambda: told.append(connection.is_silent))
    world.go_on(4, sending=(raw,), hearing=(raw,))
    assert told == []
    world.go_on(20, sending=(raw,))
    assert told == [True]
    world.go_on(1, hearing=(raw,))
    assert not connection.is_silent
    world.go_on(20, sending=(raw,))
    assert told == [True, True]


@watching
def test_a_peer_that_is_heard_nowhere_keeps_its_connections(world: Watched) -> None:
    # It may sleep, or its cable may be out for a while: then they go on by themselves.
    raws = [world.connect()[0] for _ in range(3)]
    world.go_on(200, sending=tuple(raws))
    assert [raw.closed_with for raw in raws] == [[], [], []]


@watching
def test_a_dead_connection_to_a_peer_that_is_heard_over_another_one_is_closed(world: Watched) -> None:
    (dead, _), (alive, _) = world.connect(), world.connect()
    world.go_on(10, sending=(dead, alive), hearing=(alive,))
    assert dead.closed_with == [SILENT_REASON]
    assert alive.closed_with == []


@watching
def test_another_peer_that_is_heard_proves_nothing(world: Watched) -> None:
    (dead, _), (alive, _) = world.connect(PEER), world.connect(OTHER)
    world.go_on(20, sending=(dead, alive), hearing=(alive,))
    assert dead.closed_with == []


@watching
def test_a_connection_that_says_nothing_because_nothing_is_said_proves_nothing(world: Watched) -> None:
    (dead, _), _idle = world.connect(), world.connect()
    world.go_on(20, sending=(dead,))
    assert dead.closed_with == []


@watching
def test_a_coordinators_connection_is_left_to_the_coordinator(world: Watched) -> None:
    # Closing it would take the client out of the epoch.
    (dead, connection), (alive, _) = world.connect(), world.connect(purpose=b"gossip")
    connection.is_patient = True
    world.go_on(20, sending=(dead, alive), hearing=(alive,))
    assert connection.is_silent
    assert dead.closed_with == []
    # Until there is another one, which has taken its place.
    again, newer = world.connect()
    newer.opened = world.now
    world.go_on(int(REPLACED_SECONDS / LOOK) - 1, sending=(dead, alive), hearing=(alive, again))
    assert dead.closed_with == [], "the coordinator may not know yet whose the new one is"
    world.go_on(2, sending=(dead, alive), hearing=(alive, again))
    assert dead.closed_with == [SILENT_REASON]
    assert again.closed_with == []


@watching
def test_with_a_relay_server_only_the_way_that_is_used_says_whether_the_peer_answers(world: Watched) -> None:
    # The transport keeps the way through the relay server alive, and what comes there says nothing about the other.
    raw, connection = world.connect()
    direct, relayed = Path(is_selected=True), Path(is_selected=False, is_relay=True)
    raw.by_way = [relayed, direct]
    connection.has_relay = True
    for _ in range(10):
        direct.udp_tx_bytes += 100
        relayed.udp_rx_bytes += 10
        world.go_on(1, sending=(raw,), hearing=(raw,))
    assert connection.is_silent
    direct.is_selected, relayed.is_selected = False, True
    world.go_on(1)
    assert not connection.is_silent


@pytest.mark.parametrize("has_relay", [True, False])
def test_what_is_idle_on_a_dead_way_is_closed_with_the_rest_where_a_relay_server_is_another_way(
    has_relay: bool,
) -> None:
    async def inside() -> None:
        world = Watched()
        (dead, first), (idle, second), (before, third) = world.connect(), world.connect(), world.connect()
        for connection in (first, second, third):
            connection.has_relay = has_relay
            connection.opened -= 10.0
        world.go_on(4, sending=(dead, idle, before), hearing=(dead, idle, before))
        # From now on nothing comes on the first two, nothing is said on the second, and the third goes on.
        world.go_on(10, sending=(dead, before), hearing=(before,))
        assert dead.closed_with == [SILENT_REASON]
        assert idle.closed_with == ([SILENT_REASON] if has_relay else [])
        assert before.closed_with == []

    asyncio.run(inside())


@watching
def test_only_who_owes_an_answer_is_nudged_and_only_while_nothing_comes(world: Watched) -> None:
    (owes, connection), (idle, _) = world.connect(), world.connect()
    world.go_on(1)
    connection.awaiting = 1
    world.go_on(20, hearing=(owes,))
    assert owes.nudges == 0
    world.go_on(40)
    assert 0 < owes.nudges <= 40 * LOOK / NUDGE_SECONDS
    assert connection.is_silent
    assert idle.nudges == 0


@watching
def test_paths_are_looked_at_after_our_own_addresses_have_changed(world: Watched) -> None:
    raw, connection = world.connect()
    world.go_on(40)  # what a look at the beginning may have found is over
    raw.ways = 0
    world.go_on(40)
    assert not connection.is_silent
    world.places += 1
    world.go_on(8)
    assert connection.is_silent


@watching
def test_who_owes_an_answer_is_looked_at_each_time_and_others_once_a_second(world: Watched) -> None:
    (owes, connection), (idle, _), (silent, _) = world.connect(), world.connect(), world.connect(OTHER)
    world.go_on(40)  # what a look at the beginning may have found is over
    connection.awaiting = 1
    owes.looks = idle.looks = silent.looks = 0
    world.go_on(40, hearing=(owes,), sending=(silent,))
    assert owes.looks == 40
    assert idle.looks == 40 * LOOK / IDLE_LOOK_SECONDS
    assert silent.looks > 40 - 2 * IDLE_LOOK_SECONDS / LOOK


@watching
def test_who_has_just_spoken_is_not_looked_at_more_than_once_a_second(world: Watched) -> None:
    (raw, connection), (other, relayed) = world.connect(), world.connect(OTHER)
    relayed.has_relay = True
    other.by_way = [Path(is_selected=True)]
    for one in (connection, relayed):
        one.awaiting = 1
    world.go_on(40, hearing=(raw, other))  # what a look at the beginning may have found is over
    raw.looks = other.looks = 0
    for _ in range(40):
        for one in (connection, relayed):
            one.has_spoken()
        world.go_on(1, sending=(raw,), hearing=(raw,))
        assert connection.heard_at == world.now
    assert raw.looks == 40 * LOOK / IDLE_LOOK_SECONDS
    assert other.looks == 40, "what comes by the relay says nothing about the way that is used"
    # Once it says nothing any more, it is noticed as soon as ever.
    raw.looks = 0
    world.go_on(8, sending=(raw,))
    assert connection.is_silent
    assert raw.looks >= 7


@watching
def test_what_is_counted_now_and_then_and_what_is_asked_for_add_up_to_the_same(world: Watched) -> None:
    raw, connection = world.connect()
    monitor = TrafficMonitor()
    for exact in (True, False, False, True, False, True):
        world.go_on(3, sending=(raw,), hearing=(raw,))
        raw.udp_tx_bytes += 50  # which the watch has not seen yet
        monitor.sample([connection], world.now, exact=exact)
    assert monitor.peers[PEER].sent.total == raw.udp_tx_bytes
    assert monitor.peers[PEER].received.total == raw.udp_rx_bytes


@watching
def test_what_was_closed_for_its_silence_says_nothing_about_the_peer(world: Watched) -> None:
    raw, connection = world.connect()
    raw.reason = "closed by peer: silent (code 0)"
    assert connection.has_lost_its_way
    other, other_connection = world.connect()
    other.reason = "closed by peer: limit (code 5)"
    assert not other_connection.has_lost_its_way


# -- endpoints beside the first ----------------------------------------------------------------------------------------


class Endpoints:
    """Counts the endpoints that are opened; the clock is a test's."""

    def __init__(self) -> None:
        self.opened = 0
        self.now = 0.0
        self.beside: EndpointsBeside[int] = EndpointsBeside(self.open, lambda: self.now)

    async def open(self) -> int:
        self.opened += 1
        await asyncio.sleep(0)
        return self.opened


def test_an_endpoint_that_does_not_know_the_peer_is_used_again() -> None:
    async def scenario() -> None:
        endpoints = Endpoints()
        first = await endpoints.beside.take(lambda endpoint: False)
        assert await endpoints.beside.take(lambda endpoint: False) == first
        assert await endpoints.beside.take(lambda endpoint: endpoint == first) == 2

    asyncio.run(scenario())


def test_however_many_peers_fall_silent_at_once_only_three_endpoints_are_opened() -> None:
    async def scenario() -> None:
        endpoints = Endpoints()
        took = await asyncio.gather(*(endpoints.beside.take(lambda endpoint: True) for _ in range(100)))
        assert endpoints.opened == len(endpoints.beside) == MAX_BESIDE
        assert took.count(None) == 100 - MAX_BESIDE

    asyncio.run(scenario())


def test_an_endpoint_that_cannot_be_opened_takes_no_ones_place() -> None:
    async def scenario() -> None:
        async def fail() -> int:
            raise OSError("no more sockets")

        beside: EndpointsBeside[int] = EndpointsBeside(fail, lambda: 0.0)
        for _ in range(2 * MAX_BESIDE):
            with pytest.raises(OSError, match="no more sockets"):
                await beside.take(lambda endpoint: True)

    asyncio.run(scenario())


def test_an_endpoint_is_closed_when_nobody_has_used_it_for_long() -> None:
    async def scenario() -> None:
        endpoints = Endpoints()
        endpoint = await endpoints.beside.take(lambda endpoint: False)
        assert endpoint is not None
        endpoints.now += 10 * IDLE_SECONDS
        assert endpoints.beside.idle(lambda endpoint: False) == []  # a dial is under way
        endpoints.beside.give_back(endpoint)
        endpoints.now += 10 * IDLE_SECONDS
        assert endpoints.beside.idle(lambda endpoint: True) == []  # a connection is open
        endpoints.now += IDLE_SECONDS - 1
        assert endpoints.beside.idle(lambda endpoint: False) == []
        endpoints.now += 1
        assert endpoints.beside.idle(lambda endpoint: False) == [endpoint]
        assert len(endpoints.beside) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("connections", "seconds"), [(0, 0.25), (8, 0.25), (12, 0.375), (16, 0.5), (100, 0.5), (250, 1.0), (10_000, 2.0)]
)
def test_the_more_connections_the_fewer_looks_and_never_fewer_than_silence_allows(
    connections: int, seconds: float
) -> None:
    assert pause_with(connections) == pytest.approx(seconds)
    assert pause_with(connections) < SLEEP_SECONDS
