"""A coordinator service and its clients in one process, without sockets: bytes move when the test says so."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

from distro_optim.comm.framing import ClientLink, Else, LinkState, SecretKey, encode_frame
from distro_optim.comm.serving.connection import Connection
from distro_optim.comm.serving.limits import ServerLimits
from distro_optim.coordinator.messages import (
    CLIENT_TO_SERVER,
    SERVER_TO_CLIENT,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.model import P2P, HubRepo
from distro_optim.coordinator.server.host import Refused, RunHost
from distro_optim.coordinator.server.service import CoordinatorService, Disconnected
from distro_optim.coordinator.types import Coordinator, NodeIdentity, RunState, WitnessMetadata
from runs import elected, ready, report, waiting_run

RUN = "run"
UNIX_START = 1_000_000
WORK_SECONDS = 2
METADATA = WitnessMetadata(1, 100.0, 0.0, 2.5, (), (), 0, 0.5)


def key(number: int) -> SecretKey:
    return SecretKey(number.to_bytes(32, "big"))


def frame(message: Any) -> bytes:
    return encode_frame(CLIENT_TO_SERVER.encode(Else(message)))


class Peer:
    """A client: its link, its connection on the server's side, and the last state it read."""

    def __init__(self, swarm: Swarm, number: int, address: str) -> None:
        self.swarm = swarm
        self.key = key(number)
        self.identity = NodeIdentity.from_single_key(self.key.public)
        self.link = ClientLink(self.key, SERVER_TO_CLIENT, CLIENT_TO_SERVER)
        self.state: Coordinator | None = None
        self.states_read = 0
        self.connection: Connection = swarm.service.connect(address, swarm.now)

    @property
    def connected(self) -> bool:
        return self.swarm.service.has(self.connection)

    def read(self) -> None:
        """Takes all that the server has for us, and answers a challenge."""
        while (data := self.connection.next_frame()) is not None:
            self.connection.sent(self.swarm.now)
            if self.link.state is LinkState.OPEN:
                self.state = self.swarm.read_state(self.link, data)
                self.states_read += 1
            else:
                self.link.receive(data)
                self.send(self.link.data_to_send())

    def send(self, data: bytes) -> None:
        self.swarm.service.receive(self.connection, data, self.swarm.now)

    def say(self, message: Any) -> None:
        self.send(frame(message))

    def join(self) -> Peer:
        self.read()
        self.say(Join(RUN))
        return self

    def leave(self) -> None:
        self.swarm.service.disconnect(self.connection)

    def act(self) -> None:
        """What an honest client says to the state it sees, after some seconds of work."""
        state = self.state
        if state is None or self.swarm.unix_time() < state.run_state_start_unix_timestamp + WORK_SECONDS:
            return
        members = [member.id for member in state.epoch_state.clients]
        if self.identity not in members:
            return
        if state.run_state is RunState.WARMUP:
            self.say(WitnessMessage(WarmupStep(ready(members.index(self.identity)))))
        if state.run_state is RunState.ROUND_TRAIN:
            for identity, proof in elected(state):
                if identity == self.identity:
                    self.say(WitnessMessage(WitnessStep(report(proof, members), METADATA)))


class Swarm:
    """The service, its clock, and who is connected. Random numbers come from a seed."""

    def __init__(
        self, *, seed: int = 1, limits: ServerLimits | None = None, allowed: list[bytes] | None = None, **config: Any
    ) -> None:
        self.now = 50.0
        state = waiting_run(RUN, P2P(HubRepo("org/model")), **config)
        state = replace(state, run_state_start_unix_timestamp=UNIX_START)
        self.service = CoordinatorService(
            RunHost(state, allowed=allowed),
            draw=random.Random(seed).randbytes,
            unix_offset=UNIX_START - self.now,
            limits=limits,
        )
        self.peers: list[Peer] = []
        self.reasons: list[str] = []
        self.refusals: Counter[NodeIdentity] = Counter()
        self._decoded: tuple[bytes, Coordinator] | None = None

    @property
    def state(self) -> Coordinator:
        return self.service.host.state

    def unix_time(self) -> int:
        return self.service.unix_time(self.now)

    def read_state(self, link: ClientLink, data: bytes) -> Coordinator:
        """What a frame says. All clients get the same one, so it is decoded once."""
        if self._decoded is None or self._decoded[0] != data:
            (message,) = link.receive(data)
            self._decoded = (data, message.state)
        return self._decoded[1]

    def connect(self, number: int, address: str | None = None) -> Peer:
        peer = Peer(self, number, address or f"10.0.0.{number % 250}:4000")
        self.peers.append(peer)
        return peer

    def join(self, *numbers: int) -> list[Peer]:
        return [self.connect(number).join() for number in numbers]

    def second(self, *, acting: list[Peer] | None = None) -> None:
        """One second: two ticks."""
        for _ in range(2):
            self.tick(acting=acting)

    def tick(self, *, acting: list[Peer] | None = None) -> None:
        """Half a second; the honest read and act after it."""
        self.now += 0.5
        self.service.tick(self.now)
        for peer in self.peers if acting is None else acting:
            if peer.connected:
                peer.read()
                peer.act()
        self.collect()

    def seconds(self, count: int, *, acting: list[Peer] | None = None) -> None:
        for _ in range(count):
            self.second(acting=acting)

    def until(self, run_state: RunState, *, acting: list[Peer] | None = None) -> None:
        for _ in range(1000):
            if self.state.run_state is run_state:
                return
            self.second(acting=acting)
        raise AssertionError(f"{run_state} was never reached")

    def collect(self) -> None:
        """Notes why connections ended, and how often each client was refused something."""
        for event in self.service.take_output().events:
            if isinstance(event, Refused):
                self.refusals[event.client] += 1
            if isinstance(event, Disconnected):
                self.reasons.append(event.reason)
