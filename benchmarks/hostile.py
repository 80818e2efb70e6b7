"""What can a stranger with a ticket cost the others? Honest peers over iroh on this machine, and one kind of attacker.

    python benchmarks/hostile.py                        # all kinds, one after another
    python benchmarks/hostile.py --only idle flood      # some of them
    python benchmarks/hostile.py --seconds 60           # longer windows

A host and two more peers train in this process; computing is a sleep, results are of the real codec. First they are
alone for so many seconds: that is what the attack is compared with. Then attackers come, in a process of their own,
with nothing but the run's ticket. Ten seconds after they are in the run the second window begins.

=============  =======================================================================================
idle           one member that does nothing at all
fifty          fifty idle members from one address
withhold       a member that announces its results and gives them to nobody
last           a member that finishes each round a second before its time is over
flood          a member that sends the largest messages on both channels as fast as it can
floods         four such members
sleeper        a member that does its work until it is off probation, and then floods
trickle        a member that sends the largest messages on both channels just within its share, and does its work
streams        a thousand streams on all protocols of the host, on which something is asked and never read
=============  =======================================================================================

Ends with status 1 if the honest peers made fewer than 0.8 of their rounds, if one of them was dropped, or if their
weights differ.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import os
import resource
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distro_optim.comm.carrying import MAX_CARRIED
from distro_optim.comm.iroh.blobs.request import ALPN as BLOBS_ALPN
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.gate import GateLimits
from distro_optim.comm.iroh.gossip.net import GOSSIP_ALPN
from distro_optim.comm.iroh.rendezvous import RENDEZVOUS_ALPN
from distro_optim.comm.iroh.sharing.live import ALPN as WEIGHTS_ALPN
from distro_optim.comm.iroh.sharing.messages import ALPN as SHARING_ALPN
from distro_optim.comm.iroh.streams import COORDINATOR_ALPN
from distro_optim.comm.iroh.swarm import IrohSwarm
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.comm.signing import SecretKey
from distro_optim.comm.swarm import MAX_ANNOUNCEMENT, Channel
from distro_optim.comm.tickets import BlobTicket
from distro_optim.compress import ParamSpec, make_plan
from distro_optim.coordinator.client.remote import RemoteCoordinator
from distro_optim.coordinator.remembering_codec import RememberingCodec
from distro_optim.coordinator.ticket import RunTicket, connector
from distro_optim.coordinator.types import ON_PROBATION
from distro_optim.errors import DistroError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.rounds import actions as act
from distro_optim.testing.updates import random_update

HONEST = 3
TARGET = 0.8
SETTLE_SECONDS = 10.0
WAIT_SECONDS = 120.0
ROUND_SECONDS = 20  # max_round_train_time
WARMUP_SECONDS = 20
MEMBERS_PER_NODE = 4
FLOODS = 4
STATE_BYTES = 300
LOOPBACK: dict[str, Any] = {"relay": "none", "bind_addr": "127.0.0.1:0"}
PLAN = make_plan([ParamSpec((256, 256), torch.float32, torch.device("cpu"), 0, 64, 8) for _ in range(4)], "padded")
NAMES = [f"w{number}" for number in range(len(PLAN))]


class Peer:
    """A training thread that sleeps where others compute; its weights are a hash of what was applied.

    Args:
        port: the run.
        compute: seconds of a step, given the step.
    """

    def __init__(self, port: Runtime, compute: Callable[[int], float]) -> None:
        self.port = port
        self.compute = compute
        self.update = random_update(PLAN, quantized=True, seed=secrets.randbelow(1 << 20))
        self.state = torch.zeros(32, dtype=torch.uint8)
        self.digests: dict[int, bytes] = {}
        self.epochs_missed = 0
        self.error: BaseException | None = None
        self.ended = False
        self.thread = threading.Thread(target=self._main, daemon=True)

    def start(self) -> None:
        self.port.start()
        self.thread.start()

    def _main(self) -> None:
        try:
            while not self.ended:
                action = self.port.next_action(1.0)
                if isinstance(action, act.RunEnded):
                    return
                self._carry_out(action)
        except BaseException as error:
            if not self.ended:
                self.error = error

    def _carry_out(self, action: object) -> None:
        port = self.port
        match action:
            case act.Initialize(providers=providers):
                try:
                    if providers:
                        model = port.download_model(providers, max_parameter_bytes=1 << 20)
                        self.state = model.parameters["state"].clone()
                    self._offer()
                    port.initialized(PLAN, NAMES)
                except DistroError as error:
                    port.initialization_failed(str(error))
            case act.TrainBatch(step=step):
                end = time.monotonic() + self.compute(step)
                while (left := end - time.monotonic()) > 0 and not port.is_cancelled(step):
                    time.sleep(min(0.02, left))
                if port.is_cancelled(step):
                    port.cancelled(step)
                else:
                    port.trained(step, self.update, None, loss=1.0)
            case act.ApplyResults(updates=updates):
                digest = hashlib.sha256(bytes(self.state.tolist()))
                for update in updates:
                    digest.update(update.index[0].numpy().tobytes())
                self.state = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
            case act.HashWeights(step):
                self.digests[step] = bytes(self.state.tolist())
                port.weights_hashed(step, [self.digests[step]] * len(PLAN))
            case act.FinishEpoch():
                self._offer()
            case act.Desynced():
                self.epochs_missed += 1

    def _offer(self) -> None:
        self.port.offer_model(SharedModel("{}", parameters={"state": self.state.clone()}))

    def close(self) -> None:
        self.ended = True
        self.port.close()
        self.thread.join()


# -- attackers, in a process of their own ------------------------------------------------------------------------------


def attack(kind: str, ticket: str) -> None:
    """Never returns."""
    os.nice(19)  # what an attacker computes is not what it costs the others
    torch.set_num_threads(1)
    if kind in ("idle", "fifty", "streams"):
        loop = LoopThread("attack")
        work = open_streams(ticket, loop) if kind == "streams" else be_idle(ticket, loop, 50 if kind == "fifty" else 1)
        loop.run(work)
        return
    port = Runtime.connect(ticket, **LOOPBACK)
    peer = Peer(port, lambda _: ROUND_SECONDS - 1 if kind == "last" else 0.05)
    if kind == "withhold":
        withhold(port)
    peer.start()
    if kind == "sleeper":
        while port.state is None or not is_regular(port):
            time.sleep(0.1)
    print("in", flush=True)
    if kind in ("flood", "floods", "sleeper"):
        flood(port)
    if kind == "trickle":
        flood(port, rate=0.9 * GateLimits().bytes_per_second)
    peer.thread.join()
    raise SystemExit(f"the attacker ended: {peer.error}")


def read_nothing() -> None:
    """Clients take the first state for all that follow: fifty that read each would be busier than the run."""
    decode = RememberingCodec.decode

    def look_once(self: RememberingCodec, data: Any, **options: Any) -> Any:
        if self._payload is not None and len(self._payload) > STATE_BYTES < len(data):
            return self._value
        return decode(self, data, **options)

    RememberingCodec.decode = look_once  # type: ignore[method-assign]


async def be_idle(ticket: str, loop: LoopThread, count: int) -> None:
    read_nothing()
    run = RunTicket.parse(ticket)
    # An endpoint takes only a few connections of one other.
    nodes = [Node(loop=loop, **LOOPBACK) for _ in range(-(-count // MEMBERS_PER_NODE))]

    async def stay(number: int) -> None:
        node = nodes[number % len(nodes)]
        while True:
            try:
                client = RemoteCoordinator(connector(run, node), SecretKey(os.urandom(32)), run.run_id)
                await client.join()
                async for _ in client.states():
                    pass
            except DistroError:
                await asyncio.sleep(1.0)

    members = [asyncio.create_task(stay(number)) for number in range(count)]
    print("in", flush=True)
    await asyncio.gather(*members)


def withhold(port: Runtime) -> None:
    """What it announces is stored nowhere, under the true hash, and does not come along."""
    source = port._source
    real_open = source.open

    async def open_link() -> Any:
        link = await real_open()
        swarm, publish, announce = link.swarm, link.swarm.publish, link.swarm.announce

        async def hide(data: bytes, tag: str) -> BlobTicket:
            blob = await publish(data, tag)
            if len(data) > 64:
                swarm.forget(lambda other: other == tag)
            return blob

        async def say(data: bytes, *, channel: Channel = Channel.RUN, carrying: bytes | None = None) -> None:
            await announce(data, channel=channel)

        swarm.publish = hide  # type: ignore[method-assign]
        swarm.announce = say  # type: ignore[method-assign]
        return link

    source.open = open_link  # type: ignore[method-assign]


def is_regular(port: Runtime) -> bool:
    state = port.state
    return state is not None and any(
        client.id == port.identity and client.exited_height != ON_PROBATION for client in state.epoch_state.clients
    )


def flood(port: Runtime, rate: float | None = None) -> None:
    """The longest messages on both channels, so many bytes a second on each, or as many as it can."""
    link = port._link
    assert link is not None
    swarm = link.swarm
    assert isinstance(swarm, IrohSwarm)
    swarm._may_carry = lambda blob: True  # type: ignore[method-assign]

    async def send(blob: bytes | None) -> None:
        pause = (MAX_ANNOUNCEMENT + len(blob or b"")) / rate if rate else 0.0
        while True:
            for _ in range(1 if rate else 50):
                await swarm.announce(os.urandom(MAX_ANNOUNCEMENT), carrying=blob)
            await asyncio.sleep(pause)

    for blob in (None, os.urandom(MAX_CARRIED)):
        port._loop.submit(send(blob))


async def open_streams(ticket: str, loop: LoopThread) -> None:
    endpoint = RunTicket.parse(ticket).endpoint
    assert endpoint is not None
    alpns = (COORDINATOR_ALPN, GOSSIP_ALPN, BLOBS_ALPN, SHARING_ALPN, WEIGHTS_ALPN, RENDEZVOUS_ALPN)
    held: list[Any] = []

    async def ask(connection: Any) -> None:
        try:
            send, recv = await connection.open_bi()
            await send.write(b"\x00" * 64)
            held.append((send, recv))
        except DistroError:
            await asyncio.sleep(0.2)

    async def keep_opening(alpn: bytes) -> None:
        while True:
            node = Node(loop=loop, **LOOPBACK)
            try:
                connection = await node.connect(endpoint, alpn)
                await asyncio.gather(*(ask(connection) for _ in range(1000 // len(alpns))))
            except DistroError:
                await asyncio.sleep(0.2)
            await asyncio.sleep(1.0)
            held.clear()
            await node.aclose()

    print("in", flush=True)
    await asyncio.gather(*map(keep_opening, alpns))


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Window:
    """What the honest peers did in some seconds: rounds a second, and what this process took."""

    rounds: float
    cpu: float
    megabytes: float


@dataclass
class Outcome:
    kind: str
    before: Window
    during: Window
    dropped: list[str]
    ok: bool


def megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(peers: list[Peer], seconds: float) -> Window:
    host, most = peers[0].port, 0.0
    began, cpu, step = time.monotonic(), time.process_time(), host.view().step
    while (now := time.monotonic()) < began + seconds:
        check(peers)
        most = max(most, megabytes())
        time.sleep(0.25)
    took = now - began
    return Window((host.view().step - step) / took, (time.process_time() - cpu) / took, most)


def check(peers: list[Peer]) -> None:
    for peer in peers:
        if peer.error is not None:
            raise peer.error


def until(peers: list[Peer], wanted: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not wanted():
        check(peers)
        if time.monotonic() > deadline:
            raise SystemExit(f"within {WAIT_SECONDS:g} s it never came to this: {what}; {peers[0].port.view()}")
        time.sleep(0.05)


def run_beside(kind: str, seconds: float, compute: float) -> Outcome:
    config = RunConfig(
        total_steps=1_000_000,
        global_batch_size=32,
        peers_to_start=HONEST,
        warmup_time=WARMUP_SECONDS,
        epoch_time=3600,
        joiner_wait_time=2,
        max_round_train_time=ROUND_SECONDS,
    )
    peers = [Peer(Runtime.connect(config=config, **LOOPBACK), lambda _: compute)]
    attackers: list[subprocess.Popen[str]] = []
    try:
        peers[0].start()
        ticket = peers[0].port.ticket
        assert ticket is not None
        for _ in range(HONEST - 1):
            peers.append(Peer(Runtime.connect(ticket, **LOOPBACK), lambda _: compute))
            peers[-1].start()
        until(peers, lambda: peers[0].port.view().step > 10, "ten rounds")
        before = measure(peers, seconds)
        count = FLOODS if kind == "floods" else 1
        for _ in range(count):
            attackers.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--attack", kind, "--ticket", ticket], stdout=subprocess.PIPE, text=True
                )
            )
        for attacker in attackers:
            assert attacker.stdout is not None
            attacker.stdout.readline()
        if kind != "streams":
            until(peers, lambda: listed(peers[0]) > HONEST, "an attacker is in the run")
        time.sleep(SETTLE_SECONDS)
        during = measure(peers, seconds)
        members = {client.id for client in state_of(peers[0]).epoch_state.clients}
        dropped = [str(number) for number, peer in enumerate(peers) if peer.port.identity not in members]
        dropped += [f"{number} out of step" for number, peer in enumerate(peers) if peer.epochs_missed]
        common = set.intersection(*(set(peer.digests) for peer in peers))
        equal = all(len({peer.digests[step] for peer in peers}) == 1 for step in common)
        if not equal:
            dropped.append("weights differ")
        ok = not dropped and during.rounds >= TARGET * before.rounds
        return Outcome(kind, before, during, dropped, ok)
    finally:
        for attacker in attackers:
            attacker.kill()
            attacker.wait()
        for peer in reversed(peers):
            peer.close()
        gc.collect()


def state_of(peer: Peer) -> Any:
    state = peer.port.state
    assert state is not None
    return state


def listed(peer: Peer) -> int:
    return len(state_of(peer).epoch_state.clients)


KINDS = ("idle", "fifty", "withhold", "last", "flood", "floods", "sleeper", "trickle", "streams")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each window")
    parser.add_argument("--compute", type=float, default=0.25, help="seconds of a step")
    parser.add_argument("--attack", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--ticket", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.attack:
        attack(args.attack, args.ticket)
        return 1
    torch.set_num_threads(1)
    print(f"{HONEST} honest peers, {args.compute:g} s of computing a round, windows of {args.seconds:g} s")
    print(
        f"{'':10}{'rounds/s':>10}{'attacked':>10}{'share':>8}{'CPU':>8}{'attacked':>10}{'MB':>8}{'attacked':>10}  lost"
    )
    missed = False
    for kind in args.only:
        outcome = run_beside(kind, args.seconds, args.compute)
        before, during = outcome.before, outcome.during
        print(
            f"{kind:10}{before.rounds:10.2f}{during.rounds:10.2f}{during.rounds / before.rounds:8.2f}"
            f"{before.cpu:8.2f}{during.cpu:10.2f}{before.megabytes:8.0f}{during.megabytes:10.0f}"
            f"  {', '.join(outcome.dropped) or 'nobody'}",
            flush=True,
        )
        missed |= not outcome.ok
    print(f"target: at least {TARGET} of the rounds, and nobody honest lost: {'MISSED' if missed else 'met'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
