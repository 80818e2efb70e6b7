"""Runs within one process: an embedded coordinator, a network in memory, and any number of runtimes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from typing_extensions import override

from distro_optim.comm.loop import LoopThread
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.model import ConstantLR
from distro_optim.coordinator.server.embedded import EmbeddedCoordinator
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.types import Coordinator
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.network.link import RunLink, RunSource
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.testing.model_exchange import MemoryModels
from distro_optim.testing.swarm import MemoryNetwork
from rounds.simulator import LR, secret
from runtime.hurry import HurriedThread
from runtime.training import SECONDS, TrainingThread

RUN_ID = "memory"
CONFIG = RunConfig(
    run_id=RUN_ID, total_steps=30, global_batch_size=8, epoch_time=60, max_round_train_time=5, warmup_time=20
)


class MemoryRun:
    """The run, its coordinator and its network, on one loop in a thread.

    Args:
        network: makes the network.
        hurried: the clock jumps ahead while all wait (:mod:`runtime.hurry`). Not for threads other than those of
            :class:`~runtime.training.TrainingThread`, nor for what a test does after some real time.
        config: replaces settings of ``CONFIG``.
    """

    def __init__(
        self, network: Callable[[], MemoryNetwork] = MemoryNetwork, *, hurried: bool = False, **config: Any
    ) -> None:
        self.config = replace(CONFIG, lr_schedule=ConstantLR(LR, LR, 0), **config)
        self.loop = HurriedThread("memory-run") if hurried else LoopThread("memory-run")
        self.room: dict[bytes, SharedModel] = {}
        self.peers: list[TrainingThread] = []
        self._new_network = network

    async def _begin(self) -> None:
        self.network = self._new_network()
        state = self.first_state()
        host = RunHost(state, joiner_wait_time=self.config.joiner_wait_time)
        loop = asyncio.get_running_loop()
        offset = time.time() - loop.time()
        self.coordinator = EmbeddedCoordinator(host, clock=lambda: loop.time() + offset, tick_seconds=0.05)
        await self.coordinator.__aenter__()

    def first_state(self) -> Coordinator:
        return self.config.coordinator_state(RUN_ID)

    async def _end(self) -> None:
        await self.coordinator.__aexit__()

    def __enter__(self) -> Self:
        self.loop.run(self._begin(), SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers:
            peer.close()
        self.loop.run(self._end(), SECONDS)
        self.loop.stop()

    @property
    def state(self) -> Coordinator:
        return self.coordinator.state

    def peer(self, number: int, **options: Any) -> TrainingThread:
        """A participant, started."""
        port = Runtime(MemorySource(self, secret(number)), loop=self.loop)
        peer = TrainingThread(port, **options)
        self.peers.append(peer)
        return peer.start()

    def on_loop(self, what: Callable[[], object]) -> None:
        async def do() -> None:
            what()

        self.loop.run(do(), SECONDS)


class MemorySource(RunSource):
    is_host = False

    def __init__(self, run: MemoryRun, key: SecretKey) -> None:
        self.run = run
        self.key = key
        self.run_id = RUN_ID

    @override
    async def open(self) -> RunLink:
        swarm = self.run.network.join(secret_key=self.key)
        client = self.run.coordinator.client(self.identity, RUN_ID)
        await client.join()

        async def aclose() -> None:
            await client.close()
            await swarm.aclose()

        return RunLink(
            coordinator=client,
            swarm=swarm,
            models=MemoryModels(swarm.peer_id, self.run.room),
            ticket=None,
            aclose=aclose,
        )
