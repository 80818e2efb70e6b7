"""A hosted run, message by message: each has a number, and a run can be repeated with one of them lost or late.

Links to the coordinator keep their order, as streams do, and the coordinator tells its state at every change and every
half second. Gossip and downloads keep none. Everything random comes from one seed, so that a run with a fault is the
same as the one without it up to the message that the fault is about.
"""

from __future__ import annotations

import enum
import random
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from distro_optim.comm.announcements import Announcement
from distro_optim.coordinator.messages import (
    ClientToServerMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
)
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.types import Coordinator, RunState
from distro_optim.coordinator.unconfirmed_report import UnconfirmedReport
from distro_optim.strategy.network.driver import FETCH_SECONDS, OWNER_SECONDS
from distro_optim.strategy.rounds import actions as act
from rounds.simulator import TICK, Member, World

TRAIN_SECONDS = 0.3
LOAD_SECONDS = 0.2
DELAY = (0.01, 0.06)
JOINER_WAIT_SECONDS = 2
RECONNECT_SECONDS = 1.0
MAX_ROUND_TRAIN_SECONDS = 60


class Kind(enum.Enum):
    """What a message is."""

    ANNOUNCE = "announcement"
    WEIGHTS = "report on weights"
    DOWNLOAD = "download"
    STATE = "state"
    REPORT = "report to the coordinator"
    READY = "readiness to the coordinator"
    CHECK = "health check"
    JOIN = "join"
    ANSWER = "answer of the trainer"


@dataclass(frozen=True)
class Message:
    """One of a run.

    Attributes:
        sender, receiver: numbers of members, in order of joining; -1 is the coordinator.
        step: at which the run was.
    """

    number: int
    kind: Kind
    sender: int
    receiver: int
    run_state: RunState
    step: int


@dataclass(frozen=True)
class Fault:
    """Message ``number`` is lost, or comes ``late`` seconds later."""

    number: int
    late: float | None = None


class Client(Member):
    """A member whose messages to the coordinator travel, and whose timer goes off when it is due."""

    world: FaultyWorld

    def __init__(self, world: FaultyWorld, number: int) -> None:
        self.fetched: set[bytes] = set()
        self.unconfirmed = UnconfirmedReport()
        self.seen: Coordinator | None = None
        super().__init__(world, number, train_seconds=TRAIN_SECONDS, load_seconds=LOAD_SECONDS)

    @override
    def tell(self, message: ClientToServerMessage) -> None:
        world = self.world
        match message:
            case Join():
                kind = Kind.JOIN
            case HealthCheckMessage():
                kind = Kind.CHECK
            case WitnessMessage(WarmupStep()):
                kind = Kind.READY
            case _:
                kind = Kind.REPORT
        if isinstance(message, WitnessMessage):
            assert self.seen is not None
            self.unconfirmed.sent(message, self.seen)
        world.send(kind, self, None, lambda: world.hear(self, message), self._come_back)

    @override
    def see(self, state: Coordinator) -> None:
        self.seen = state
        super().see(state)

    def _come_back(self) -> None:
        """The link broke, and what was on it is lost: the coordinator has not noticed when there is a new one."""

        def told() -> None:
            lost = self.unconfirmed.missing_in(self.world.state)
            if lost is not None:
                self.tell(lost)

        self.world.at(self.world.now + RECONNECT_SECONDS, told)

    @override
    def later(self, seconds: float, what: Callable[[], list[act.Action]]) -> None:
        self.world.send(Kind.ANSWER, self, self, lambda: self.do(what()), takes=seconds)

    @override
    def do(self, actions: list[act.Action]) -> None:
        super().do(actions)
        timer = self.rounds.next_timer()
        if timer is not None:
            self.world.at(timer, self.tick)


class FaultyWorld(World):
    """See the module."""

    def __init__(self, fault: Fault | None = None, *, joiner_wait_time: int | None = None, **config: int) -> None:
        settings: dict[str, Any] = {
            "round_witness_time": 0,
            "max_round_train_time": MAX_ROUND_TRAIN_SECONDS,
            "warmup_time": MAX_ROUND_TRAIN_SECONDS,
            "cooldown_time": 1,
            "waiting_for_members_extra_time": 1,
            "epoch_time": 600,
            "init_min_clients": 1,
            "min_clients": 1,
        } | config
        super().__init__(**settings)
        self.host = RunHost(self.state, joiner_wait_time=joiner_wait_time)
        self.fault = fault
        self.messages: list[Message] = []
        self.phases: list[tuple[RunState, int, float]] = []
        self._in_order: dict[tuple[int, int], float] = defaultdict(float)
        self._chance = random.Random(7)
        self.later(TICK, self._tick)

    def join(self, client: Client | None = None) -> Client:
        client = client or Client(self, len(self.members) + 1)
        self.tell_state(client)
        return client

    # -- the clock -------------------------------------------------------------------------------------------------

    def at(self, time: float, what: Callable[[], None]) -> None:
        self.later(max(0.0, time - self.now), what)

    @override
    def step(self) -> None:
        """One event."""
        self.now, what = self._pop()
        what()

    def _pop(self) -> tuple[float, Callable[[], object]]:
        import heapq

        time, _, what = heapq.heappop(self._queue)
        return time, what

    def _tick(self) -> None:
        self.later(TICK, self._tick)
        self.host.tick(self.unix_time, self.rng.getrandbits(64))
        self._tell_all()

    # -- the coordinator -------------------------------------------------------------------------------------------

    def hear(self, client: Client, message: ClientToServerMessage) -> None:
        before = self.state
        self.host.receive(client.id, message, self.unix_time, self.rng.getrandbits(64))
        if (before.run_state, before.progress.step) != (self.state.run_state, self.state.progress.step):
            self._tell_all()

    def _tell_all(self) -> None:
        state = self.state
        phase = (state.run_state, state.progress.step)
        if not self.phases or self.phases[-1][:2] != phase:
            self.phases.append((*phase, self.now))
        for member in self.members:
            self.tell_state(member)

    def tell_state(self, member: Member) -> None:
        state = self.state
        self.send(Kind.STATE, None, member, lambda: member.see(state))

    # -- the network -----------------------------------------------------------------------------------------------

    def send(
        self,
        kind: Kind,
        sender: Member | None,
        receiver: Member | None,
        arrive: Callable[[], None],
        lost: Callable[[], None] = lambda: None,
        *,
        takes: float = 0.0,
    ) -> None:
        ends = self._number_of(sender), self._number_of(receiver)
        number = len(self.messages)
        self.messages.append(Message(number, kind, *ends, self.state.run_state, self.state.progress.step))
        delay = takes + self._chance.uniform(*DELAY)
        if self.fault is not None and self.fault.number == number:
            if self.fault.late is None:
                lost()
                return
            delay += self.fault.late
        time = self.now + delay
        if -1 in ends:
            time = self._in_order[ends] = max(time, self._in_order[ends] + 1e-6)
        self.at(time, arrive)

    def _number_of(self, member: Member | None) -> int:
        if member is None:
            return -1
        return self.members.index(member) if member in self.members else len(self.members)

    @override
    def gossip(self, sender: Member, data: bytes, *, weights: bool, to: Collection[Member] | None = None) -> None:
        announcement = Announcement(sender.key.public, data)
        for member in self.members if to is None else to:
            if member is not sender:
                self._carry(sender, member, announcement, weights=weights)

    def _carry(self, sender: Member, member: Member, announcement: Announcement, *, weights: bool) -> None:
        def arrive() -> None:
            take = member.rounds.receive_weights if weights else member.rounds.receive
            member.do(take(announcement, self.now))

        self.send(Kind.WEIGHTS if weights else Kind.ANNOUNCE, sender, member, arrive)

    @override
    def fetch(self, who: Member, action: act.FetchBlob) -> None:
        assert isinstance(who, Client)
        blob = action.ticket.hash
        owner = next(member for member in self.members if member.key.public == action.ticket.addr.id)

        def arrive() -> None:
            if len(owner.blobs.get(blob, b"")) not in range(1, action.max_size + 1):
                who.do(who.rounds.fetch_failed(blob, self.now))
                return
            who.fetched.add(blob)
            who.do(who.rounds.fetched(blob, owner.blobs[blob], self.now))

        def fail() -> None:
            self.at(self.now + OWNER_SECONDS, ask_others)

        def ask_others() -> None:
            clients = (member for member in self.members if isinstance(member, Client))
            if any(blob in member.fetched for member in clients if member.key.public in action.providers):
                arrive()
            else:
                silence = FETCH_SECONDS - OWNER_SECONDS
                self.at(self.now + silence, lambda: who.do(who.rounds.fetch_failed(blob, self.now)))

        self.send(Kind.DOWNLOAD, owner, who, arrive, fail)

    # -- what is seen ----------------------------------------------------------------------------------------------

    def longest_phase(self) -> tuple[float, RunState, int]:
        """Seconds, and which phase it was."""
        ends = [start for _, _, start in self.phases[1:]]
        phases = zip(self.phases, ends, strict=False)
        return max((end - start, run_state, step) for (run_state, step, start), end in phases)


def friends_who_begin_together(fault: Fault | None = None, **config: int) -> FaultyWorld:
    """Three, from the first step on."""
    world = FaultyWorld(fault, **config)
    for _ in range(3):
        world.join()
    return world


def friends_who_join_one_by_one(fault: Fault | None = None, **config: int) -> FaultyWorld:
    """A host begins alone; two join, for whom its epoch ends."""
    world = FaultyWorld(fault, joiner_wait_time=JOINER_WAIT_SECONDS, **config)
    world.join()
    world.later(2.0, world.join)
    world.later(2.4, world.join)
    return world
