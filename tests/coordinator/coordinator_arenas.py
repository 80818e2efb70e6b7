"""Runs for the contract of coordinator clients: embedded, hosted in their process, or served over a stream."""

from __future__ import annotations

import asyncio
import os

from typing_extensions import override

from distro_optim.comm.backoff import BackoffPolicy
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.streams import IrohListener, open_iroh
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.streams import MemoryListener, StreamListener, TcpListener
from distro_optim.comm.tickets import EndpointTicket
from distro_optim.coordinator.client.connection import Connector, tcp_connector
from distro_optim.coordinator.client.interface import CoordinatorClient
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.server.embedded import EmbeddedCoordinator
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.server import CoordinatorServer
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.types import Coordinator, NodeIdentity
from distro_optim.testing.coordinator import Arena, dummy_run

TICK_SECONDS = 0.01


def key(number: int) -> SecretKey:
    return SecretKey(number.to_bytes(32, "little"))


class EmbeddedArena(Arena):
    def __init__(self) -> None:
        self.now = 0
        self.coordinator = EmbeddedCoordinator(RunHost(dummy_run()), clock=lambda: self.now)

    async def __aenter__(self) -> EmbeddedArena:
        return self  # nothing ticks in the background

    async def __aexit__(self, *_: object) -> None:
        pass

    @override
    def client(self, number: int, run_id: str | None = None) -> CoordinatorClient:
        return self.coordinator.client(NodeIdentity.from_single_key(key(number).public), run_id or self.state.run_id)

    @override
    async def advance(self, seconds: int) -> None:
        self.now += seconds
        self.coordinator.tick()

    @property
    @override
    def state(self) -> Coordinator:
        return self.coordinator.state


class ClockedService(CoordinatorService):
    """Lives in seconds that a test counts, while connections live in real ones."""

    def __init__(self, host: RunHost) -> None:
        super().__init__(host, draw=os.urandom, unix_offset=0.0)
        self.seconds = 0
        self.ticks = 0

    @override
    def unix_seconds(self, now: float) -> float:
        return self.seconds

    @override
    def tick(self, now: float) -> None:
        super().tick(now)
        self.ticks += 1

    async def advance(self, seconds: int) -> None:
        self.seconds += seconds
        seen = self.ticks
        while self.ticks == seen:
            await asyncio.sleep(TICK_SECONDS)


class ServedArena(Arena):
    """A server on some kind of stream."""

    def __init__(self, state: Coordinator | None = None) -> None:
        self.service = ClockedService(RunHost(state or dummy_run()))

    async def listen(self) -> tuple[StreamListener, Connector]:
        raise NotImplementedError

    async def __aenter__(self) -> ServedArena:
        listener, self.connect = await self.listen()
        self.server = CoordinatorServer(self.service, [listener], tick_seconds=TICK_SECONDS)
        await self.server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()

    @override
    def client(self, number: int, run_id: str | None = None) -> CoordinatorClient:
        return RemoteCoordinator(
            self.connect, key(number), run_id or self.state.run_id, backoff=BackoffPolicy(first=0.01)
        )

    @override
    async def advance(self, seconds: int) -> None:
        await self.service.advance(seconds)

    @property
    @override
    def state(self) -> Coordinator:
        return self.service.host.state


class HostedArena(ServedArena):
    """All clients live in the server's own process; others could come over a listener in memory."""

    @override
    async def listen(self) -> tuple[StreamListener, Connector]:
        listener = MemoryListener()
        return listener, listener.connect

    @override
    def client(self, number: int, run_id: str | None = None) -> CoordinatorClient:
        return self.server.client(NodeIdentity.from_single_key(key(number).public), run_id or self.state.run_id)

    def remote_client(self, number: int) -> RemoteCoordinator:
        return RemoteCoordinator(self.connect, key(number), self.state.run_id, backoff=BackoffPolicy(first=0.01))


class TcpArena(ServedArena):
    @override
    async def listen(self) -> tuple[StreamListener, Connector]:
        listener = await TcpListener.bind("127.0.0.1", 0)
        host, _, port = listener.address.rpartition(":")
        return listener, tcp_connector(host, int(port))


class IrohArena(ServedArena):
    """One node for the server and one for all clients, who keep keys of their own; nothing leaves the machine."""

    @override
    async def listen(self) -> tuple[StreamListener, Connector]:
        self.nodes = [Node(bind_addr="127.0.0.1:0", relay="none").start() for _ in range(2)]
        listener = IrohListener(self.nodes[0])
        address = EndpointTicket.parse(listener.address).addr
        return listener, lambda: open_iroh(self.nodes[1], address)

    @override
    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        for node in self.nodes:
            node.close()


class MemoryArena(ServedArena):
    @override
    async def listen(self) -> tuple[StreamListener, Connector]:
        listener = MemoryListener()
        return listener, listener.connect
