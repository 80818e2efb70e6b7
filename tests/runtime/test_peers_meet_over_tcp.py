"""A server that is reached by TCP alone tells its clients where the others are, so that they find each other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

import pytest

from coordinator.coordinator_swarm import Swarm, key
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.framing import ClientLink
from distro_optim.comm.iroh.meeting_place import TcpQuestion
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.serving.connection import Connection
from distro_optim.comm.streams import TcpListener
from distro_optim.coordinator.messages import CLIENT_TO_SERVER, SERVER_TO_CLIENT
from distro_optim.coordinator.server.host import RunHost, restartable
from distro_optim.coordinator.server.server import CoordinatorServer, unix_offset
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.errors import ProtocolError
from distro_optim.strategy.rounds import actions as act
from runtime.live import config, live_run
from runtime.training import SECONDS, assert_equal_weights

PLACE = SocketAddr.parse("192.168.1.9:4433")


def ask(swarm: Swarm, number: int, *, about: int | None = None) -> tuple[Connection, TcpQuestion]:
    """One question over a connection of its own."""
    connection = swarm.service.connect(f"10.0.0.{number}:5000", swarm.now)
    address = EndpointAddr(key(about or number).public, (), (PLACE,))
    question = TcpQuestion(key(number), address)
    while (data := connection.next_frame()) is not None:
        swarm.service.receive(connection, question.receive(data), swarm.now)
    return connection, question


def test_members_hear_of_each_other_and_stay_clients() -> None:
    swarm = Swarm()
    peers = swarm.join(1, 2)
    connection, question = ask(swarm, 1)
    assert question.answer == []
    assert not swarm.service.has(connection)
    _, question = ask(swarm, 2)
    assert question.answer == [EndpointAddr(key(1).public, (), (PLACE,))]
    assert all(peer.connected for peer in peers)


@pytest.mark.parametrize(("number", "about"), [(3, 3), (1, 2)])
def test_strangers_and_those_who_speak_for_others_hear_nothing(number: int, about: int) -> None:
    swarm = Swarm()
    swarm.join(1, 2)
    ask(swarm, 2)
    connection, question = ask(swarm, number, about=about)
    assert question.answer is None
    assert not swarm.service.has(connection)
    assert not ask(swarm, 2)[1].answer


def test_a_client_of_the_coordinator_is_no_answer_to_a_question() -> None:
    question = TcpQuestion(key(1), EndpointAddr(key(1).public))
    with pytest.raises(ProtocolError):
        question.receive(b"\0\0\0\1\1")
    link = ClientLink(key(1), SERVER_TO_CLIENT, CLIENT_TO_SERVER)
    with pytest.raises(ProtocolError):
        link.receive(b"\0\0\0\1\1")


@contextmanager
def tcp_server(run_id: str) -> Iterator[str]:
    """``distro-optim serve`` without iroh; gives host:port/run-id."""
    loop, stack = LoopThread("tcp server"), AsyncExitStack()

    async def begin() -> str:
        offset = unix_offset()
        state = config(min_peers=2, total_steps=8).coordinator_state(run_id)
        host = RunHost(restartable(state, now=int(time.monotonic() + offset)))
        listener = await TcpListener.bind("127.0.0.1", 0)
        service = CoordinatorService(host, draw=os.urandom, unix_offset=offset)
        await stack.enter_async_context(CoordinatorServer(service, [listener]))
        return f"{listener.address}/{run_id}"

    try:
        yield loop.run(begin(), SECONDS)
    finally:
        with suppress(TimeoutError):
            loop.run(stack.aclose(), SECONDS)
        loop.stop()


@pytest.mark.waiting
@pytest.mark.slow
def test_two_clients_of_a_server_that_is_reached_over_tcp_train_together() -> None:
    with tcp_server("over-tcp") as address, live_run() as run:
        peers = [run.join(address) for _ in range(2)]
        for peer in peers:
            peer.join()
            assert peer.error is None
        assert all(len(action.updates) == 2 for peer in peers for action in peer.of(act.ApplyResults)[:-1])
        assert_equal_weights(*peers)
