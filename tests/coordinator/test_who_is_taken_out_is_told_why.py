"""A client that was banned, kicked, failed by auditors or refused hears the reason, over every kind of stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.comm.framing import Challenge, encode_frame, server_envelope
from distro_optim.comm.postcard import Bytes32, encode
from distro_optim.comm.question import Question
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.streams import MemoryListener, Stream
from distro_optim.coordinator.client import opening
from distro_optim.coordinator.client.connection import Connection
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.types import Coordinator
from distro_optim.coordinator.why_closed import MAX_KEPT, MAX_REASON, WHY_CLOSED, Reasons, WhyClosed, ask_why
from distro_optim.errors import JoinRefusedError, ProtocolError

from .coordinator_arenas import IrohArena, MemoryArena, ServedArena, TcpArena, key

pytestmark = pytest.mark.waiting

SECONDS = 30.0
AT_ONCE = BackoffPolicy(first=0.001, longest=0.001)


def client_of(arena: ServedArena, number: int = 1) -> RemoteCoordinator:
    return RemoteCoordinator(arena.connect, key(number), arena.state.run_id, backoff=AT_ONCE, name="home")


def act(arena: ServedArena, does: Callable[[float], object]) -> None:
    """Does something to the run, as its operator and its auditors do."""
    does(asyncio.get_running_loop().time())


async def until_it_fails(client: RemoteCoordinator) -> JoinRefusedError:
    with pytest.raises(JoinRefusedError) as raised:
        async for _ in client.states():
            pass
    return raised.value


def in_arena(kind: type[ServedArena], work: Callable[[ServedArena], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(SECONDS), kind() as arena:
            await work(arena)

    asyncio.run(run())


@pytest.mark.parametrize("kind", [TcpArena, IrohArena, MemoryArena])
def test_one_that_is_banned_ends_with_the_reason(kind: type[ServedArena]) -> None:
    async def work(arena: ServedArena) -> None:
        client = client_of(arena)
        await client.join()
        act(arena, lambda now: arena.service.ban(key(1).public, now))
        error = await until_it_fails(client)
        assert str(error) == (
            f"home has turned this peer away, whose key is {key(1).public.hex()}: the operator banned it"
        )
        await client.close()

    in_arena(kind, work)


def test_one_that_fails_its_audits_ends_with_the_reason() -> None:
    async def work(arena: ServedArena) -> None:
        client = client_of(arena)
        await client.join()
        act(arena, lambda now: arena.service.audited(key(1).public, now, passed=False))
        assert "auditors found that it does not train what it is given" in str(await until_it_fails(client))
        await client.close()

    in_arena(TcpArena, work)


def test_one_that_is_kicked_comes_again_and_is_told_why_it_was_out() -> None:
    async def work(arena: ServedArena) -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        client = client_of(arena)
        client.on_told = told.put_nowait
        await client.join()
        act(arena, lambda now: arena.service.kick(key(1).public, now))
        assert await told.get() == (
            "home had taken this peer out of the run: the operator took it out of the run; it has joined again"
        )
        assert client.connected or client.state is not None
        assert key(1).public in {one.p2p_identity for one in arena.service.host.pending}
        await client.close()

    in_arena(TcpArena, work)


def test_one_that_is_closed_while_it_asks_why_leaves_no_link() -> None:
    async def work(arena: ServedArena) -> None:
        links, asks = 0, asyncio.Event()

        async def connect() -> Stream:
            nonlocal links
            links += 1
            if links == 3:  # the first, that in its place, and the question
                asks.set()
                await asyncio.Event().wait()
            return await arena.connect()

        client = RemoteCoordinator(connect, key(1), arena.state.run_id, backoff=AT_ONCE, name="home")
        await client.join()
        act(arena, lambda now: arena.service.kick(key(1).public, now))
        await asks.wait()
        await client.close()
        while arena.service.num_connections:
            await asyncio.sleep(0.001)

    in_arena(MemoryArena, work)


def test_a_link_that_comes_while_its_client_closes_is_closed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(arena: ServedArena) -> None:
        closing: list[asyncio.Task[None]] = []
        client = client_of(arena)
        await client.join()
        before = client._opening.open

        async def opened_as_it_closes() -> tuple[Connection, Coordinator]:
            opened = await before()
            closing.append(asyncio.ensure_future(client.close()))
            return opened

        monkeypatch.setattr(client._opening, "open", opened_as_it_closes)
        client.redirect()
        while not closing:
            await asyncio.sleep(0.001)
        await closing[0]
        while arena.service.num_connections:
            await asyncio.sleep(0.001)

    in_arena(MemoryArena, work)


def test_one_that_is_redirected_while_it_asks_why_follows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "WHY_SECONDS", 2 * SECONDS)

    async def work(arena: ServedArena) -> None:
        links, asks, follows = 0, asyncio.Event(), asyncio.Event()

        async def connect() -> Stream:
            nonlocal links
            links += 1
            if links == 3:  # the question, to a coordinator that is gone
                asks.set()
                await asyncio.Event().wait()
            if links == 4:
                follows.set()
            return await arena.connect()

        client = RemoteCoordinator(connect, key(1), arena.state.run_id, backoff=AT_ONCE, name="home")
        await client.join()
        act(arena, lambda now: arena.service.kick(key(1).public, now))
        await asks.wait()
        client.redirect("the new host")
        await follows.wait()
        while not client.connected:
            await asyncio.sleep(0.001)
        await client.close()

    in_arena(MemoryArena, work)


def test_one_whose_key_is_not_on_the_list_is_told_so_when_it_comes() -> None:
    async def work(arena: ServedArena) -> None:
        act(arena, lambda now: arena.service.let_in([key(2).public], now))
        with pytest.raises(JoinRefusedError, match="the key is not on the list of this run"):
            await client_of(arena).join()
        with pytest.raises(JoinRefusedError, match="the key is not on the list of this run"):
            await client_of(arena).look()
        other = client_of(arena, 2)
        await other.look()
        act(arena, lambda now: arena.service.ban(key(2).public, now, "too loud"))
        with pytest.raises(JoinRefusedError, match="too loud"):
            await other.join()
        await other.close()

    in_arena(MemoryArena, work)


def test_a_coordinator_of_psyche_is_not_asked() -> None:
    async def run() -> None:
        async with asyncio.timeout(SECONDS):
            arena, dials = MemoryArena(), 0
            arena.service._sends_changes = False
            async with arena:
                act(arena, lambda now: arena.service.ban(key(1).public, now))

                async def connect() -> Stream:
                    nonlocal dials
                    dials += 1
                    return await arena.connect()

                with pytest.raises(JoinRefusedError, match="is not on its list"):
                    await RemoteCoordinator(connect, key(1), arena.state.run_id).join()
            assert dials == 1

    asyncio.run(run())


def test_a_reason_is_told_once_to_those_who_may_come_again_and_their_number_is_bounded() -> None:
    reasons = Reasons()
    reasons.note(b"a", "one\x1b[31m\n" + "x" * 1000)
    first = reasons.answer(b"a", is_allowed=True, is_banned=False)
    assert first.may_return
    assert first.reason.startswith("one?[31m?x")
    assert len(first.reason) == MAX_REASON
    assert reasons.answer(b"a", is_allowed=True, is_banned=False) == WhyClosed("", True)
    assert reasons.answer(b"b", is_allowed=False, is_banned=True) == WhyClosed("the key is banned", False)
    for number in range(MAX_KEPT + 1):
        reasons.note(number.to_bytes(4, "little"), "why")
    assert reasons.answer(bytes(4), is_allowed=True, is_banned=False).reason == ""
    assert len(reasons._reasons) == MAX_KEPT


def test_what_a_coordinator_says_is_cut_and_made_printable() -> None:
    async def answered(payload: bytes) -> WhyClosed | None:
        listener = MemoryListener()
        ours = await listener.connect()
        theirs = await listener.accept()
        challenge = server_envelope(Bytes32).encode(Challenge(bytes(32)))
        await theirs.write(encode_frame(challenge))
        await theirs.write(encode_frame(payload))
        try:
            return await ask_why(ours, key(1))
        finally:
            await theirs.close()

    async def run() -> None:
        said = await answered(encode(WhyClosed("a\u202eb\n" + "c" * 700, False)))
        assert said is not None
        assert said.reason.startswith("a?b?ccc")
        assert len(said.reason) == MAX_REASON
        assert await answered(encode(WhyClosed("", False))) is None
        for payload in (b"\x84\x07" + b"c" * 900 + b"\0", b"", b"\xff" * 20):
            with pytest.raises(ProtocolError):
                await answered(payload)

    asyncio.run(run())


@given(st.binary(max_size=200))
def test_whatever_comes_is_an_answer_or_an_error(data: bytes) -> None:
    question: Question[WhyClosed] = Question(SecretKey(bytes(32)), WHY_CLOSED, WhyClosed, 1000)
    try:
        question.receive(data)
    except ProtocolError:
        pass


def test_a_server_that_was_started_again_knows_of_no_reasons() -> None:
    async def work(arena: ServedArena) -> None:
        assert await ask_why(await arena.connect(), key(5)) is None

    in_arena(MemoryArena, work)
