"""A run of real sessions in one process: the simulator of rounds keeps the clock, each session has a thread.

Only one thread runs at a time. A session runs until it waits for the network (or says that it computes for so long);
then the next one does, and when all wait the clock moves on. So nothing depends on how fast the machine is.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from blake3 import blake3
from typing_extensions import override

from distro_optim.comm.live_weights import (
    FetchedTensors,
    LiveWeights,
    TensorSource,
    WantedTensors,
    fetch_differing,
)
from distro_optim.comm.model_exchange import Patience, SharedModel
from distro_optim.compress import CompressedUpdate, TilePlan
from distro_optim.coordinator.model import Checkpoint, ConstantLR, Hub, OptimizerDefinition
from distro_optim.coordinator.rules.checkpoints import SHARED_BY_PEERS
from distro_optim.coordinator.server.host import RunHost, restartable
from distro_optim.coordinator.types import Coordinator, NodeIdentity, RunState
from distro_optim.errors import ExchangeError, ProtocolError
from distro_optim.strategy.port import RunEvent, RunPort, RunView, TrainerAction
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.weights import tensor_digest
from distro_optim.verify.audit import Verdict
from distro_optim.verify.calibrate import Noise
from distro_optim.verify.recompute import Evidence
from rounds.simulator import TICK, Member, Weather, World, secret

TRAINER_ACTIONS = (
    act.Initialize,
    act.TrainBatch,
    act.ApplyResults,
    act.AuditMomentum,
    act.AuditResults,
    act.OpenMomentum,
    act.PrepareAudit,
    act.DecayWeights,
    act.HashWeights,
    act.RepairWeights,
    act.FinishEpoch,
    act.RunEnded,
)
LOAD_SECONDS = 30.0
ATTEMPTS = 5
MORE_STEPS = 400
PATIENCE = 60.0  # real seconds until a thread that never waits fails the test


class Killed(BaseException):
    """The process of a session is gone."""


class SessionMember(Member):
    """A client whose trainer is a session behind a :class:`SimulatedPort`."""

    def __init__(self, world: SessionWorld, number: int, port: SimulatedPort) -> None:
        self.port = port
        self.settings = world
        super().__init__(world, number)

    @override
    def carry_out(self, action: act.Action) -> None:
        if isinstance(action, TRAINER_ACTIONS):
            self.port.queue.append(action)
            if isinstance(action, act.TrainBatch):
                self.port.cancelled_steps.discard(action.step)
        elif isinstance(action, act.CancelTraining):
            self.port.cancelled_steps.add(action.step)
        elif isinstance(action, act.Desynced | act.ResultMissing):
            self.port.events.append(action)
        else:
            super().carry_out(action)


class SimulatedPort(RunPort):
    """A session's access to a :class:`SessionWorld`."""

    def __init__(self, world: SessionWorld, number: int) -> None:
        self.world = world
        self.number = number
        self.queue: deque[TrainerAction] = deque()
        self.events: list[RunEvent] = []
        self.cancelled_steps: set[int] = set()
        self.offered: SharedModel | None = None
        self.offered_digests: list[bytes] = []
        self.losses: dict[int, float] = {}
        self.hashes: dict[int, tuple[bytes, ...]] = {}
        self.killed = False
        self.closed = False
        self.ended = False
        self.member: SessionMember | None = None
        self.wake_at: float | None = None
        self.for_action = False
        self.go = threading.Semaphore(0)
        self.script: Any = None
        self.live: LiveWeights | None = None
        self.audits: list[tuple[int, bytes, Evidence, Evidence | None]] = []
        self.verdicts: list[tuple[int, bytes, Verdict]] = []
        self.own_noise: list[Noise] = []
        self.fetched_tensors: list[tuple[str, int]] = []  # names and bytes
        # Weights are hashed in another thread. Here that takes no time: whatever a session does next with its run, it
        # does when the hashes are there.
        self._hashed: queue.SimpleQueue[tuple[int, Sequence[bytes]]] = queue.SimpleQueue()
        self._to_be_hashed = 0

    # -- turns -----------------------------------------------------------------------------------------------------

    def wait(self, seconds: float | None, *, for_action: bool = False) -> None:
        """Lets others run until (if given) so much time has passed, or there is an action if that is waited for."""
        self.take_hashes()
        self.wake_at = None if seconds is None else self.world.now + seconds
        self.for_action = for_action
        self.world.back.release()
        assert self.go.acquire(timeout=PATIENCE)
        if self.killed:
            raise Killed

    def compute(self, seconds: float, step: int) -> None:
        """The training of ``step`` takes so long, or until it is cancelled."""
        end = self.world.now + seconds
        while self.world.now < end and not self.is_cancelled(step):
            self.wait(min(TICK, end - self.world.now))

    @property
    def runnable(self) -> bool:
        due = self.wake_at is not None and self.wake_at <= self.world.now
        return due or self.killed or (self.for_action and bool(self.queue))

    # -- RunPort ---------------------------------------------------------------------------------------------------

    @property
    @override
    def identity(self) -> NodeIdentity:
        return SessionMember.identity_of(secret(self.number))  # known before it is in the run

    @property
    @override
    def run_id(self) -> str:
        return self.world.state.run_id

    @property
    @override
    def ticket(self) -> str | None:
        return "psyche1simulated"

    @property
    @override
    def is_host(self) -> bool:
        return self.number == 1

    @property
    @override
    def state(self) -> Coordinator:
        return self.world.state

    @property
    def _member(self) -> SessionMember:
        assert self.member is not None
        return self.member

    @override
    def start(self) -> None:
        self.member = SessionMember(self.world, self.number, self)

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        self.take_hashes()
        if not self.queue:
            self.wait(timeout, for_action=True)
        action = self.queue.popleft() if self.queue else None
        self._to_be_hashed += isinstance(action, act.HashWeights)
        return action

    @override
    def is_cancelled(self, step: int) -> bool:
        return step in self.cancelled_steps

    def take_hashes(self) -> None:
        while self._to_be_hashed:
            step, digests = self._hashed.get(timeout=PATIENCE)
            self._to_be_hashed -= 1
            self.hashes[step] = tuple(digests)
            self._member.do(self._member.rounds.weights_hashed(step, digests, self.world.now))

    def _tell(self, what: Callable[[], list[act.Action]]) -> None:
        self.take_hashes()
        self._member.do(what())

    @override
    def initialized(self, plan: TilePlan, names: Sequence[str]) -> None:
        self._tell(lambda: self._member.rounds.initialized(plan, names, self.world.now))

    @override
    def initialization_failed(self, reason: str) -> None:
        self._tell(lambda: self._member.rounds.initialization_failed(reason, self.world.now))

    @override
    def trained(self, step: int, update: CompressedUpdate, own: object, *, loss: float | None = None) -> None:
        if loss is not None:
            self.losses[step] = loss
        self._tell(lambda: self._member.rounds.trained(step, update, own, self.world.now))

    @override
    def cancelled(self, step: int) -> None:
        self._tell(lambda: self._member.rounds.cancelled(step, self.world.now))

    @override
    def audited(self, step: int, trainer: bytes, found: Evidence, own: Evidence | None) -> None:
        self.audits.append((step, trainer, found, own))
        self._tell(lambda: self._member.rounds.audited(step, trainer, found, own, self.world.now))

    @override
    def momentum_committed(self, step: int, root: bytes, decays: Sequence[float]) -> None:
        self._tell(lambda: self._member.rounds.momentum_committed(step, root, decays, self.world.now))

    @override
    def momentum_opened(self, step: int, data: bytes) -> None:
        blob = blake3(data).digest()
        self._tell(lambda: self._member.rounds.momentum_opened(step, data, blob, self.world.now))

    @override
    def own_momentum_audited(self, step: int, noise: Noise) -> None:
        self.own_noise.append(noise)
        self._tell(lambda: self._member.rounds.own_momentum_audited(step, noise, self.world.now))

    @override
    def momentum_audited(self, step: int, trainer: bytes, verdict: Verdict) -> None:
        self.verdicts.append((step, trainer, verdict))
        self._tell(lambda: self._member.rounds.momentum_audited(step, trainer, verdict, self.world.now))

    @override
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        self._hashed.put((step, digests))

    @override
    def download_model(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Callable[[bytes, str, Sequence[str]], int | Mapping[str, int] | None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.LONG,
    ) -> SharedModel:
        attempts: dict[bytes, int] = dict.fromkeys(providers, ATTEMPTS)
        reason = "nobody is there"
        deadline = self.world.now + LOAD_SECONDS
        while attempts and self.world.now < deadline:
            peers = {p.key: p for p in self.world.ports if p.key and not p.closed and not p.killed}
            for peer in list(attempts):
                model = peers[peer].offered if peer in peers else None
                if model is None:
                    continue
                assert peers[peer].offered_digests == digests_of(model), "what is offered was changed"
                try:
                    if check is not None:
                        check(peer, model.config, list(model.parameters))
                except ProtocolError as error:
                    reason = str(error)
                    attempts[peer] -= 1
                    if not attempts[peer]:
                        del attempts[peer]
                    continue
                assert all(t.numel() * t.element_size() < max_parameter_bytes for t in model.parameters.values())
                return SharedModel(model.config, "", {n: t.clone() for n, t in model.parameters.items()})
            if patience is Patience.ONCE:
                break
            self.wait(TICK)
        raise ExchangeError(f"no peer shares the model: {reason}")

    @property
    def key(self) -> bytes:
        return self.member.key.public if self.member is not None else b""

    @override
    def offer_model(self, model: SharedModel) -> None:
        self.offered, self.offered_digests = model, digests_of(model)

    @override
    def withdraw_model(self) -> None:
        assert self.offered is None or self.offered_digests == digests_of(self.offered)
        self.offered = None

    @override
    def offer_live(self, live: LiveWeights | None) -> None:
        self.live = live

    @override
    def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors, *, seconds: float) -> FetchedTensors:
        # As a network would, and after a while: the others train on meanwhile, if they can.
        self.wait(TICK)
        return asyncio.run(fetch_differing(_Others(self), providers, wanted))

    @override
    def weights_repaired(self, step: int, digests: Sequence[bytes] | None) -> None:
        if digests is None:
            self._tell(lambda: self._member.rounds.repair_failed(step, self.world.now))
            return
        self.hashes[step] = tuple(digests)
        self._tell(lambda: self._member.rounds.weights_repaired(step, digests, self.world.now))

    @override
    def take_events(self) -> list[RunEvent]:
        events, self.events = self.events, []
        return events

    @override
    def view(self) -> RunView:
        state, member = self.world.state, self.member
        clients = [client.id for client in state.epoch_state.clients]
        if member is None:  # it has looked at the run and not joined
            return RunView(run_id=state.run_id, step=state.progress.step, num_peers=len(clients))
        return RunView(
            run_id=state.run_id,
            run_state=state.run_state.name,
            epoch=state.progress.epoch,
            step=state.progress.step,
            total_steps=state.config.total_steps,
            num_peers=len(clients),
            clients=tuple(client.p2p_identity for client in clients),
            peer_index=clients.index(member.id) if member.id in clients else None,
            stage=member.rounds.stage.name,
            fault=member.rounds.fault.reason if member.rounds.fault else None,
        )

    @override
    def close(self, timeout: float = 5.0) -> None:
        if not self.closed:
            self.closed = True
            if self.member is not None and self.member.alive:
                self.member.crash()


class _Others(TensorSource):
    """What the other sessions give of their weights in training."""

    def __init__(self, port: SimulatedPort) -> None:
        self.port = port

    def live_of(self, peer: bytes) -> LiveWeights:
        port = next((p for p in self.port.world.ports if p.key == peer and not p.closed and not p.killed), None)
        if port is None or port.live is None:
            raise ExchangeError("it is not there")
        return port.live

    @override
    async def ask_digests(self, peer: bytes, step: int, count: int) -> list[bytes]:
        digests = self.live_of(peer).digests(step)
        if digests is None:
            raise ExchangeError("it has gone on")
        return list(digests)

    @override
    async def ask_tensor(self, peer: bytes, wanted: WantedTensors, name: str) -> tuple[torch.Tensor, bytes]:
        tensor = self.live_of(peer).tensor(wanted.step, name)
        if tensor is None:
            raise ExchangeError("it has gone on")
        self.port.fetched_tensors.append((name, tensor.numel() * tensor.element_size()))
        return tensor, wanted.digest_of(name, tensor)


def digests_of(model: SharedModel) -> list[bytes]:
    return [tensor_digest(name, tensor) for name, tensor in model.parameters.items()]


class SessionWorld(World):
    """The simulator of rounds, with sessions for trainers."""

    def __init__(
        self,
        *,
        seed: int = 1,
        weather: Weather | None = None,
        lr: float = 0.0,
        resumed: Coordinator | None = None,
        checkpoint: Checkpoint = Hub(SHARED_BY_PEERS),  # noqa: B008 - it is frozen
        optimizer: OptimizerDefinition | None = None,
        **config: int,
    ) -> None:
        super().__init__(seed=seed, weather=weather, **config)
        model = replace(self.state.model, checkpoint=checkpoint, lr_schedule=ConstantLR(lr, lr, 0))
        if optimizer is not None:
            model = replace(model, optimizer=optimizer)
        self.host = RunHost(replace(self.state, model=model) if resumed is None else restartable(resumed, now=0))
        self.ports: list[SimulatedPort] = []
        self.back = threading.Semaphore(0)
        self.failures: list[BaseException] = []
        self._threads: dict[SimulatedPort, threading.Thread] = {}

    def port(self, number: int) -> SimulatedPort:
        port = SimulatedPort(self, number)
        self.ports.append(port)
        return port

    def run(self, port: SimulatedPort, script: Callable[[SimulatedPort], None]) -> None:
        """Starts ``script(port)`` in a thread of its own."""

        def body() -> None:
            assert port.go.acquire(timeout=PATIENCE)
            try:
                script(port)
            except Killed:
                pass
            except BaseException as error:
                self.failures.append(error)
            finally:
                port.ended = True
                self.back.release()

        port.wake_at = self.now
        self._threads[port] = threading.Thread(target=body, daemon=True)
        self._threads[port].start()

    def kill(self, port: SimulatedPort) -> None:
        """As ``kill -9`` would: nothing is said, nothing is saved."""
        port.killed = True
        assert port.member is not None
        port.member.crash()
        self._give_turns()

    def _give_turns(self) -> None:
        while ready := [port for port in self._threads if port.runnable]:
            for port in ready:
                self._give_turn(port)

    def _give_turn(self, port: SimulatedPort) -> None:
        port.wake_at = None
        port.go.release()
        assert self.back.acquire(timeout=PATIENCE)
        if port.ended:
            self._threads.pop(port).join(PATIENCE)
        if self.failures:
            raise self.failures[0]

    @override
    def step(self) -> None:
        self._give_turns()
        super().step()
        self._give_turns()

    def until_all_ended(self) -> None:
        """To the end of the run, and of all sessions."""
        self.until(lambda state: state.run_state is RunState.FINISHED)
        for _ in range(MORE_STEPS):
            if not self._threads:
                return
            self.step()
        raise AssertionError("a session does not end")

    def assert_equal_hashes(self) -> None:
        """All who looked at their weights at the same step saw the same."""
        for step in {step for port in self.ports for step in port.hashes}:
            assert len({port.hashes[step] for port in self.ports if step in port.hashes}) == 1, step

    def release(self) -> None:
        """Ends all threads, at the end of a test."""
        for port, thread in self._threads.items():
            port.killed = True
            port.go.release()
            thread.join(PATIENCE)
