"""How long is a round beside the computing in it? Runtimes of several peers, a shaped network, and a step of a second.

    python benchmarks/rounds.py                 # 4 peers, 50 Mbit/s, 80 ms there and back
    python benchmarks/rounds.py --peers 8 --rtt 0.16 --bandwidth 20e6
    python benchmarks/rounds.py --iroh --peers 16 --parameters 1000000

Every peer has a line of so many bits a second in each direction; announcements, results and the coordinator's messages
share it. The first peer hosts. Computing is a sleep, so that peers in one process do not slow each other down as they
would not on machines of their own; results are of the real codec and have a real size. Beside it: the same run with the
whole seconds that Psyche's coordinator needs, and what exchanging the gradients would take on that line.

With ``--iroh`` each peer is a process with a real endpoint on loopback instead, as unshaped as that is, and what is
printed is the CPU of a peer in a round: everything that a round costs but training and merging, with QUIC and all
signatures. The processes are forks of one that has loaded everything. With ``--one-process`` all peers are in one, and
what it spends is divided among them: so they wake each other less often, but a signature is checked once for all.

At the end all peers must have applied the same results in the same order.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from distro_optim.comm.loop import LoopThread
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.streams import MemoryListener, Stream
from distro_optim.compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.server import CoordinatorServer, unix_offset
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.types import BatchId
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.network.coordinating import LIMITS
from distro_optim.strategy.network.link import RunLink, RunSource
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.rounds import actions as act
from distro_optim.strategy.rounds.results import encode_result
from distro_optim.testing.model_exchange import MemoryModels
from distro_optim.testing.swarm import MemoryNetwork
from distro_optim.testing.updates import random_update

Pipe = multiprocessing.connection.Connection

RUN_ID = "benchmark"
CHUNK, TOPK = 64, 8
SECONDS = 120.0
TARGET = 1.1
BITS = 8


def plan_of(parameters: int) -> TilePlan:
    """A model of square matrices with about so many parameters, as a transformer has them."""
    side = 768
    count = max(1, round(parameters / side**2))
    specs = [ParamSpec((side, side), torch.float32, torch.device("cpu"), 0, CHUNK, TOPK) for _ in range(count)]
    return make_plan(specs, "padded")


# -- a coordinator at the end of a line --------------------------------------------------------------------------------


class ShapedStream(Stream):
    """What is written arrives as late as the network says, in order."""

    def __init__(self, stream: Stream, network: MemoryNetwork, me: bytes, other: bytes) -> None:
        self._stream = stream
        self._network = network
        self._ends = (me, other)
        self._last: asyncio.Task[None] | None = None

    @property
    def peer(self) -> str:
        return self._stream.peer

    async def read(self, max_bytes: int = 1 << 16) -> bytes:
        return await self._stream.read(max_bytes)

    async def write(self, data: bytes) -> None:
        delay = self._network.transit(*self._ends, len(data))
        self._last = asyncio.create_task(self._arrive(self._last, bytes(data), delay))

    async def _arrive(self, before: asyncio.Task[None] | None, data: bytes, delay: float) -> None:
        await asyncio.sleep(delay)
        if before is not None:
            await asyncio.wait({before})
        try:
            await self._stream.write(data)
        except OSError:
            pass

    async def close(self) -> None:
        await self._stream.close()


class ShapedListener(MemoryListener):
    """The host's side of it: what it writes takes up its own line."""

    def __init__(self, network: MemoryNetwork, host: bytes) -> None:
        super().__init__()
        self._network = network
        self._host = host
        self.callers: list[bytes] = []

    async def accept(self) -> Stream:
        stream = await super().accept()
        peer = self.callers.pop(0)
        return stream if peer == self._host else ShapedStream(stream, self._network, self._host, peer)

    async def connect_from(self, peer: bytes) -> Stream:
        self.callers.append(peer)
        stream = await self.connect()
        return stream if peer == self._host else ShapedStream(stream, self._network, peer, self._host)


@dataclass
class Settings:
    peers: int
    rounds: int
    compute: float
    bandwidth: float
    rtt: float
    parameters: int


def config_of(settings: Settings, **config: Any) -> RunConfig:
    return RunConfig(
        run_id=RUN_ID,
        total_steps=settings.rounds,
        global_batch_size=4 * settings.peers,
        min_peers=settings.peers,
        epoch_time=3600,
        max_round_train_time=60,
        **config,
    )


class Arena:
    """One run."""

    def __init__(self, settings: Settings, plan: TilePlan, **config: Any) -> None:
        self.settings, self.plan = settings, plan
        self.loop = LoopThread("benchmark")
        self.keys = [SecretKey(number.to_bytes(32, "big")) for number in range(1, settings.peers + 1)]
        self.room: dict[bytes, SharedModel] = {}
        self.config = config_of(settings, **config)

    async def begin(self) -> None:
        self.network = MemoryNetwork(
            latency=(self.settings.rtt / 2, self.settings.rtt / 2), bandwidth=self.settings.bandwidth
        )
        self.listener = ShapedListener(self.network, self.keys[0].public)
        service = CoordinatorService(
            RunHost(self.config.coordinator_state(RUN_ID)),
            draw=os.urandom,
            unix_offset=unix_offset(),
            limits=LIMITS,
        )
        self.server = CoordinatorServer(service, [self.listener])
        await self.server.__aenter__()


class Source(RunSource):
    is_host = False

    def __init__(self, arena: Arena, key: SecretKey) -> None:
        self.arena, self.key, self.run_id = arena, key, RUN_ID

    async def open(self) -> RunLink:
        arena, me = self.arena, self.key.public
        coordinator = RemoteCoordinator(lambda: arena.listener.connect_from(me), self.key, RUN_ID)
        await coordinator.join()
        swarm = arena.network.join(secret_key=self.key)

        async def aclose() -> None:
            await coordinator.close()
            await swarm.aclose()

        return RunLink(
            coordinator=coordinator, swarm=swarm, models=MemoryModels(me, arena.room), ticket=None, aclose=aclose
        )


class Peer:
    """A training thread that sleeps where others compute."""

    def __init__(self, settings: Settings, plan: TilePlan, number: int, port: Runtime) -> None:
        self.settings, self.plan = settings, plan
        self.port = port
        self.update: CompressedUpdate = random_update(plan, quantized=True, seed=number)
        self.began: list[tuple[float, float]] = []
        self.spent: list[float] = []  # CPU seconds of this process, when a round began
        self.digests: dict[int, bytes] = {}
        self.applied = hashlib.sha256()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._main, daemon=True)

    def _main(self) -> None:
        try:
            while not isinstance(action := self.port.next_action(SECONDS), act.RunEnded):
                assert action is not None, self.port.view()
                self._carry_out(action)
        except BaseException as error:
            self.error = error

    def _carry_out(self, action: object) -> None:
        port = self.port
        match action:
            case act.Initialize():
                port.offer_model(SharedModel("{}"))
                port.initialized(self.plan, [f"w{n}" for n in range(len(self.plan))])
            case act.TrainBatch(step=step):
                began = time.monotonic()
                self.spent.append(time.process_time())
                time.sleep(self.settings.compute)
                # On a machine with other work a second is longer than a second.
                self.began.append((began, time.monotonic() - began))
                port.trained(step, self.update, None, loss=1.0)
            case act.ApplyResults(updates=updates):
                for update in updates:
                    self.applied.update(update.index[0].numpy().tobytes())
            case act.HashWeights(step):
                self.digests[step] = self.applied.digest()
                port.weights_hashed(step, [self.digests[step]] * len(self.plan))


@dataclass
class Outcome:
    mean: float
    worst: float
    compute: float
    traffic: float


def train(peers: list[Peer]) -> None:
    """To the end of the run, in which all must have applied the same."""
    for peer in peers:
        peer.thread.start()
    for peer in peers:
        peer.thread.join()
        if peer.error is not None:
            raise peer.error
    compare([peer.digests for peer in peers], peers[0].settings.rounds)


def compare(digests: list[dict[int, bytes]], rounds: int) -> None:
    """All peers must have applied the same."""
    common = set.intersection(*map(set, digests))
    assert len(common) >= rounds - 2, "too few rounds were compared"
    for step in common:
        assert len({applied[step] for applied in digests}) == 1, f"the peers differ at step {step}"


@dataclass
class Report:
    """What a peer over iroh says in the end.

    Attributes:
        began: when its rounds began.
        spent: CPU seconds of its process then.
        digests: of what it had applied, by step.
        traffic: bytes sent and received.
    """

    began: list[float]
    spent: list[float]
    digests: dict[int, bytes]
    traffic: int


def one_over_iroh(settings: Settings, plan: TilePlan, number: int, wire: Pipe, ticket: str | None) -> None:
    """A process: joins and says its ticket, says its :class:`Report`, waits until all have, and leaves."""
    loopback: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0"}
    config = config_of(settings) if ticket is None else None
    port = Runtime.connect(ticket, config=config, **loopback)
    port.start()
    wire.send(port.ticket)
    peer = Peer(settings, plan, number, port)
    peer.thread.start()
    peer.thread.join()
    view = port.view()
    report = Report([began for began, _ in peer.began], peer.spent, peer.digests, view.bytes_sent + view.bytes_received)
    wire.send(peer.error if peer.error is not None else report)
    wire.recv()
    port.close()


def measure_iroh(settings: Settings, plan: TilePlan, *, together: bool = False) -> tuple[float, float, float]:
    """Median seconds of a round, CPU seconds of a peer in a round, and bytes of a peer in a round.

    Args:
        together: all peers are threads of this process.
    """
    context = multiprocessing.get_context("fork")
    wires: list[Pipe] = []
    processes: list[Any] = []
    ticket: str | None = None
    try:
        for number in range(settings.peers):
            ours, theirs = context.Pipe()
            start = threading.Thread if together else context.Process
            processes.append(start(target=one_over_iroh, args=(settings, plan, number, theirs, ticket), daemon=True))
            processes[-1].start()
            wires.append(ours)
            # One after the other, or two cores are so busy with handshakes that all of them take too long.
            joined = ours.recv()
            ticket = ticket or joined
        waiting = list(wires)
        reports: list[Report] = []
        while waiting:
            for wire in multiprocessing.connection.wait(waiting):
                waiting.remove(wire)
                report = wire.recv()
                if isinstance(report, BaseException):
                    raise report
                reports.append(report)
        for wire in reversed(wires):  # the host last
            wire.send(None)
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in [] if together else processes:
            process.kill()
    compare([report.digests for report in reports], settings.rounds)
    # The first rounds have nothing to fetch.
    rounds = [b - a for report in reports for a, b in pairwise(report.began[2:])]
    sharing = settings.peers if together else 1
    cpu = [(report.spent[-1] - report.spent[2]) / (len(report.spent) - 3) / sharing for report in reports]
    traffic = statistics.mean(report.traffic for report in reports) / settings.rounds
    return statistics.median(rounds), statistics.mean(cpu), traffic


def measure(settings: Settings, plan: TilePlan, **config: Any) -> Outcome:
    arena = Arena(settings, plan, **config)
    arena.loop.run(arena.begin(), SECONDS)
    ports = [Runtime(Source(arena, key), loop=arena.loop) for key in arena.keys]
    peers = [Peer(settings, plan, number, port) for number, port in enumerate(ports)]
    for port in ports:
        port.start()
    train(peers)
    view = peers[-1].port.view()
    for peer in peers:
        peer.port.close()
    arena.loop.run(arena.server.close(), SECONDS)
    arena.loop.stop()
    # The first rounds have nothing to fetch.
    pairs = [pair for peer in peers for pair in zip(peer.began[2:], peer.began[3:], strict=False)]
    rounds = [b[0] - a[0] for a, b in pairs]
    compute = statistics.mean(a[1] for a, _ in pairs)
    return Outcome(
        statistics.mean(rounds), max(rounds), compute, (view.bytes_sent + view.bytes_received) / settings.rounds
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--compute", type=float, default=1.0, help="seconds of a step")
    parser.add_argument("--bandwidth", type=float, default=50e6, help="bits a second of each peer's line")
    parser.add_argument("--rtt", type=float, default=0.08, help="seconds there and back")
    parser.add_argument("--parameters", type=int, default=120_000_000)
    parser.add_argument("--iroh", action="store_true", help="real endpoints on loopback; prints CPU seconds")
    parser.add_argument("--one-process", action="store_true", help="with --iroh: all peers in one process")
    options = vars(parser.parse_args())
    over_iroh, together = options.pop("iroh"), options.pop("one_process")
    settings = Settings(**options)
    torch.set_num_threads(1)
    plan = plan_of(settings.parameters)
    blob, _ = encode_result(random_update(plan, quantized=True, seed=0), step=1, trainer_nonce=0, batch=BatchId(0, 1))
    if over_iroh:
        seconds, cpu, traffic = measure_iroh(settings, plan, together=together)
        where = " in one process" if together else ""
        print(
            f"{settings.peers} peers{where} over iroh on loopback, {settings.compute:g} s of computing, "
            f"{len(blob) / 1e3:.0f} KB a result: a round takes {seconds:.2f} s and each peer "
            f"{1000 * cpu:.0f} ms of CPU; {traffic / 1e3:.0f} KB of a peer with peers in a round; "
            "weights equal on all peers"
        )
        return 0
    parameters = sum(torch.Size(spec.shape).numel() for spec in plan.specs)
    print(
        f"{settings.peers} peers, {settings.bandwidth / 1e6:g} Mbit/s, {1000 * settings.rtt:g} ms there and back, "
        f"{settings.compute:g} s of computing, {parameters / 1e6:.0f} million parameters, "
        f"{len(blob) / 1e3:.0f} KB a result"
    )
    own = measure(settings, plan)
    # Psyche's shortest phases; only our own coordinator can do without them.
    whole = measure(replace(settings, rounds=max(6, settings.rounds // 2)), plan, round_witness_time=1)
    # A ring: each peer sends and receives every gradient about twice, in 16 bits.
    share = 2 * (settings.peers - 1) / settings.peers
    ring = settings.compute + share * parameters * 16 / settings.bandwidth
    print(f"{'':34}{'mean':>8} {'worst':>8} {'of computing':>13}")
    for name, mean, worst, compute in (
        ("a round, hosted by a peer", own.mean, f"{own.worst:.3f}", own.compute),
        ("with Psyche's whole seconds", whole.mean, f"{whole.worst:.3f}", whole.compute),
        ("exchanging gradients (computed)", ring, "", settings.compute),
    ):
        print(f"{name:34}{mean:7.3f}s {worst:>8} {mean / compute:12.2f}x")
    print(f"traffic of a peer with peers: {own.traffic / 1e3:.0f} KB a round; weights equal on all peers")
    ratio = own.mean / own.compute
    print(f"target: at most {TARGET} times the computing: {'met' if ratio <= TARGET else 'MISSED'}")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
