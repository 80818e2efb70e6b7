"""Runs over real endpoints on loopback."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.rendezvous import Rendezvous
from distro_optim.comm.iroh.streams import IrohListener
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.streams import TcpListener
from distro_optim.coordinator.model import ConstantLR
from distro_optim.coordinator.server.host import RunHost, restartable
from distro_optim.coordinator.server.server import CoordinatorServer, unix_offset
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.ticket import RunTicket
from distro_optim.coordinator.types import Coordinator
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.network.runtime import Runtime
from rounds.simulator import LR
from runtime.training import SECONDS, TrainingThread

LOOPBACK: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0"}


def config(**settings: Any) -> RunConfig:
    defaults: dict[str, Any] = {
        "total_steps": 40,
        "global_batch_size": 8,
        "epoch_time": 100,
        "warmup_time": 30,
        "max_round_train_time": 20,
        "lr_schedule": ConstantLR(LR, LR, 0),
    }
    return RunConfig(**{**defaults, **settings})


@contextmanager
def live_run() -> Iterator[LiveRun]:
    run = LiveRun()
    try:
        yield run
    finally:
        for peer in reversed(run.peers):  # the host last
            peer.close()


class LiveRun:
    """The peers of one run, the host first."""

    def __init__(self) -> None:
        self.peers: list[TrainingThread] = []

    def host(self, settings: RunConfig | None = None, *, step_seconds: float = 0.0, **options: Any) -> TrainingThread:
        settings = settings if settings is not None else config()
        return self._add(Runtime.connect(config=settings, **{**LOOPBACK, **options}), step_seconds)

    def join(self, run: str | None = None, *, step_seconds: float = 0.0, **options: Any) -> TrainingThread:
        run = run if run is not None else self.peers[0].port.ticket
        return self._add(Runtime.connect(run, **{**LOOPBACK, **options}), step_seconds)

    def _add(self, port: Runtime, step_seconds: float) -> TrainingThread:
        peer = TrainingThread(port, step_seconds=step_seconds)
        self.peers.append(peer)
        return peer.start()


@contextmanager
def served_run(
    settings: RunConfig, run_id: str, state: Coordinator | None = None, *, tcp_only: bool = False
) -> Iterator[str]:
    """A coordinator that is not a peer; gives its ticket, or ``host:port/run-id`` if it listens to TCP alone.

    It begins with ``state``, if that is given.
    """
    loop = LoopThread("served")
    stack = AsyncExitStack()

    async def begin() -> str:
        offset = unix_offset()
        begins = state if state is not None else settings.coordinator_state(run_id)
        host = RunHost(restartable(begins, now=int(time.monotonic() + offset)))
        service = CoordinatorService(host, draw=os.urandom, unix_offset=offset)
        if tcp_only:
            listener = await TcpListener.bind("127.0.0.1", 0)
            await stack.enter_async_context(CoordinatorServer(service, [listener]))
            return f"{listener.address}/{run_id}"
        node = Node(loop=loop, **LOOPBACK)
        await node.bind()
        stack.push_async_callback(node.aclose)
        await stack.enter_async_context(CoordinatorServer(service, [IrohListener(node)]))
        Rendezvous(node, host.is_pending)
        return str(RunTicket(run_id, (), node.addr()))

    try:
        yield loop.run(begin(), SECONDS)
    finally:
        loop.run(stack.aclose(), SECONDS)
        loop.stop()
