"""How much a coordinator costs: 256 clients over TCP with rounds of a second, and up to 10,000 in one process.

    python benchmarks/coordinator.py                  # all of it, about a minute
    python benchmarks/coordinator.py --seconds 120    # a longer look at the server

The server runs in this process and the clients in another; both cores of a small machine are busy. Every client proves
its key, joins, reads every state and, when elected, sends its report. To leave the machine to the server, one client
decodes the states for all; the others only read them.

Psyche's own server has no published figures and needs a Rust build, so nothing stands beside ours here. The targets
are printed with the results, and the exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from distro_optim.comm import postcard
from distro_optim.comm.framing import ClientLink, Else, FrameDecoder, LinkState, SecretKey, encode_frame
from distro_optim.comm.streams import Stream, TcpListener, open_tcp
from distro_optim.coordinator.client.interface import CoordinatorClient
from distro_optim.coordinator.messages import (
    CLIENT_TO_SERVER,
    SERVER_TO_CLIENT,
    ClientToServerMessage,
    Join,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.rules.committee import CommitteeSelection
from distro_optim.coordinator.server.embedded import EmbeddedCoordinator
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.server import CoordinatorServer, unix_offset
from distro_optim.coordinator.server.service import CoordinatorService, frame_of
from distro_optim.coordinator.types import (
    MAX_NUM_CLIENTS,
    Coordinator,
    NodeIdentity,
    RunState,
    Witness,
    WitnessProof,
)
from distro_optim.testing.coordinator import DUMMY_CONFIG, dummy_run, metadata, report

CONFIG = replace(
    DUMMY_CONFIG,
    warmup_time=60,
    max_round_train_time=30,
    round_witness_time=1,
    cooldown_time=1,
    epoch_time=3600,
    total_steps=1_000_000,
    global_batch_size_start=1024,
    global_batch_size_end=1024,
)

TARGETS = {"tick": 50.0, "broadcast": 50.0, "encode": 2.0, "memory": 300.0}


def full_report(proof: WitnessProof, participants: Sequence[NodeIdentity]) -> Witness:
    """What a witness of a round sends in which everybody took part."""
    results = [hashlib.sha256(identity.signer + proof.position.to_bytes(8)).digest() for identity in participants]
    return report(proof, participants, results, os.urandom(64))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def seconds_of(action: Callable[[], object], repeats: int = 1) -> float:
    """The median over some repeats."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# -- the clients -------------------------------------------------------------------------------------------------------


class LeanClient:
    """A client that can speak, and that counts what it hears."""

    def __init__(self, number: int, stream: Stream) -> None:
        self.key = SecretKey(number.to_bytes(32, "big"))
        self.identity = NodeIdentity.from_single_key(self.key.public)
        self.stream = stream
        self.heard = 0

    async def say(self, message: ClientToServerMessage) -> None:
        await self.stream.write(encode_frame(CLIENT_TO_SERVER.encode(Else(message))))

    async def shake_hands(self) -> None:
        link = ClientLink(self.key, SERVER_TO_CLIENT, CLIENT_TO_SERVER)
        while link.state is not LinkState.OPEN:
            # No more than the challenge: what follows belongs to the reader of frames.
            link.receive(await self.stream.read(37 if not link.data_to_send() else 1))
            answer = link.data_to_send()
            if answer:
                await self.stream.write(answer)

    async def drain(self) -> None:
        while data := await self.stream.read(1 << 18):
            self.heard += len(data)


async def swarm(host: str, port: int, count: int) -> None:
    clients = []
    for number in range(1, count + 1):
        client = LeanClient(number, await open_tcp(host, port))
        await client.shake_hands()
        await client.say(Join("dummy"))
        clients.append(client)
    eyes, others = clients[0], clients[1:]
    drains = [asyncio.create_task(client.drain()) for client in others]
    by_identity = {client.identity: client for client in clients}
    decoder, newest = FrameDecoder(1 << 24), b""
    said: tuple[object, ...] = ()
    while data := await eyes.stream.read(1 << 18):
        frames = list(decoder.feed(data))
        eyes.heard += len(data)
        if not frames or frames[-1] == newest:
            continue
        newest = frames[-1]
        state = SERVER_TO_CLIENT.decode(newest).message.state
        now = (state.run_state, state.progress.step)
        if now != said:
            said = now
            await act(state, by_identity)
    await asyncio.gather(*drains, return_exceptions=True)
    print(f"clients: {sum(client.heard for client in clients) / 1e6:.0f} MB of states read", flush=True)


async def act(state: Coordinator, by_identity: dict[NodeIdentity, LeanClient]) -> None:
    """What every client has to say to a state that is new."""
    listed = state.epoch_state.clients
    if state.run_state is RunState.WARMUP:
        for index, member in enumerate(listed):
            ready = Witness(WitnessProof(index, index, False))
            await by_identity[member.id].say(WitnessMessage(WarmupStep(ready)))
    elif state.run_state is RunState.ROUND_TRAIN:
        selection = CommitteeSelection.for_round(state, state.current_round)
        # All saw the same, so one report with 32 proofs does, and this process has time to read.
        saw = full_report(WitnessProof(0, 0, True), [member.id for member in listed])
        for index, member in enumerate(listed):
            proof = selection.get_witness(index)
            if proof.witness:
                step = WitnessStep(replace(saw, proof=proof), metadata(state.progress.step))
                await by_identity[member.id].say(WitnessMessage(step))


# -- the server --------------------------------------------------------------------------------------------------------


class MeasuredServer(CoordinatorServer):
    """Notes how long each tick takes, and until all that it has to send is with the kernel."""

    def start_measuring(self) -> None:
        self.ticks: list[float] = []
        self.broadcasts: list[float] = []
        self.work: list[float] = []
        self.sizes: list[int] = []
        self._probes: set[asyncio.Task[None]] = set()

    def _tick(self) -> None:
        start, work = time.perf_counter(), time.process_time()
        super()._tick()
        self.ticks.append(time.perf_counter() - start)
        self.sizes.append(len(frame_of(self.service.host.state)))
        probe = asyncio.create_task(self._until_sent(start, work))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _until_sent(self, start: float, work: float) -> None:
        while any(session._waiting_since is not None for session in self.service.clients.values()):
            await asyncio.sleep(0.0005)
        self.broadcasts.append(time.perf_counter() - start)
        self.work.append(time.process_time() - work)


async def serve(num_clients: int, seconds: float) -> bool:
    host = RunHost(dummy_run(config=replace(CONFIG, init_min_clients=num_clients)))
    service = CoordinatorService(host, draw=os.urandom, unix_offset=unix_offset())
    listener = await TcpListener.bind("127.0.0.1", 0)
    server = MeasuredServer(service, [listener])
    server.start_measuring()
    async with server:
        command = [sys.executable, __file__, "--swarm", listener.address, "--clients", str(num_clients)]
        swarm_process = subprocess.Popen(command)
        while host.state.progress.step < 2:
            if swarm_process.poll() is not None:
                raise SystemExit("the clients failed")
            await asyncio.sleep(0.1)
        server.start_measuring()
        first, started = host.state.progress.step, time.perf_counter()
        await asyncio.sleep(seconds)
        rounds, elapsed = host.state.progress.step - first, time.perf_counter() - started
        results = {
            "tick": percentile(server.ticks, 0.99) * 1e3,
            "broadcast": percentile(server.broadcasts, 0.99) * 1e3,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        members = len(host.state.epoch_state.clients)
    swarm_process.wait(30)

    size = max(server.sizes) / 1024
    print(f"\n{members} clients over TCP, {rounds} rounds in {elapsed:.0f} s, states of {size:.0f} KiB")
    print(f"{'':24}{'median':>10}{'p99':>10}{'target':>10}")
    for name, times in (("tick", server.ticks), ("broadcast", server.broadcasts)):
        print(f"{name + ', ms':24}{statistics.median(times) * 1e3:10.1f}{results[name]:10.1f}{TARGETS[name]:10.0f}")
    # What is left of the broadcast when other programs, the clients among them, do not hold the processor.
    work = percentile(server.work, 0.99) * 1e3
    print(f"{'  processor time, ms':24}{statistics.median(server.work) * 1e3:10.1f}{work:10.1f}")
    print(f"{'memory, MiB':24}{'':10}{results['memory']:10.0f}{TARGETS['memory']:10.0f}")
    assert members == num_clients, "a client was lost"
    assert rounds >= seconds / 3, "the rounds did not go on"
    return all(value < TARGETS[name] for name, value in results.items())


# -- without a network -------------------------------------------------------------------------------------------------


def identity(number: int) -> NodeIdentity:
    return NodeIdentity.from_single_key(hashlib.sha256(number.to_bytes(4, "big")).digest())


def full_state() -> Coordinator:
    """The largest state there is: 256 clients, four rounds of 32 reports."""
    pending = [identity(number) for number in range(MAX_NUM_CLIENTS)]
    state, _ = machine.tick(dummy_run(config=CONFIG), pending, 10, 1)
    state, _ = machine.tick(state, None, 70, 2)
    now = 70
    for seed in range(4):
        selection = CommitteeSelection.for_round(state, state.current_round)
        for index, member in enumerate(state.epoch_state.clients):
            proof = selection.get_witness(index)
            if proof.witness:
                state = machine.witness(state, member.id, full_report(proof, pending), now)
        now += 1
        if seed < 3:
            state, _ = machine.tick(state, None, now, seed)
    return state


def with_new_reports(state: Coordinator) -> Coordinator:
    """The state as it is when all reports of its round have just come: their bytes are not kept yet."""
    epoch, rounds = state.epoch_state, list(state.epoch_state.rounds)
    newest = rounds[epoch.rounds_head]
    rounds[epoch.rounds_head] = replace(newest, witnesses=tuple(map(replace, newest.witnesses)))
    return replace(state, epoch_state=replace(epoch, rounds=tuple(rounds)))


def encoding() -> bool:
    state = full_state()
    encoded = postcard.encode(state)
    decoded = postcard.decode(Coordinator, encoded)
    assert decoded == state
    warm = seconds_of(lambda: postcard.encode(state), 50) * 1e3
    fresh = statistics.median(seconds_of(partial(postcard.encode, with_new_reports(state))) for _ in range(20)) * 1e3
    cold = seconds_of(lambda: postcard.encode(postcard.decode(Coordinator, encoded)), 10) * 1e3
    decode = seconds_of(lambda: postcard.decode(Coordinator, encoded), 10) * 1e3
    print(f"\nthe largest state, {len(encoded) / 1024:.0f} KiB: 256 clients, 128 reports")
    print(f"encode {warm:.2f} ms, with all 32 reports of a round new {fresh:.2f} ms (target {TARGETS['encode']:.0f})")
    print(f"decode {decode:.1f} ms, decode and encode {cold:.1f} ms")
    return fresh < TARGETS["encode"]


async def in_process(num_clients: int) -> tuple[float, ...]:
    """Seconds for: one join; a tick that waits; the tick that forms the epoch; a tick in training; its broadcast."""
    clock = [0]
    host = RunHost(dummy_run(config=CONFIG), max_pending=num_clients)
    coordinator = EmbeddedCoordinator(host, clock=lambda: clock[0])
    clients: list[CoordinatorClient] = [coordinator.client(identity(n), "dummy") for n in range(num_clients)]
    start = time.perf_counter()
    for client in clients:
        await client.join()
    join = (time.perf_counter() - start) / num_clients
    waiting = seconds_of(coordinator.tick, 20)
    clock[0] += 3
    forming = seconds_of(coordinator.tick)
    assert coordinator.state.run_state is RunState.WARMUP
    clock[0] += CONFIG.warmup_time
    coordinator.tick()
    assert coordinator.state.run_state is RunState.ROUND_TRAIN
    training = seconds_of(coordinator.tick, 20)
    clock[0] += CONFIG.max_round_train_time
    broadcast = seconds_of(coordinator.tick)
    assert all(client.state is coordinator.state for client in clients)
    return join, waiting, forming, training, broadcast


def growth() -> bool:
    sizes = (10, 100, 1_000, 10_000)
    asyncio.run(in_process(10))  # warms caches up
    rows = [asyncio.run(in_process(size)) for size in sizes]
    names = ("join", "tick, waiting", "tick, forms epoch", "tick, training", "tick and broadcast")
    print("\nclients in one process, microseconds")
    print(f"{'clients':>10}" + "".join(f"{name:>20}" for name in names))
    for size, row in zip(sizes, rows, strict=True):
        print(f"{size:>10}" + "".join(f"{value * 1e6:>20.1f}" for value in row))
    # A factor of 1,000 in clients may cost a factor of 1,000; a tenfold margin covers the clock at small numbers.
    per_client = [[value / size for value in row[1:]] for size, row in zip(sizes, rows, strict=True)]
    linear = all(last <= 10 * max(first, 1e-9) for first, last in zip(per_client[0], per_client[-1], strict=True))
    print("cost per client does not grow" if linear else "COST PER CLIENT GROWS")
    return linear


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=MAX_NUM_CLIENTS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring the server")
    parser.add_argument("--swarm", metavar="HOST:PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.swarm:
        host, _, port = arguments.swarm.rpartition(":")
        asyncio.run(swarm(host, int(port), arguments.clients))
        return 0
    results = [asyncio.run(serve(arguments.clients, arguments.seconds)), encoding(), growth()]
    print("\nall targets met" if all(results) else "\nTARGETS MISSED")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
