"""The rendezvous tells members where the others are, believes nobody about another, and holds no more than it must."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from distro_optim.comm.addresses import MAX_ADDRESSES, EndpointAddr, SocketAddr
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.meeting_place import MAX_MEMBERS, MAX_PLACES, MeetingPlace
from distro_optim.comm.iroh.rendezvous import RENDEZVOUS_ALPN, Rendezvous, ask_rendezvous
from distro_optim.comm.loop import LoopThread
from distro_optim.errors import ExchangeError, PeerRefusedError, ProtocolError

pytestmark = [pytest.mark.waiting]
SECONDS = 30.0


def peer(number: int) -> bytes:
    return number.to_bytes(32, "big")


def at(number: int, *ports: int) -> EndpointAddr:
    return EndpointAddr(peer(number), direct=tuple(SocketAddr.parse(f"192.0.2.1:{port}") for port in ports))


def test_each_member_hears_where_those_before_are() -> None:
    place = MeetingPlace(lambda _: True)
    assert place.visit(peer(1), at(1, 1000)) == []
    assert place.visit(peer(2), at(2, 2000)) == [at(1, 1000)]
    assert place.visit(peer(1), at(1, 1001)) == [at(2, 2000)]
    assert place.visit(peer(3), at(3, 3000)) == [at(2, 2000), at(1, 1001)]


def test_nobody_speaks_for_another() -> None:
    place = MeetingPlace(lambda _: True)
    with pytest.raises(ProtocolError):
        place.visit(peer(1), at(2, 2000))
    assert place.visit(peer(3), at(3, 3000)) == []


def test_who_is_no_member_is_told_nothing_and_who_leaves_is_forgotten() -> None:
    members = {peer(1), peer(2)}
    place = MeetingPlace(members.__contains__)
    place.visit(peer(1), at(1, 1000))
    with pytest.raises(PeerRefusedError):
        place.visit(peer(3), at(3, 3000))
    members.remove(peer(1))
    assert place.visit(peer(2), at(2, 2000)) == []


def test_a_member_that_tells_of_many_addresses_has_few_kept_and_none_that_cannot_be_dialled() -> None:
    place = MeetingPlace(lambda _: True)
    place.visit(peer(1), at(1, *range(MAX_ADDRESSES)))
    (known,) = place.visit(peer(2), at(2, 2000))
    assert len(known.direct) == MAX_PLACES
    assert all(address.port for address in known.direct)


def test_a_crowd_displaces_the_oldest() -> None:
    place = MeetingPlace(lambda _: True)
    for number in range(1, MAX_MEMBERS + 100):
        others = place.visit(peer(number), at(number, 1000))
        assert len(others) < MAX_MEMBERS


def on_loop(work: Coroutine[Any, Any, None], loop: LoopThread) -> None:
    try:
        loop.run(work, SECONDS)
    finally:
        loop.stop()


def test_over_the_network_strangers_to_an_allow_list_are_answered_and_outsiders_are_not() -> None:
    loop = LoopThread("test-rendezvous")

    async def work() -> None:
        members: set[bytes] = set()
        nodes = [Node(bind_addr="127.0.0.1:0", relay="none", loop=loop) for _ in range(3)]
        host, alice, outsider = nodes
        for node in nodes:
            await node.bind()
        host.set_allowed([])
        alice.set_allowed([])
        Rendezvous(host, members.__contains__).close()
        rendezvous = Rendezvous(host, members.__contains__)
        members.update((alice.endpoint_id, host.endpoint_id))
        rendezvous.visit(host.addr())
        assert await ask_rendezvous(alice, host.addr()) == [host.addr()]
        assert rendezvous.visit(host.addr()) == [alice.addr()]
        with pytest.raises((ExchangeError, ProtocolError)):  # cut off before, or in the middle of, an answer
            await ask_rendezvous(outsider, host.addr())
        for node in nodes:
            await node.aclose()

    on_loop(work(), loop)


@pytest.mark.parametrize("question", [b"", b"\xff" * 40, bytes(32), bytes(20_000)])
def test_a_question_that_is_none_ends_its_own_connection_only(question: bytes) -> None:
    loop = LoopThread("test-rendezvous")

    async def work() -> None:
        host, rude = (Node(bind_addr="127.0.0.1:0", relay="none", loop=loop) for _ in range(2))
        await host.bind()
        Rendezvous(host, lambda _: True)
        connection = await rude.connect(host.addr(), RENDEZVOUS_ALPN)
        send, recv = await connection.open_bi()
        await send.write(question)
        await send.finish()
        async with asyncio.timeout(SECONDS):
            try:
                assert await recv.read_to_end(100) == b""
            except ExchangeError:
                pass
            await connection.closed()
        assert await ask_rendezvous(rude, host.addr()) == []
        for node in (host, rude):
            await node.aclose()

    on_loop(work(), loop)
