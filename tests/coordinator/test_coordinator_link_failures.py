"""What a client says when a coordinator is absent, foreign, unwilling or gone, and how it comes back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from coordinator.coordinator_arenas import MemoryArena
from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.comm.framing import Else, ServerLink, encode_frame
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.streams import MemoryListener, Stream, TcpListener, memory_pipe
from distro_optim.coordinator.client.connection import tcp_connector
from distro_optim.coordinator.client.remote import MAX_UNSENT, RemoteCoordinator
from distro_optim.coordinator.client.state_feed import MAX_UNREAD_STATES, StateFeed
from distro_optim.coordinator.messages import (
    CLIENT_TO_SERVER,
    SERVER_TO_CLIENT,
    CheckpointMessage,
    CoordinatorMessage,
    Join,
    WitnessMessage,
)
from distro_optim.coordinator.model import Hub, HubRepo
from distro_optim.coordinator.remembering_codec import RememberingCodec
from distro_optim.coordinator.rules.steps import with_round
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.server import CoordinatorServer
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.types import Coordinator, CoordinatorProgress, RunState, Witness, WitnessProof
from distro_optim.errors import ConfigurationError, CoordinatorLinkError, JoinRefusedError, ProtocolError
from distro_optim.testing.coordinator import dummy_run

KEY = SecretKey(bytes(31) + b"\x01")
AT_ONCE = BackoffPolicy(first=1e-9, longest=1e-9)
READY = Witness(WitnessProof(0, 0, False))
WORDS = [
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    bytes(64),
    b"\x00\x00\x00\x02\x00\x00",
    b"\xff" * 40,
]

pytestmark = [pytest.mark.waiting]


def state_frame(state: Coordinator) -> bytes:
    return encode_frame(SERVER_TO_CLIENT.encode(Else(CoordinatorMessage(state))))


class ScriptedServer:
    """A server of which each connection follows the next script, the last one for ever."""

    def __init__(self, *scripts: Callable[[ScriptedServer, Stream], Awaitable[None]]) -> None:
        self.scripts = list(scripts)
        self.connections = 0
        self.messages: list[object] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def connect(self) -> Stream:
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        ours, theirs = memory_pipe()

        async def serve() -> None:
            try:
                await script(self, theirs)
            except ConnectionError:
                pass  # the client went first
            finally:
                await theirs.close()

        self.tasks.append(asyncio.create_task(serve()))
        return ours

    async def welcome(self, stream: Stream) -> ServerLink:
        """Shakes hands."""
        link = ServerLink(os.urandom(32), CLIENT_TO_SERVER, SERVER_TO_CLIENT)
        await stream.write(link.opening())
        while link.peer is None:
            await self.take(stream, link)
        return link

    async def take(self, stream: Stream, link: ServerLink) -> None:
        data = await stream.read(65536)
        if not data:
            raise ConnectionAbortedError("the client went")
        self.messages += link.receive(data)

    async def listen(self, stream: Stream, link: ServerLink, until: int) -> None:
        """Reads until so many messages have come in all."""
        while len(self.messages) < until:
            await self.take(stream, link)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def client_of(server: ScriptedServer, **settings: object) -> RemoteCoordinator:
    options = {"backoff": AT_ONCE, "timeout": 10.0, "name": "test:1", **settings}
    return RemoteCoordinator(server.connect, KEY, "dummy", **options)  # type: ignore[arg-type]


def failing(server: ScriptedServer, expected: type[Exception], **settings: object) -> Exception:
    """The error of joining."""

    async def run() -> Exception:
        client = client_of(server, **settings)
        with pytest.raises(expected) as caught:
            await client.join()
        await client.close()
        await server.stop()
        return caught.value

    return asyncio.run(run())


# -- joining ----------------------------------------------------------------------------------------------------------


def test_nobody_listening_is_told_with_the_name() -> None:
    async def run() -> None:
        listener = await TcpListener.bind("127.0.0.1", 0)
        port = int(listener.address.rpartition(":")[2])
        await listener.close()
        client = RemoteCoordinator(tcp_connector("127.0.0.1", port), KEY, "dummy", name="home")
        with pytest.raises(CoordinatorLinkError, match="home cannot be reached"):
            await client.join()
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("word", WORDS)
def test_a_server_of_another_protocol_is_told_apart(word: bytes) -> None:
    async def other(server: ScriptedServer, stream: Stream) -> None:
        await stream.write(word)
        await stream.read(4096)

    error = failing(ScriptedServer(other), ProtocolError)
    assert "does not speak the protocol of a coordinator" in str(error)


def test_a_server_that_says_nothing_is_given_up_after_the_timeout() -> None:
    async def silent(server: ScriptedServer, stream: Stream) -> None:
        await stream.read(4096)

    error = failing(ScriptedServer(silent), CoordinatorLinkError, timeout=0.05)
    assert "no answer within 0.05 s" in str(error)
    assert "no challenge" in str(error)


def test_a_server_that_shakes_hands_and_sends_no_state_is_given_up_after_the_timeout() -> None:
    async def mute(server: ScriptedServer, stream: Stream) -> None:
        await server.welcome(stream)
        while await stream.read(4096):
            pass

    error = failing(ScriptedServer(mute), CoordinatorLinkError, timeout=0.2)
    assert "no state" in str(error)


def test_a_connection_closed_before_the_challenge_is_told_apart() -> None:
    async def busy(server: ScriptedServer, stream: Stream) -> None:
        pass

    assert "before any challenge" in str(failing(ScriptedServer(busy), CoordinatorLinkError))


def test_a_connection_closed_at_the_join_is_a_refusal() -> None:
    async def unwilling(server: ScriptedServer, stream: Stream) -> None:
        link = await server.welcome(stream)
        await stream.write(state_frame(dummy_run()))
        await server.listen(stream, link, 1)

    error = failing(ScriptedServer(unwilling), JoinRefusedError)
    assert KEY.public.hex() in str(error)


def test_a_psyche_server_that_ignores_the_wrong_run_id_is_told_by_its_state() -> None:
    async def other_run(server: ScriptedServer, stream: Stream) -> None:
        link = await server.welcome(stream)
        await server.listen(stream, link, 1)
        await stream.write(state_frame(dummy_run("elsewhere")))
        await stream.read(4096)

    error = failing(ScriptedServer(other_run), JoinRefusedError)
    assert isinstance(error, JoinRefusedError)
    assert (error.wanted, error.hosted) == ("dummy", "elsewhere")


def test_a_key_that_is_not_on_the_servers_list_is_refused() -> None:
    async def run() -> None:
        listener = MemoryListener()
        host = RunHost(dummy_run(), allowed=[bytes(32)])
        service = CoordinatorService(host, draw=os.urandom, unix_offset=0.0)
        async with CoordinatorServer(service, [listener], tick_seconds=0.01):
            client = RemoteCoordinator(listener.connect, KEY, "dummy", timeout=10.0)
            with pytest.raises(JoinRefusedError, match="not on the list of this run"):
                await client.join()
            await client.close()

    asyncio.run(run())


# -- looking before joining -------------------------------------------------------------------------------------------


def waiting(step: int) -> Coordinator:
    """The run waits for members, for the next of its epochs."""
    return replace(dummy_run(), progress=CoordinatorProgress(step, step, 0))


def showing(step: int) -> Callable[[ScriptedServer, Stream], Awaitable[None]]:
    """Tells everybody of the run, as a server does, and goes on until the client goes."""

    async def script(server: ScriptedServer, stream: Stream) -> None:
        link = await server.welcome(stream)
        while True:
            await stream.write(state_frame(waiting(step)))
            await stream.write(state_frame(waiting(step + 1)))
            await server.take(stream, link)

    return script


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_who_looks_never_asks_to_be_in_it_over_any_link() -> None:
    """Neither when the run waits for members again, which is when a member asks again, nor when the link breaks."""

    async def two_epochs(server: ScriptedServer, stream: Stream) -> None:
        await server.welcome(stream)
        for step, phase in enumerate((RunState.WAITING_FOR_MEMBERS, RunState.WARMUP, RunState.WAITING_FOR_MEMBERS)):
            await stream.write(state_frame(replace(waiting(server.connections * 10 + step), run_state=phase)))

    async def run() -> None:
        server = ScriptedServer(two_epochs, two_epochs, showing(99))
        client = client_of(server)
        await client.look()
        await until(lambda: client.state is not None and client.state.progress.step == 100)
        with pytest.raises(CoordinatorLinkError, match="not joined"):
            await client.health_check(())
        await client.close()
        await server.stop()
        assert server.connections == 3
        assert server.messages == []

    asyncio.run(run())


def test_a_connection_closed_at_a_later_join_is_a_refusal() -> None:
    async def unwilling(server: ScriptedServer, stream: Stream) -> None:
        link = await server.welcome(stream)
        await stream.write(state_frame(dummy_run()))
        await server.listen(stream, link, 1)

    async def run() -> None:
        server = ScriptedServer(unwilling)
        client = client_of(server)
        await client.look()
        with pytest.raises(JoinRefusedError, match="when we asked to join") as caught:
            await client.join()
        assert KEY.public.hex() in str(caught.value)
        with pytest.raises(JoinRefusedError):  # nobody waits for states that will not come
            async for _ in client.states():
                pass
        await client.close()
        await server.stop()
        assert server.connections == 1

    asyncio.run(run())


def test_a_coordinator_that_went_while_we_looked_is_told_by_joining() -> None:
    async def once(server: ScriptedServer, stream: Stream) -> None:
        await server.welcome(stream)
        await stream.write(state_frame(dummy_run()))

    async def elsewhere(server: ScriptedServer, stream: Stream) -> None:
        await server.welcome(stream)
        await stream.write(state_frame(dummy_run("elsewhere")))
        await stream.read(4096)

    async def run() -> None:
        server = ScriptedServer(once, elsewhere)
        client = client_of(server)
        await client.look()
        with pytest.raises(JoinRefusedError, match="elsewhere"):
            async for _ in client.states():
                pass
        with pytest.raises(JoinRefusedError, match="elsewhere"):
            await client.join()
        await client.close()
        await server.stop()

    asyncio.run(run())


@pytest.mark.parametrize("welcomed", [False, True])
def test_joining_while_the_link_is_opened_again_joins_once(welcomed: bool) -> None:
    """Before its handshake, and after it, when the new link has been opened only to look."""
    reached = asyncio.Event()
    go_on = asyncio.Event()

    async def once(server: ScriptedServer, stream: Stream) -> None:
        await server.welcome(stream)
        await stream.write(state_frame(waiting(1)))

    async def again(server: ScriptedServer, stream: Stream) -> None:
        link = None
        if welcomed:
            link = await server.welcome(stream)
            for _ in range(20):  # the client takes the challenge and begins to wait for the first state
                await asyncio.sleep(0)
        reached.set()
        await go_on.wait()
        if link is None:
            link = await server.welcome(stream)
        if welcomed:
            await stream.write(state_frame(waiting(2)))
        await server.listen(stream, link, 1)
        for step in (3, 4, 5):
            await stream.write(state_frame(waiting(step)))
        await stream.read(4096)

    async def run() -> None:
        server = ScriptedServer(once, again)
        client = client_of(server)
        await client.look()
        await reached.wait()
        joining = asyncio.ensure_future(client.join())
        await asyncio.sleep(0)
        go_on.set()
        assert (await joining).progress.step >= 4
        assert server.messages == [Join("dummy")]
        await client.close()
        await server.stop()

    asyncio.run(run())


def test_looking_twice_or_after_joining_is_refused() -> None:
    async def run() -> None:
        server = ScriptedServer(showing(1))
        for first in ("look", "join", "close"):
            client = client_of(server)
            await getattr(client, first)()
            with pytest.raises(ConfigurationError, match="once"):
                await client.look()
            await client.close()
        await server.stop()

    asyncio.run(run())


# -- afterwards -------------------------------------------------------------------------------------------------------


def states_of(server: ScriptedServer, count: int, **settings: object) -> list[Coordinator]:
    """Joins, and reads so many states."""

    async def run() -> list[Coordinator]:
        client = client_of(server, **settings)
        await client.join()
        seen = []
        async for state in client.states():
            seen.append(state)
            if len(seen) == count:
                break
        await client.close()
        await server.stop()
        return seen

    return asyncio.run(run())


def lasting(step: int, end: bytes | None = b"") -> Callable[[ScriptedServer, Stream], Awaitable[None]]:
    """Takes a client in, sends two states from this step on, then ``end``, and closes; or stays, with None."""

    async def script(server: ScriptedServer, stream: Stream) -> None:
        link = await server.welcome(stream)
        await server.listen(stream, link, len(server.messages) + 1)
        for place in (step, step + 1):
            state = replace(dummy_run(), run_state=RunState.WARMUP, progress=CoordinatorProgress(step=place))
            await stream.write(state_frame(state))
        if end:
            await stream.write(end)
        while end is None and await stream.read(4096):
            pass

    return script


@pytest.mark.parametrize("end", [b"", b"\xff" * 16, bytes(16)], ids=["closed", "too long", "garbage"])
def test_a_broken_link_is_opened_again_and_the_run_joined_again(end: bytes) -> None:
    server = ScriptedServer(lasting(1, end), lasting(3, end), lasting(5, None))
    assert [state.progress.step for state in states_of(server, 6)] == [1, 2, 3, 4, 5, 6]
    assert server.connections == 3
    assert server.messages == [Join("dummy")] * 3


def test_a_server_that_falls_silent_is_left() -> None:
    server = ScriptedServer(lasting(1, None), lasting(3, None))
    assert [state.progress.step for state in states_of(server, 4, silence=0.1)] == [1, 2, 3, 4]


def test_another_run_at_the_same_address_ends_the_states() -> None:
    async def other_run(server: ScriptedServer, stream: Stream) -> None:
        await server.welcome(stream)
        await stream.write(state_frame(dummy_run("elsewhere")))

    with pytest.raises(JoinRefusedError, match="elsewhere"):
        states_of(ScriptedServer(lasting(1), other_run), 3)


def test_a_coordinator_that_stays_away_ends_the_states() -> None:
    async def busy(server: ScriptedServer, stream: Stream) -> None:
        pass

    server = ScriptedServer(lasting(1), busy)
    with pytest.raises(CoordinatorLinkError, match="before any challenge"):
        states_of(server, 3, give_up_after=0.05, backoff=BackoffPolicy(first=0.01, jitter=0.0))
    assert server.connections > 2


def test_a_server_that_is_started_again_finds_its_clients_back() -> None:
    async def run() -> None:
        arena = MemoryArena()
        async with arena:
            first_connect = [arena.connect]
            client = RemoteCoordinator(lambda: first_connect[0](), KEY, "dummy", backoff=BackoffPolicy(first=0.01))
            await client.join()
            saved = arena.service.host.snapshot(0)
        second = MemoryArena(saved)
        async with second:
            first_connect[0] = second.connect
            while client.identity not in second.service.host.pending:
                await asyncio.sleep(0.001)
            await client.close()

    asyncio.run(run())


def telling(state: Coordinator, messages: int) -> Callable[[ScriptedServer, Stream], Awaitable[None]]:
    """Takes a client in, sends ``state``, and stays until so many messages have come in all, and longer."""

    async def script(server: ScriptedServer, stream: Stream) -> None:
        link = await server.welcome(stream)
        await server.listen(stream, link, len(server.messages) + 1)
        for _ in range(2):
            await stream.write(state_frame(state))
        await server.listen(stream, link, messages)
        await stream.read(4096)

    return script


def test_what_was_said_without_a_link_is_sent_with_the_next() -> None:
    warmup = replace(dummy_run(), run_state=RunState.WARMUP)

    async def run() -> None:
        reconnect = asyncio.Event()
        server = ScriptedServer(lasting(1), telling(warmup, 3))
        hold = server.connect

        async def connect() -> Stream:
            if server.connections == 1:
                await reconnect.wait()
            return await hold()

        client = RemoteCoordinator(connect, KEY, "dummy", backoff=AT_ONCE)
        await client.join()
        while client.connected:
            await asyncio.sleep(0.001)
        await client.warmup_witness(READY)
        reconnect.set()
        while len(server.messages) < 3:
            await asyncio.sleep(0.001)
        await client.close()
        await server.stop()
        assert [type(message) for message in server.messages] == [Join, Join, WitnessMessage]

    asyncio.run(run())


def kinds_heard_after_a_report_whose_link_broke(state: Coordinator, messages: int) -> list[type]:
    """The report reaches a server that forgets it with the link; ``state`` is what the next link begins with."""
    warmup = replace(dummy_run(), run_state=RunState.WARMUP)

    async def run() -> list[type]:
        heard: list[object] = []

        async def forgetful(server: ScriptedServer, stream: Stream) -> None:
            link = await server.welcome(stream)
            await server.listen(stream, link, 1)
            for _ in range(2):
                await stream.write(state_frame(warmup))
            await server.listen(stream, link, 2)

        server = ScriptedServer(forgetful, telling(state, messages))
        client = RemoteCoordinator(server.connect, KEY, "dummy", backoff=AT_ONCE)
        await client.join()
        await client.warmup_witness(READY)
        while len(server.messages) < 3 or not client.connected:
            await asyncio.sleep(0.001)
        await client.send(CheckpointMessage(Hub(HubRepo("org/last"))))
        while not isinstance(server.messages[-1], CheckpointMessage):
            await asyncio.sleep(0.001)
        heard += server.messages[2:]
        await client.close()
        await server.stop()
        return [type(message) for message in heard]

    return asyncio.run(run())


def test_a_report_that_was_lost_with_its_link_is_sent_with_the_next() -> None:
    warmup = replace(dummy_run(), run_state=RunState.WARMUP)
    heard = kinds_heard_after_a_report_whose_link_broke(warmup, 5)
    assert heard == [Join, WitnessMessage, CheckpointMessage]


def test_a_report_that_the_coordinator_holds_is_not_sent_again() -> None:
    warmup = replace(dummy_run(), run_state=RunState.WARMUP)
    held = with_round(warmup, replace(warmup.current_round, witnesses=(READY,)))
    assert kinds_heard_after_a_report_whose_link_broke(held, 4) == [Join, CheckpointMessage]


def test_a_report_on_what_is_over_is_not_sent_again() -> None:
    for run_state in (RunState.ROUND_TRAIN, RunState.WAITING_FOR_MEMBERS):
        over = replace(dummy_run(), run_state=run_state)
        heard = kinds_heard_after_a_report_whose_link_broke(over, 4)
        assert WitnessMessage not in heard


def test_messages_without_a_link_are_kept_up_to_a_limit() -> None:
    async def run() -> None:
        server = ScriptedServer(lasting(1))
        first = server.connect

        async def connect() -> Stream:
            if server.connections:
                await asyncio.Event().wait()
            return await first()

        client = RemoteCoordinator(connect, KEY, "dummy", backoff=AT_ONCE)
        await client.join()
        while client.connected:
            await asyncio.sleep(0.001)
        for number in range(MAX_UNSENT + 10):
            await client.send(CheckpointMessage(Hub(HubRepo(f"org/{number}"))))
        assert len(client._unsent) == MAX_UNSENT
        await client.close()
        await server.stop()

    asyncio.run(run())


def test_a_reader_that_is_busy_misses_the_oldest_states() -> None:
    async def run() -> int:
        feed = StateFeed()
        for place in range(MAX_UNREAD_STATES + 5):
            feed.put(replace(dummy_run(), pending_pause=bool(place % 2)))
        feed.end()
        return len([state async for state in feed.read()])

    assert asyncio.run(run()) == MAX_UNREAD_STATES


def test_a_server_that_repeats_itself_fills_nothing() -> None:
    async def run() -> int:
        feed = StateFeed()
        for _ in range(1000):
            feed.put(dummy_run())
        feed.end()
        return len([state async for state in feed.read()])

    assert asyncio.run(run()) == 1


@pytest.mark.parametrize("setting", ["timeout", "silence", "give_up_after"])
def test_a_duration_that_is_not_above_zero_is_refused(setting: str) -> None:
    settings: dict[str, Any] = {setting: 0.0}
    with pytest.raises(ConfigurationError, match=setting):
        RemoteCoordinator(tcp_connector("127.0.0.1", 1), KEY, "dummy", **settings)


def test_joining_twice_is_refused() -> None:
    async def run() -> None:
        server = ScriptedServer(lasting(1, None))
        client = client_of(server)
        await client.join()
        with pytest.raises(ConfigurationError, match="once"):
            await client.join()
        await client.close()
        await server.stop()

    asyncio.run(run())


def test_a_state_that_is_sent_again_is_not_decoded_again() -> None:
    codec = RememberingCodec.of(SERVER_TO_CLIENT)
    first, second = (SERVER_TO_CLIENT.encode(Else(CoordinatorMessage(dummy_run(name)))) for name in ("one", "two"))
    decoded = codec.decode(first)
    assert codec.decode(memoryview(first)) is decoded
    assert codec.decode(second).message.state.run_id == "two"
    with pytest.raises(ProtocolError):
        codec.decode(b"")
    with pytest.raises(ProtocolError):
        codec.decode(second + b"x")
    assert codec.decode(first) == decoded


def test_two_clients_with_one_key_are_told_of_it(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with MemoryArena() as arena:
            patient, hasty = (
                RemoteCoordinator(arena.connect, KEY, "dummy", backoff=backoff)
                for backoff in (BackoffPolicy(first=0.2, longest=0.2), AT_ONCE)
            )
            await patient.join()
            await hasty.join()  # which ends the link of the other
            while "closed 3 links in a row" not in caplog.text:
                await asyncio.sleep(0.001)
            await patient.close()
            await hasty.close()

    asyncio.run(run())
    assert "another process is in the run with the same secret key: give each process a key of its own" in caplog.text
