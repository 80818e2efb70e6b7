"""Streams over iroh keep the contract of streams, and a coordinator is served on them."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from typing_extensions import override

from comm.stream_contract import StreamContract, run
from coordinator.coordinator_swarm import RUN, frame, key
from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.framing import ClientLink
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.streams import COORDINATOR_ALPN, IrohListener, open_iroh
from distro_optim.comm.streams import Stream, StreamListener
from distro_optim.comm.tickets import EndpointTicket
from distro_optim.coordinator.messages import CLIENT_TO_SERVER, SERVER_TO_CLIENT, Join
from distro_optim.coordinator.server.host import RunHost, restartable
from distro_optim.coordinator.server.server import CoordinatorServer
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.types import NodeIdentity
from runs import waiting_run

pytestmark = pytest.mark.waiting


def loopback_node() -> Node:
    return Node(bind_addr="127.0.0.1:0", relay="none").start()


def address_of(listener: StreamListener) -> EndpointAddr:
    return EndpointTicket.parse(listener.address).addr


class TestIroh(StreamContract):
    nodes: list[Node]

    def setup_method(self) -> None:
        self.nodes = []

    def teardown_method(self) -> None:
        for node in self.nodes:
            node.close()

    @override
    async def listen(self) -> StreamListener:
        self.nodes.append(loopback_node())
        return IrohListener(self.nodes[-1], b"test/0")

    @override
    async def dial(self, listener: StreamListener) -> Stream:
        self.nodes.append(loopback_node())
        return await open_iroh(self.nodes[-1], address_of(listener), b"test/0")


def test_a_coordinator_is_served_over_iroh() -> None:
    async def work() -> None:
        offset = time.time() - time.monotonic()
        host = RunHost(restartable(waiting_run(RUN), now=int(time.time())))
        service = CoordinatorService(host, draw=os.urandom, unix_offset=offset)
        with loopback_node() as server_node, loopback_node() as client_node:
            listener = IrohListener(server_node)
            async with CoordinatorServer(service, [listener], tick_seconds=0.02):
                stream = await open_iroh(client_node, address_of(listener))
                link = ClientLink(key(1), SERVER_TO_CLIENT, CLIENT_TO_SERVER)
                while not host.pending:
                    messages = link.receive(await stream.read())
                    if answer := link.data_to_send():
                        await stream.write(answer + frame(Join(RUN)))
                    assert all(message.state.run_id == RUN for message in messages)
                assert list(host.pending) == [NodeIdentity.from_single_key(key(1).public)]
                (session,) = service.clients.values()
                assert session.address == client_node.endpoint_id.hex()
                await stream.close()
                while host.pending:
                    await asyncio.sleep(0.01)

    run(work)


def test_nobody_there_is_a_connection_error() -> None:
    async def work() -> None:
        with loopback_node() as server_node, loopback_node() as client_node:
            listener = IrohListener(server_node)
            address = address_of(listener)
            with pytest.raises(ConnectionError):
                await open_iroh(client_node, address, b"another/0")
            await listener.close()
            with pytest.raises(ConnectionError):
                await open_iroh(client_node, address, COORDINATOR_ALPN)

    run(work)


def test_a_node_that_closes_ends_its_streams() -> None:
    async def read_on(stream: Stream) -> None:
        while await stream.read():
            pass

    async def work() -> None:
        with loopback_node() as server_node, loopback_node() as client_node:
            listener = IrohListener(server_node)
            near = await open_iroh(client_node, address_of(listener))
            far = await listener.accept()
            await asyncio.to_thread(client_node.close)
            with pytest.raises(ConnectionError):
                await near.write(b"x")
            with pytest.raises(ConnectionError):
                await read_on(far)
            await near.close()
            await far.close()
            await listener.close()

    run(work)
