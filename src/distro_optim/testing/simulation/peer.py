"""A client of a simulated run: carries out what its :class:`~distro_optim.strategy.rounds.rounds.Rounds` want done."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np
from blake3 import blake3

from ...comm.addresses import EndpointAddr
from ...comm.announcements import Announcement
from ...comm.signing import SecretKey
from ...coordinator.messages import (
    ClientToServerMessage,
    HealthCheckMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from ...coordinator.types import Coordinator, NodeIdentity, WitnessMetadata
from ...strategy.network.driver import MAX_FETCHES, MAX_SMALL_FETCHES, SMALL_RESULT
from ...strategy.rounds import actions as act
from ...strategy.rounds.rounds import Rounds, Stage
from .events import EventQueue
from .inboxes import Inboxes, Message
from .model import SmallModel
from .network import SimulatedNetwork
from .sharing import SharedReader, SharedWork

__all__ = ["Peer", "World"]

LOAD_SECONDS: Final = 1.0
"""To load a model that is there already, and between two questions for one that is not."""

MEASURED: Final = 8
"""One in so many messages and downloads is measured, for all of them, where peers are many: to read the clock of a
thread can take longer than a small message does."""

DRAWS: Final = 1021
"""Drawn in advance, and used again and again. A prime number, so that nothing that is said in turns falls into step."""

MANY: Final = 32
"""Peers from which on that is done, and messages are read together that come together."""

REQUEST_BYTES: Final = 64
"""Of a question for a blob, and of the answer that it is not there: 39 bytes and what QUIC puts around them."""


class World(Protocol):
    """What a peer sees of the simulation.

    Attributes:
        queue: virtual time.
        inboxes: messages on their way, where peers are many.
        network: the lines; a peer's has its number.
        work: done once for all.
        reader: of what peers send.
        rng: where everything random comes from.
        peers: all that have come, by number.
        by_key: the same by public key.
        host_key: of the peer that hosts the run.
        run_id: its name.
        result_bytes: that a result is charged for; None takes its own.
        model_bytes: that a model is charged for.
    """

    queue: EventQueue
    inboxes: Inboxes
    network: SimulatedNetwork
    work: SharedWork
    reader: SharedReader
    rng: np.random.Generator
    peers: list[Peer]
    by_key: dict[bytes, Peer]
    host_key: bytes
    run_id: str
    result_bytes: int | None
    model_bytes: int

    def cpu(self) -> float:
        """CPU seconds of this thread."""
        raise NotImplementedError

    def train_seconds(self, peer: Peer) -> float:
        """How long a peer trains this time."""
        raise NotImplementedError

    def tell_host(self, peer: Peer, message: ClientToServerMessage) -> None:
        """A message to the coordinator."""
        raise NotImplementedError


class Peer:
    """See the module.

    Args:
        world: the simulation.
        key: its secret key.

    Attributes:
        number: of its line.
        id: who it is to the coordinator.
        model: that it trains.
        cpu: seconds that it has computed: rounds, codec, and its model.
        digests: hashes of its weights, by step.
        blobs: results that it offers, with their steps.
        seen: what happened to it, counted.
    """

    def __init__(self, world: World, key: SecretKey) -> None:
        self.world = world
        self.key = key
        self.id = NodeIdentity.from_single_key(key.public)
        self.number = world.network.join()
        self.model = SmallModel(world.work)
        self.cpu = 0.0
        self.digests: dict[int, tuple[bytes, ...]] = {}
        self.blobs: dict[bytes, tuple[int, bytes]] = {}
        self.seen: Counter[str] = Counter()
        self.is_straggler = False
        self.rounds = Rounds(
            identity=self.id,
            key=key,
            address=EndpointAddr(key.public),
            draw=world.rng.bytes,
            host=world.host_key,
            reader=world.reader,
        )
        self._to_do: deque[act.Action] = deque()
        self._busy = False
        self._training: act.TrainBatch | None = None
        self._timer: float | None = None
        self._due: float | None = None  # when the rounds want to be woken
        self._to_fetch: deque[act.FetchBlob] = deque()
        self._fetching = 0
        self._step = 0
        # Which messages and downloads are measured, by turns; decides nothing else.
        self._measured = itertools.cycle((np.random.default_rng(self.number).random(DRAWS) * MEASURED < 1).tolist())

    @property
    def is_running(self) -> bool:
        """Whether it takes part, with the weights of the run."""
        return self.rounds.stage is Stage.RUNNING and self.rounds.fault is None

    def join(self) -> None:
        """Asks the coordinator to be let in."""
        self.world.tell_host(self, Join(self.world.run_id))

    # -- what comes in -------------------------------------------------------------------------------------------------

    def see(self, state: Coordinator, cpu: float = 0.0) -> None:
        """The coordinator's state has arrived; to read it took that many CPU seconds."""
        self.cpu += cpu
        self._step = state.progress.step
        self.feed(self.rounds.coordinator_state, state)

    def hear(self, announcement: Announcement) -> None:
        """A message of a peer has arrived."""
        self.feed(self.rounds.receive, announcement, stands_for=self._stands_for())

    def hear_weights(self, announcement: Announcement) -> None:
        """A message of a peer of our own kind has arrived."""
        self.feed(self.rounds.receive_weights, announcement, stands_for=self._stands_for())

    def read(self, messages: Sequence[Message]) -> None:
        """Messages of peers that have arrived, the oldest first."""
        rounds, to_do, now = self.rounds, self._to_do, self.world.queue.now
        for _, announcement, weights in messages:
            take = rounds.receive_weights if weights else rounds.receive
            if next(self._measured):
                self._settle()
                self.feed(take, announcement, stands_for=MEASURED)
            else:
                to_do += take(announcement, now)
        self._settle()
        self._due = rounds.next_timer()
        self._carry_on()

    def _stands_for(self) -> int:
        """For how many messages or downloads the measurement of this one counts; 0 if it is not measured."""
        if len(self.world.peers) <= MANY:
            return 1
        return MEASURED if next(self._measured) else 0

    def feed(self, give: Callable[..., list[act.Action]], *what: Any, stands_for: int = 1) -> None:
        """One input, ``what`` and the time, and all that comes of it; what comes of an answer is done after all that
        was there before."""
        world = self.world
        began = world.cpu() if stands_for else 0.0
        self._to_do += give(*what, world.queue.now)
        self._due = self.rounds.next_timer()
        spent = self._settle()
        if stands_for:
            self.cpu += stands_for * (world.cpu() - began - spent)
        if not self._busy:
            self._carry_on()

    def _settle(self) -> float:
        """Charges us with what was done once for all; returns what of it was done now, in CPU seconds."""
        owed, spent = self.world.work.settle()
        self.cpu += owed
        return spent

    def _carry_on(self) -> None:
        """Does all that there is to do, and what comes of it; then waits for the next timer."""
        to_do = self._to_do
        if to_do:
            self._busy = True
            while to_do:
                self.carry_out(to_do.popleft())
            self._busy = False
        due = self._due
        if due is not None and (self._timer is None or due < self._timer):
            self._timer = due
            self.world.queue.at(due, lambda: self._wake(due))

    def _wake(self, due: float) -> None:
        if self._timer == due:
            self._timer = None
            self.feed(self.rounds.tick)

    # -- what is to be done --------------------------------------------------------------------------------------------

    def carry_out(self, action: act.Action) -> None:
        """Does what the rounds want done."""
        world = self.world
        match action:
            case act.Dropped():
                pass
            case act.Initialize():
                world.queue.after(LOAD_SECONDS, lambda: self._load(action))
            case act.PublishResult():
                self.feed(self.rounds.publish)
            case act.StoreBlob(data=data):
                self.blobs[blake3(data).digest()] = (self._step, data)
            case act.Announce(data):
                self.gossip(data, weights=False)
            case act.AnnounceWeights(data):
                self.gossip(data, weights=True)
            case act.FetchBlob():
                self._to_fetch.append(action)
                self._fetch_next()
            case act.Forget(before_step):
                self.blobs = {blob: entry for blob, entry in self.blobs.items() if entry[0] >= before_step}
            case act.SendWitness(step=step, witness=witness):
                metadata = WitnessMetadata(step, 0.0, 0.0, 0.0, (), (), 0, 0.0)
                world.tell_host(self, WitnessMessage(WitnessStep(witness, metadata)))
            case act.SendWarmupWitness(witness):
                world.tell_host(self, WitnessMessage(WarmupStep(witness)))
            case act.SendHealthChecks(checks):
                world.tell_host(self, HealthCheckMessage(checks))
            case act.Rejoin():
                self.seen["rejoined"] += 1
                self.join()
            case act.Desynced():
                self.seen["lost the run's weights"] += 1
            case act.ResultMissing():
                self.seen["missed results"] += 1
            case act.RepairWeights(step=step):
                # Nothing damages memory here, so a difference is one of results, which a repair cannot mend for long.
                self.feed(self.rounds.repair_failed, step)
            case _:
                self._train(action)

    def _train(self, action: act.Action) -> None:
        world, trainer = self.world, self.model.trainer
        began = world.cpu()
        match action:
            case act.TrainBatch():
                trainer.begin(action)
                self._training = action
                world.queue.after(world.train_seconds(self), lambda: self._trained(action))
            case act.CancelTraining(step):
                trainer.cancel()
                self._training = None
                self.seen["stopped in training"] += 1
                self.feed(self.rounds.cancelled, step)
            case act.ApplyResults():
                trainer.apply(action)
                owed, spent = world.work.settle()
                self.cpu += owed - spent
                self.seen["results applied"] += len(action.updates)
            case act.DecayWeights():
                trainer.decay(action)
            case act.HashWeights(step):
                digests = trainer.digests()
                self.digests[step] = tuple(digests)
                self.cpu += world.cpu() - began
                self.feed(self.rounds.weights_hashed, step, digests)
                return
        self.cpu += world.cpu() - began

    def _trained(self, action: act.TrainBatch) -> None:
        if self._training is not action:
            return
        self._training = None
        began = self.world.cpu()
        self.model.gradients(action)
        update, own = self.model.trainer.finish()
        self.cpu += self.world.cpu() - began
        self.seen["batches trained"] += 1
        self.feed(self.rounds.trained, action.step, update, own)

    def _load(self, action: act.Initialize) -> None:
        world, trainer = self.world, self.model.trainer
        sources = [world.by_key[key] for key in action.providers if key in world.by_key]
        source = next((peer for peer in sources if peer.is_running and peer is not self), None)
        names = trainer.names
        if not action.providers:
            self.feed(self.rounds.initialized, trainer.plan, names)
        elif source is None:
            self.feed(self.rounds.initialization_failed, "nobody shares the model")
        else:
            self.model.copy_from(source.model)
            self.seen["models loaded"] += 1
            # Who is there from the beginning has brought the model.
            size = world.model_bytes if action.epoch else 0
            seconds = world.network.transit(source.number, self.number, size, world.queue.now)
            world.queue.after(seconds, lambda: self.feed(self.rounds.initialized, trainer.plan, names))

    # -- the network ---------------------------------------------------------------------------------------------------

    def gossip(self, data: bytes, *, weights: bool) -> None:
        """Says something to everybody."""
        world = self.world
        announcement = Announcement(self.key.public, data)
        numbers, times = world.network.gossip(self.number, len(data), world.queue.now)
        if len(world.peers) > MANY:
            world.inboxes.put(numbers, times, announcement, weights=weights)
        else:
            hear = type(self).hear_weights if weights else type(self).hear
            world.queue.series(times, lambda number: hear(world.peers[number], announcement), numbers)
        self.seen["messages sent"] += 1

    def offers(self, blob: bytes) -> bytes | None:
        """What it gives to whoever asks for a blob."""
        entry = self.blobs.get(blob)
        return None if entry is None else entry[1]

    def _fetch_next(self) -> None:
        is_small = self.world.result_bytes is None or self.world.result_bytes <= SMALL_RESULT
        while self._to_fetch and self._fetching < (MAX_SMALL_FETCHES if is_small else MAX_FETCHES):
            action = self._to_fetch.popleft()
            self._fetching += 1
            self._ask_now(action, self._order(action))

    def _order(self, action: act.FetchBlob) -> Iterator[bytes]:
        """Whom to ask, as the driver does it: the owner first."""
        owner = action.ticket.addr.id
        yield owner
        others = [key for key in action.providers if key not in (owner, self.key.public)]
        for place in self.world.rng.permutation(len(others)).tolist():
            yield others[place]

    def _ask(self, action: act.FetchBlob, providers: Iterator[bytes], seconds: float) -> None:
        """Asks the next provider; ``seconds`` were spent with the last one."""
        self.world.queue.after(seconds, lambda: self._ask_now(action, providers))

    def _ask_now(self, action: act.FetchBlob, providers: Iterator[bytes]) -> None:
        world, blob = self.world, action.ticket.hash
        now = world.queue.now
        key = next(providers, None)
        if key is None:
            self._end_fetch(self.rounds.fetch_failed, blob)
            return
        peer = world.by_key.get(key)
        if peer is None:
            self._ask(action, providers, 0.0)
            return
        self.seen["requests"] += 1
        there = world.network.whisper(self.number, peer.number, REQUEST_BYTES)
        data = peer.offers(blob)
        if data is None or len(data) > action.max_size or world.network.is_lost():
            self._ask(action, providers, there + world.network.whisper(peer.number, self.number, REQUEST_BYTES))
            return
        size = world.result_bytes if world.result_bytes is not None else len(data)
        back = world.network.transit(peer.number, self.number, size, now)
        world.queue.after(there + back, lambda: self._fetched(blob, data))

    def _fetched(self, blob: bytes, data: bytes) -> None:
        self.blobs[blob] = (self._step, data)
        self.seen["results fetched"] += 1
        self._end_fetch(self.rounds.fetched, blob, data)

    def _end_fetch(self, answer: Callable[..., list[act.Action]], *what: Any) -> None:
        self._fetching -= 1
        self.feed(answer, *what, stands_for=self._stands_for())
        self._fetch_next()
