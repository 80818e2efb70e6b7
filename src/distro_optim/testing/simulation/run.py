"""The run: the real coordinator, its peers, and what happens to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from ...comm import changes
from ...comm.framing import CLIENT_FRAME_LIMIT, Else, payload_of
from ...comm.serving.connection import changed_frame
from ...comm.signing import SecretKey
from ...coordinator.messages import CLIENT_TO_SERVER, SERVER_TO_CLIENT, ClientToServerMessage
from ...coordinator.model import ConstantLR
from ...coordinator.server.host import PhaseChanged, Refused, RunHost
from ...coordinator.server.service import frame_of
from ...coordinator.types import Coordinator, RunState
from ...errors import DistroError
from ...strategy.config import RunConfig
from .events import EventQueue
from .inboxes import Inboxes
from .liars import LIARS
from .model import LEARNING_RATE, charged_bytes
from .network import SimulatedNetwork
from .peer import Peer
from .settings import SimulationOptions
from .sharing import SharedReader, SharedWork

__all__ = ["SimulatedRun"]

TICK_SECONDS: Final = 0.5
"""Between two ticks of the coordinator, each of which sends everybody its state."""

UNIX_TIME: Final = 1_000_000
"""At the beginning."""

SAMPLES_OF_A_PEER: Final = 4
"""Of a round."""

MAX_ROUND_SECONDS: Final = 600
"""After which a round goes on without those that have not finished."""

WARMUP_SECONDS: Final = 1200
EPOCH_SECONDS: Final = 10_000_000
JOINER_WAIT_SECONDS: Final = 5

STILL_SECONDS: Final = 3000.0
"""Without a new round, after which it is given up: longer than a warm-up and a round may last together."""

FRAME_HEADER: Final = 4
"""Bytes of a message's length."""


class SimulatedRun:
    """One simulation; :meth:`finish` runs it. It is the world of its peers, see :class:`.peer.World`.

    Args:
        options: what is simulated.
        cpu: CPU seconds of this thread, to be measured; it decides nothing.
        progress: called at the beginning of each round with its number.
    """

    run_id = "simulation"

    def __init__(
        self, options: SimulationOptions, cpu: Callable[[], float], progress: Callable[[int], object] = lambda _: None
    ) -> None:
        self.options = options
        self.queue = EventQueue()
        self.inboxes = Inboxes(self.queue, lambda number, messages: self.peers[number].read(messages))
        self.rng = np.random.default_rng(options.seed)
        self.network = SimulatedNetwork(
            latency=options.latency, bandwidth=options.bandwidth, loss=options.loss, rng=self.rng
        )
        self.work = SharedWork(cpu)
        self.reader = SharedReader(self.work)
        self.result_bytes, self.model_bytes = charged_bytes(options.parameters)
        self.peers: list[Peer] = []
        self.by_key: dict[bytes, Peer] = {}
        self.host_cpu = 0.0
        self.refused = 0
        self.began: dict[int, float] = {}  # when the round of each step began
        self._moved = 0.0  # when the last of them did
        self._cpu = cpu
        self._progress = progress
        config = RunConfig(
            total_steps=options.rounds,
            global_batch_size=SAMPLES_OF_A_PEER * options.everybody,
            min_peers=options.peers + options.liars,
            keep_peers=1,
            epoch_time=EPOCH_SECONDS,
            warmup_time=WARMUP_SECONDS,
            max_round_train_time=MAX_ROUND_SECONDS,
            lr_schedule=ConstantLR(LEARNING_RATE, LEARNING_RATE, 0),
        )
        self.host = RunHost(config.coordinator_state(self.run_id), joiner_wait_time=JOINER_WAIT_SECONDS)
        # The latest state that is on its way to each peer, and its frame.
        self._sent: dict[int, tuple[Coordinator, bytes]] = {}
        self._framed: tuple[Coordinator, bytes] | None = None
        key = self._key()
        self.host_key = key.public
        self.host.trust(self._add(Peer, key).id)
        for number in range(1, options.peers):
            self._add(Peer, self._key()).is_straggler = number <= options.stragglers
        for number in range(options.liars):
            self._add(LIARS[number % len(LIARS)], self._key())
        joiners = options.joiners
        self._joins_at = [1 + (number + 1) * options.rounds // (joiners + 1) for number in range(joiners)]
        self.first_loss = self.peers[0].model.loss()

    def finish(self) -> None:
        """Runs it to its end.

        Raises:
            DistroError: it does not come to its end.
        """
        for peer in self.peers:
            peer.join()
        self.queue.after(TICK_SECONDS, self._tick)
        self.queue.run()

    # -- for peers -----------------------------------------------------------------------------------------------------

    def cpu(self) -> float:
        """CPU seconds of this thread."""
        return self._cpu()

    def train_seconds(self, peer: Peer) -> float:
        """How long a peer trains this time."""
        options = self.options
        spread = 1 + options.jitter * (2 * float(self.rng.random()) - 1)
        return options.train_seconds * spread * (options.straggler_factor if peer.is_straggler else 1.0)

    def tell_host(self, peer: Peer, message: ClientToServerMessage) -> None:
        """A message to the coordinator, which is where the first peer is."""
        if peer.number == 0:
            self.queue.after(0.0, lambda: self._hear(peer, message))
            return
        size = FRAME_HEADER + len(CLIENT_TO_SERVER.encode(Else(message)))
        self.queue.after(self.network.whisper(peer.number, 0, size), lambda: self._hear(peer, message))

    # -- the coordinator -----------------------------------------------------------------------------------------------

    @property
    def unix_time(self) -> float:
        """Of the coordinator."""
        return UNIX_TIME + self.queue.now

    def _seed(self) -> int:
        return int.from_bytes(self.rng.bytes(8), "little")

    def _hear(self, peer: Peer, message: ClientToServerMessage) -> None:
        began, seed = self._cpu(), self._seed()
        events = self.host.receive(peer.id, message, self.unix_time, seed)
        self.host_cpu += self._cpu() - began
        self.refused += sum(isinstance(event, Refused) for event in events)
        if any(isinstance(event, PhaseChanged) for event in events):
            self._note_round()
            self._broadcast(news=True)

    def _tick(self) -> None:
        began, seed = self._cpu(), self._seed()
        self.host.tick(self.unix_time, seed)
        self.host_cpu += self._cpu() - began
        self._note_round()
        self._broadcast(news=False)
        self.queue.after(TICK_SECONDS, self._tick)

    def _note_round(self) -> None:
        state = self.host.state
        step = state.progress.step
        if state.run_state is RunState.FINISHED:
            self.queue.stop()
        elif self.queue.now - self._moved > STILL_SECONDS:
            raise DistroError(
                f"the run stands still at step {step}, {state.run_state.name}, after {self.queue.now:.0f} simulated "
                "seconds: fewer losses, or faster lines, may help"
            )
        if state.run_state is RunState.ROUND_TRAIN and step not in self.began:
            if not self.began:
                self._begin_accounts()
            self.began[step] = self.queue.now
            self._moved = self.queue.now
            self._progress(step)
            while self._joins_at and step >= self._joins_at[0]:
                self._joins_at.pop(0)
                self._add(Peer, self._key()).join()

    def _begin_accounts(self) -> None:
        """The first round begins: what was spent until then is of the warm-up, and not counted."""
        self.host_cpu = 0.0
        for peer in self.peers:
            peer.cpu = 0.0
            peer.seen.clear()
        self.network.forget_counts()

    def _broadcast(self, *, news: bool) -> None:
        state = self.host.state
        if self._framed is None or self._framed[0] is not state:
            began = self._cpu()
            self._framed = (state, frame_of(state))
            self.host_cpu += self._cpu() - began
        frame = self._framed[1]
        idle = self.host.idle if news else frozenset()
        for peer in self.peers:
            if peer.id in idle:
                continue
            if peer.number == 0:
                self.queue.after(0.0, lambda peer=peer: peer.see(state))  # type: ignore[misc]
                continue
            before, came = self._sent.get(peer.number, (None, b""))
            began = self._cpu()
            sent = changed_frame(came, frame) if came else frame
            self.host_cpu += self._cpu() - began
            seconds = self.network.transit(0, peer.number, len(sent), self.queue.now)
            if before is not state:
                self._sent[peer.number] = state, frame
                self.queue.after(seconds, lambda peer=peer, came=came, sent=sent: self._arrive(peer, came, sent))  # type: ignore[misc]

    def _arrive(self, peer: Peer, before: bytes, sent: bytes) -> None:
        """A state has come over the line, and is read there."""
        began = self._cpu()
        payload = self.work.do((before, sent), lambda: _whole(before, sent))
        read = self.work.do(payload, lambda: _state_in(payload))
        owed, spent = self.work.settle()
        peer.see(read, self._cpu() - began - spent + owed)

    def _add(self, kind: type[Peer], key: SecretKey) -> Peer:
        peer = kind(self, key)
        self.peers.append(peer)
        self.by_key[key.public] = peer
        return peer

    def _key(self) -> SecretKey:
        return SecretKey(self.rng.bytes(32))


def _whole(before: bytes, sent: bytes) -> bytes:
    return changes.apply(payload_of(before) or None, payload_of(sent), limit=CLIENT_FRAME_LIMIT)


def _state_in(payload: bytes) -> Coordinator:
    """The state that :func:`~distro_optim.coordinator.server.service.frame_of` has put into a frame."""
    state: Coordinator = SERVER_TO_CLIENT.decode(payload).message.state
    return state
