"""A run in one thread: the real coordinator, several clients, a network that loses and delays, and a clock.

Everything random comes from one seed. The "model" is two tensors of small whole steps, and a "gradient" is made of the
weights and the batch: so a member that trains on other weights sends something else, and one that applies another list
of results has other weights from then on.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from distro_optim.comm.addresses import EndpointAddr
from distro_optim.comm.announcements import Announcement
from distro_optim.comm.iroh.sharing.search import SHORT_SECONDS
from distro_optim.comm.model_exchange import Patience
from distro_optim.comm.signing import SecretKey
from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan
from distro_optim.coordinator.messages import (
    ClientToServerMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.model import Checkpoint, ConstantLR, Hub
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.types import Coordinator, NodeIdentity, RunState
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.rounds import Rounds, Stage
from distro_optim.strategy.rounds.weights import tensor_digest
from distro_optim.testing.coordinator import metadata
from distro_optim.testing.updates import random_update
from distro_optim.verify.merkle import merkle_root
from runs import waiting_run

CPU = torch.device("cpu")
SHAPES = {"bias": (8,), "weight": (4, 8)}
NAMES = tuple(SHAPES)
PLAN = make_plan([ParamSpec(shape, torch.float32, CPU, 0, 4, 2) for shape in SHAPES.values()], "divisor")
# Powers of two, so that weights stay exact and any difference is one of substance.
LR = 2.0**-6
DECAY = 2.0**-4
TICK = 0.5
LOAD_PAUSE = 1.0
IN_A_HOSTED_RUN = Hub(SHARED_BY_PEERS)  # where nobody but the peers has the weights
NOTICED_WITHIN = 2  # steps


def secret(number: int) -> SecretKey:
    return SecretKey(number.to_bytes(32, "big"))


def first_weights() -> list[Tensor]:
    return [torch.arange(float(torch.Size(shape).numel())).view(shape) / 8 for shape in SHAPES.values()]


def dense(updates: tuple[CompressedUpdate, ...]) -> list[Tensor]:
    """The sign of the sum of all contributions; one tile of a tensor after the other."""
    sums = []
    for number, shape in enumerate(SHAPES.values()):
        total = torch.zeros(PLAN.grids[number].tiles, PLAN.grids[number].tile_size)
        for update in updates:
            entry = update.tensors()[number]
            k = entry.index.shape[-1]
            if not k:
                continue  # nothing is said of this tensor
            signs = 1.0 - 2.0 * entry.value.float() if entry.value.dtype == torch.bool else entry.value.float()
            total.scatter_add_(1, entry.index.reshape(-1, k).long(), signs.reshape(-1, k))
        sums.append(torch.sign(total).reshape(shape))
    return sums


class Trainer:
    """The actions that change the model."""

    def __init__(self) -> None:
        self.weights = first_weights()

    def digests(self) -> list[bytes]:
        return [tensor_digest(name, tensor) for name, tensor in zip(NAMES, self.weights, strict=True)]

    def apply(self, action: act.ApplyResults) -> None:
        for tensor, sign in zip(self.weights, dense(action.updates), strict=True):
            tensor -= action.lr * sign

    def decay(self, lr: float) -> None:
        for tensor in self.weights:
            tensor *= 1 - lr * DECAY

    def gradient(self, action: act.TrainBatch) -> CompressedUpdate:
        seed = int.from_bytes(b"".join(self.digests())[:4], "big") ^ action.batch.start * 7919
        return random_update(PLAN, quantized=True, seed=seed)


class Member:
    """A client: carries out what its rounds want done."""

    def __init__(self, world: World, number: int, *, train_seconds: float = 2.0, load_seconds: float = 1.0) -> None:
        self.world = world
        self.key = secret(number)
        self.id = self.identity_of(self.key)
        self.train_seconds, self.load_seconds = train_seconds, load_seconds
        self.alive = True
        self.trainer = Trainer()
        self.blobs: dict[bytes, bytes] = {}
        self.stored: dict[int, set[bytes]] = {}
        self.log: list[act.Action] = []
        self._log_of: defaultdict[type[Any], list[Any]] = defaultdict(list)
        self._to_do: deque[act.Action] = deque()
        self._busy = False
        self.hashes: dict[int, tuple[bytes, ...]] = {}
        self.applied: dict[int, int] = {}
        self.repaired: dict[int, list[int]] = {}  # numbers of tensors, by step
        self.training: act.TrainBatch | None = None
        self.rounds = self._new_rounds()
        world.members.append(self)
        self.join()

    @staticmethod
    def identity_of(key: SecretKey) -> NodeIdentity:
        return NodeIdentity.from_single_key(key.public)

    def _new_rounds(self) -> Rounds:
        address = EndpointAddr(self.key.public)
        return Rounds(identity=self.id, key=self.key, address=address, draw=self.world.rng.randbytes)

    def join(self) -> None:
        self.tell(Join(self.world.host.state.run_id))

    def tell(self, message: ClientToServerMessage) -> None:
        self.world.host.receive(self.id, message, self.world.unix_time, self.world.rng.getrandbits(64))

    def crash(self) -> None:
        """Gone without a word; the connection to the coordinator breaks."""
        self.alive = False
        self.training = None
        self.world.host.disconnect(self.id)

    def restart(self) -> None:
        """The same key, and nothing else of before."""
        self.alive = True
        self.trainer, self.rounds, self.blobs = Trainer(), self._new_rounds(), {}
        self.join()

    @property
    def in_step(self) -> bool:
        return self.alive and self.rounds.stage is Stage.RUNNING and self.rounds.fault is None

    def of(self, kind: type[Any]) -> list[Any]:
        return self._log_of[kind]

    def forget(self) -> None:
        """Begins the log again."""
        self.log, self._log_of = [], defaultdict(list)

    def later(self, seconds: float, what: Callable[[], list[act.Action]]) -> None:
        rounds = self.rounds  # a restart makes what was under way void

        def happen() -> None:
            if self.alive and self.rounds is rounds:
                self.do(what())

        self.world.later(seconds, happen)

    def see(self, state: Coordinator) -> None:
        self.do(self.rounds.coordinator_state(state, self.world.now))

    def tick(self) -> None:
        timer = self.rounds.next_timer()
        if timer is not None and timer <= self.world.now:
            self.do(self.rounds.tick(self.world.now))

    def do(self, actions: list[act.Action]) -> None:
        """Carries out actions in their order; those that come of an answer wait until all before them are done."""
        self._to_do.extend(actions)
        if self._busy:
            return
        self._busy = True
        while self._to_do:
            action = self._to_do.popleft()
            self.log.append(action)
            self._log_of[type(action)].append(action)
            self.carry_out(action)
        self._busy = False

    def carry_out(self, action: act.Action) -> None:
        match action:
            case act.Initialize():
                self.later(self.load_seconds, lambda: self._load(action))
            case act.TrainBatch():
                self.training = action
                self.later(self.train_seconds, lambda: self._trained(action))
            case act.CancelTraining(step):
                assert self.training is not None
                assert self.training.step == step
                self.trainer.decay(self.training.lr)
                self.training = None
                self.do(self.rounds.cancelled(step, self.world.now))
            case act.ApplyResults():
                assert self.training is None
                self.applied[action.step] = len(action.updates)
                self.trainer.apply(action)
            case act.DecayWeights():
                self.trainer.decay(action.lr)
            case act.HashWeights(step):
                digests = self.trainer.digests()
                self.hashes[step] = tuple(digests)
                self.do(self.rounds.weights_hashed(step, digests, self.world.now))
            case act.RepairWeights():
                self.do(self._repair(action))
            case act.PublishResult():
                self.do(self.rounds.publish(self.world.now))
            case act.StoreBlob(data=data):
                blob = blake3(data).digest()
                self.blobs[blob] = data
                self.stored.setdefault(self.world.state.progress.step, set()).add(blob)
            case act.Announce(data):
                self.world.gossip(self, data, weights=False)
            case act.AnnounceWeights(data):
                self.world.gossip(self, data, weights=True)
            case act.FetchBlob():
                self.world.fetch(self, action)
            case act.SendWitness(step=step, witness=witness):
                self.tell(WitnessMessage(WitnessStep(witness, metadata(step))))
            case act.SendWarmupWitness(witness):
                self.tell(WitnessMessage(WarmupStep(witness)))
            case act.SendHealthChecks(checks):
                self.tell(HealthCheckMessage(checks))
            case act.Rejoin():
                self.join()

    def _repair(self, action: act.RepairWeights) -> list[act.Action]:
        """Takes the tensors that differ from a peer whose weights are still those of the step's start."""
        for peer in self.world.members:
            theirs = peer.trainer.digests()
            asked = peer.key.public in action.providers and peer.alive and self.world.is_linked(self, peer)
            if asked and merkle_root(theirs) == action.root:
                ours = self.trainer.digests()
                wrong = [number for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
                for number in wrong:
                    self.trainer.weights[number] = peer.trainer.weights[number].clone()
                self.repaired[action.step] = wrong
                self.hashes[action.step] = tuple(theirs)
                return self.rounds.weights_repaired(action.step, theirs, self.world.now)
        self.world.seen["failed repairs"] += 1
        return self.rounds.repair_failed(action.step, self.world.now)

    def _load(self, action: act.Initialize, patience: float | None = None) -> list[act.Action]:
        if patience is None:
            patience = self.world.state.config.warmup_time  # as the runtime has it
            if action.patience is Patience.SHORT and self.world.cut_off.isdisjoint(self.world.members):
                patience = SHORT_SECONDS
        if action.providers:
            members = {member.key.public: member for member in self.world.members}
            asked = [members[key] for key in action.providers]
            source = next((member for member in asked if member.in_step and self.world.is_linked(self, member)), None)
            if source is None and patience <= 0:
                return self.rounds.initialization_failed("nobody shares the model", self.world.now)
            if source is None:
                self.later(LOAD_PAUSE, lambda: self._load(action, patience - LOAD_PAUSE))
                return []
            self.trainer.weights = [tensor.clone() for tensor in source.trainer.weights]
        return self.rounds.initialized(PLAN, NAMES, self.world.now)

    def _trained(self, action: act.TrainBatch) -> list[act.Action]:
        if self.training is not action:
            return []
        self.training = None
        update = self.gradient(action)
        self.trainer.decay(action.lr)
        return self.rounds.trained(action.step, update, ("own", action.step), self.world.now)

    def gradient(self, action: act.TrainBatch) -> CompressedUpdate:
        return self.trainer.gradient(action)


@dataclass
class Weather:
    """How bad the network is: shares of 1, and seconds."""

    gossip_loss: float = 0.0
    fetch_loss: float = 0.0
    state_loss: float = 0.0
    delay: tuple[float, float] = (0.05, 0.2)


class World:
    """The clock, the coordinator, the network."""

    checkpoint: Checkpoint = IN_A_HOSTED_RUN

    def __init__(self, *, seed: int = 1, weather: Weather | None = None, cold_start: int = 0, **config: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.weather = weather or Weather()
        settings = {"witness_nodes": 0, "global_batch_size_start": 8, "global_batch_size_end": 8} | config
        state = waiting_run("run", self.checkpoint, cold_start_warmup_steps=cold_start, **settings)
        self.host = RunHost(replace(state, model=replace(state.model, lr_schedule=ConstantLR(LR, LR, 0))))
        self.members: list[Member] = []
        self.cut_off: set[Member] = set()
        self.seen: Counter[str] = Counter()
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0

    @property
    def unix_time(self) -> int:
        return int(self.now)

    @property
    def state(self) -> Coordinator:
        return self.host.state

    def is_linked(self, one: Member, other: Member) -> bool:
        """A member that is cut off reaches the coordinator, but no other member."""
        return one is other or not self.cut_off.intersection({one, other})

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + seconds, self._number, what))

    def gossip(self, sender: Member, data: bytes, *, weights: bool, to: Collection[Member] | None = None) -> None:
        """Sends to everybody, or to some."""
        announcement = Announcement(sender.key.public, data)
        for member in self.members if to is None else to:
            if member is sender:
                continue
            if not self.is_linked(sender, member) or self.rng.random() < self.weather.gossip_loss:
                self.seen["lost messages"] += 1
                continue
            if member.alive:
                self._announce(member, announcement, weights=weights)

    def _announce(self, member: Member, announcement: Announcement, *, weights: bool) -> None:
        def arrive() -> list[act.Action]:
            take = member.rounds.receive_weights if weights else member.rounds.receive
            return take(announcement, self.now)

        member.later(self.rng.uniform(*self.weather.delay), arrive)

    def fetch(self, who: Member, action: act.FetchBlob) -> None:
        blob = action.ticket.hash

        def arrive() -> list[act.Action]:
            providers = {action.ticket.addr.id, *action.providers}
            reached = [m for m in self.members if m.alive and m.key.public in providers and self.is_linked(who, m)]
            holder = next((m for m in reached if blob in m.blobs), None)
            if (
                holder is None
                or self.rng.random() < self.weather.fetch_loss
                or len(holder.blobs[blob]) > action.max_size
            ):
                self.seen["failed downloads"] += 1
                return who.rounds.fetch_failed(blob, self.now)
            who.blobs[blob] = holder.blobs[blob]
            return who.rounds.fetched(blob, holder.blobs[blob], self.now)

        who.later(self.rng.uniform(*self.weather.delay), arrive)

    def step(self) -> None:
        """Half a second."""
        end = self.now + TICK
        while self._queue and self._queue[0][0] <= end:
            self.now, _, what = heapq.heappop(self._queue)
            what()
        self.now = end
        self.host.tick(self.unix_time, self.rng.getrandbits(64))
        for member in self.members:
            if member.alive:
                if self.rng.random() >= self.weather.state_loss:
                    member.see(self.state)
                member.tick()

    def until(self, wanted: Callable[[Coordinator], bool], *, steps: int = 20_000) -> Coordinator:
        for _ in range(steps):
            if wanted(self.state):
                return self.state
            self.step()
        raise AssertionError(f"it never came to that: {self.state.run_state}, step {self.state.progress.step}")

    def until_phase(self, run_state: RunState, *, epoch: int = 0, height: int = 0) -> Coordinator:
        return self.until(
            lambda s: s.run_state is run_state and s.progress.epoch >= epoch and s.current_round.height >= height
        )

    def until_finished(self) -> Coordinator:
        self.until_phase(RunState.FINISHED)
        self.step()
        return self.state

    def assert_equal_weights(self) -> None:
        """All that take part had the same weights whenever two of them looked at the same step."""
        for a, b in zip(self.members, self.members[1:], strict=False):
            both = a.hashes.keys() & b.hashes.keys()
            differing = [step for step in both if a.hashes[step] != b.hashes[step]]
            assert not differing, (a.id, b.id, differing)

    def assert_healed(self) -> None:
        """All that still believe in their weights at the last step have the same."""
        right = [member for member in self.members if member.rounds.fault is None and member.hashes]
        last = max(step for member in right for step in member.hashes)
        assert len({member.hashes[last] for member in right if last in member.hashes}) == 1

    def assert_every_difference_was_noticed(self) -> None:
        """Where members hashed the same step differently, all but those of one group soon said that they differ."""
        for step in {step for member in self.members for step in member.hashes}:
            having = [member for member in self.members if step in member.hashes]
            unaware = {
                member.hashes[step]
                for member in having
                if not any(0 <= fault.step - step <= NOTICED_WITHIN for fault in member.of(act.Desynced))
            }
            assert len({member.hashes[step] for member in having}) == 1 or len(unaware) <= 1, step


def run_of(count: int, **world: object) -> tuple[World, list[Member]]:
    place = World(**world)  # type: ignore[arg-type]
    return place, [Member(place, number) for number in range(1, count + 1)]
