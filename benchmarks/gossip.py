"""Gossip: one hop between two processes, and a flow to eight neighbours, beside the Rust peer in the same run.

    python benchmarks/gossip.py             all of it, about a minute
    python benchmarks/gossip.py latency     one part: latency, flow, simulation or memory

latency     a message of 100 bytes every 5 ms, and every ms; from the call of ``broadcast`` in one process until the
            application of another has it. Both read the same monotonic clock. The rarer the messages, the colder the
            caches.
flow        one node sends messages of 1 KiB, as fast as ``broadcast`` lets it and 2,000 a second, to eight neighbours,
            whole nodes in two other processes, that may talk to nobody but it. The rate counts messages that all
            eight have, contents checked; the share of a core is what the sender takes while it sends.
simulation  200 nodes: share of duplicate payloads when links change on evidence, as ours do, and when they change on
            every single message, as the paper and iroh-gossip say.
memory      resident memory of a process with a node in one topic, without torch.

Everything goes over loopback, without relay. The Rust peer (iroh-gossip 0.97, called from Python) comes with
``pip install aster-rpc==0.1.2``; without it its rows are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

TOPIC = b"benchmark".ljust(32)
INTRODUCTION = b"benchmark/introduction"
LOOPBACK = {"bind_addr": "127.0.0.1:0", "relay": "none", "discovery": False}
LATENCY_MESSAGES = 400
LATENCY_INTERVALS = (0.005, 0.001)
FLOW_MESSAGES = 10_000
FLOW_SIZE = 1024
FLOW_RATE = 2000
NEIGHBORS = 8
PROCESS_SECONDS = 60.0

Receive = Callable[[bytes], None]


# -- peers: both kinds behind the same three verbs ---------------------------------------------------------------------


class PythonPeer:
    """One of our nodes."""

    def __init__(self, only: str | None = None) -> None:
        from distro_optim.comm.iroh.endpoint import Node
        from distro_optim.comm.iroh.gossip.config import PSYCHE_GOSSIP
        from distro_optim.comm.iroh.gossip.net import GossipService, ServiceLimits

        self.node = Node(**LOOPBACK, allowed=None if only is None else [bytes.fromhex(only)])
        self.service = GossipService(self.node, PSYCHE_GOSSIP, limits=ServiceLimits(queue=1 << 17))

    async def start(self, receive: Receive, bootstrap: tuple[str, list[str]] | None) -> tuple[str, list[str]]:
        from distro_optim.comm.addresses import EndpointAddr, SocketAddr

        await self.node.bind()
        peers = []
        if bootstrap is not None:
            peers = [EndpointAddr(bytes.fromhex(bootstrap[0]), (), tuple(map(SocketAddr.parse, bootstrap[1])))]
        self.node.accept(INTRODUCTION, lambda connection: connection.closed())
        self.topic = await self.service.join(TOPIC, peers)
        self.reader = asyncio.create_task(self._read(receive))
        if peers:
            await self.topic.joined(20)
        address = self.node.addr()
        return address.id.hex(), [str(place) for place in address.direct]

    async def _read(self, receive: Receive) -> None:
        async for message in self.topic:
            receive(message.content)

    async def broadcast(self, content: bytes) -> None:
        await self.topic.broadcast(content)

    async def neighbors(self, count: int) -> None:
        while len(self.topic.neighbors) < count:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        await self.service.aclose()
        await self.reader
        await self.node.aclose()


class RustPeer:
    """One node of iroh-gossip 0.97."""

    def __init__(self, only: str | None = None) -> None:
        # It cannot be told whom to talk to.
        pass

    async def start(self, receive: Receive, bootstrap: tuple[str, list[str]] | None) -> tuple[str, list[str]]:
        from aster import _aster

        config = _aster.EndpointConfig(alpns=[], relay_mode="disabled", bind_addr="127.0.0.1:0")
        self.node = await _aster.IrohNode.memory_with_alpns([INTRODUCTION], config)
        ids = []
        if bootstrap is not None:
            there = _aster.NodeAddr(bootstrap[0], direct_addresses=bootstrap[1])
            await _aster.net_client(self.node).connect_node_addr(there, INTRODUCTION)
            ids = [bootstrap[0]]
        # Returns only once there is a neighbour.
        subscribing = asyncio.ensure_future(_aster.gossip_client(self.node).subscribe(TOPIC, ids))
        self.reader = asyncio.create_task(self._read(subscribing, receive))
        self.subscribing = subscribing
        if ids:
            await asyncio.shield(subscribing)
        info = self.node.node_addr_info()
        return info.endpoint_id, list(info.direct_addresses)

    async def _read(self, subscribing: Awaitable[Any], receive: Receive) -> None:
        self.topic = await subscribing
        while True:
            kind, data = await self.topic.recv()
            if kind == "received":
                receive(bytes(data))

    async def broadcast(self, content: bytes) -> None:
        await self.topic.broadcast(content)

    async def neighbors(self, count: int) -> None:
        await asyncio.shield(self.subscribing)

    async def close(self) -> None:
        self.reader.cancel()
        await asyncio.wait([self.reader])
        await self.node.shutdown()


PEERS = {"python": PythonPeer, "rust": RustPeer}


# -- the receiving process: told by one line of JSON what to do, answers with another ----------------------------------


async def receive_process(order: dict[str, Any]) -> None:
    arrived: list[float] = []
    counts = [0] * order["nodes"]
    wrong = 0
    done = asyncio.Event()

    def receiver(k: int) -> Receive:
        def receive(content: bytes) -> None:
            nonlocal wrong
            now = time.monotonic()
            if order["what"] == "latency":
                arrived.append(now - float(content[:24]))
            elif content != payload(int.from_bytes(content[:4], "big")):
                wrong += 1
            counts[k] += 1
            if min(counts) == order["messages"]:
                done.set()

        return receive

    peers = [PEERS[order["kind"]](order["bootstrap"][0]) for _ in range(order["nodes"])]
    for k, peer in enumerate(peers):
        await peer.start(receiver(k), tuple(order["bootstrap"]))
    print("ready", flush=True)
    try:
        async with asyncio.timeout(PROCESS_SECONDS):
            await done.wait()
    except TimeoutError:
        pass
    print(json.dumps({"counts": counts, "wrong": wrong, "arrived": arrived}), flush=True)
    for peer in peers:
        await peer.close()


def payload(number: int) -> bytes:
    return number.to_bytes(4, "big") * (FLOW_SIZE // 4)


def spawn(order: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--receive", json.dumps(order)], stdout=subprocess.PIPE, text=True
    )


async def line(stream: IO[str]) -> str:
    return await asyncio.to_thread(stream.readline)


# -- measurements ------------------------------------------------------------------------------------------------------


async def latency(sender_kind: str, receiver_kind: str, interval: float) -> tuple[float, float]:
    """Median and 90th percentile of one hop, in seconds."""
    sender = PEERS[sender_kind]()
    address = await sender.start(lambda content: None, None)
    process = spawn(
        {"what": "latency", "kind": receiver_kind, "nodes": 1, "messages": LATENCY_MESSAGES, "bootstrap": address}
    )
    assert process.stdout is not None
    assert await line(process.stdout) == "ready\n"
    await sender.neighbors(1)
    for i in range(LATENCY_MESSAGES):
        await asyncio.sleep(interval)
        await sender.broadcast(f"{time.monotonic():024.9f} {i:06d}".ljust(100).encode())
    result = json.loads(await line(process.stdout))
    await asyncio.to_thread(process.wait, 20)
    await sender.close()
    assert result["counts"] == [LATENCY_MESSAGES], result["counts"]
    arrived = sorted(result["arrived"])
    return statistics.median(arrived), arrived[len(arrived) * 9 // 10]


async def flow(rate: int | None) -> tuple[float, float]:
    """Messages a second that all eight neighbours have received, and the sender's share of a core."""
    sender = PythonPeer()
    address = await sender.start(lambda content: None, None)
    processes = [
        spawn(
            {
                "what": "flow",
                "kind": "python",
                "nodes": NEIGHBORS // 2,
                "messages": FLOW_MESSAGES,
                "bootstrap": address,
            }
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await line(process.stdout) == "ready\n"
    await sender.neighbors(NEIGHBORS)
    start, cpu = time.monotonic(), time.process_time()
    for i in range(FLOW_MESSAGES):
        # The clock of a loop has steps of a millisecond; what is due within one goes out together.
        if rate is not None and (ahead := start + i / rate - time.monotonic()) > 0.001:
            await asyncio.sleep(ahead)
        await sender.broadcast(payload(i))
    share = (time.process_time() - cpu) / (time.monotonic() - start)
    results = [json.loads(await line(process.stdout)) for process in processes if process.stdout]
    seconds = time.monotonic() - start
    for process in processes:
        await asyncio.to_thread(process.wait, 20)
    await sender.close()
    for result in results:
        assert result["counts"] == [FLOW_MESSAGES] * (NEIGHBORS // 2), result["counts"]
        assert result["wrong"] == 0
    return FLOW_MESSAGES / seconds, share


def simulation() -> None:
    import random

    from distro_optim.comm.iroh.gossip import link_evidence as patience
    from distro_optim.comm.iroh.gossip.config import GossipConfig

    # By its path: on sys.path this script itself is `gossip`.
    path = Path(__file__).parent.parent / "tests" / "gossip" / "simulator.py"
    spec = importlib.util.spec_from_file_location("gossip_simulator", path)
    assert spec is not None
    assert spec.loader is not None
    simulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulator)

    def duplicates(config: GossipConfig, latency: tuple[float, float]) -> float:
        sim, rng = simulator.Simulator(config, seed=1, latency=latency), random.Random(1)
        bootstrap = [sim.add()]
        for i in range(199):
            sim.run(0.05)
            peer = sim.add(bootstrap)
            if i < 2:
                bootstrap.append(peer)
        sim.run(10)
        for phase in range(2):
            before = sim.payloads()
            for i in range(150):
                sim.publish(rng.choice(sim.live()).id, b"%d %d" % (phase, i))
                sim.run(0.1)
            sim.run(5)
        payloads, copies = sim.payloads()
        assert all(n.delivered[b"%d %d" % (1, i)] == 1 for n in sim.live() for i in range(150))
        return (copies - before[1]) / (payloads - before[0])

    print("\nduplicate payloads, 200 nodes, 10 messages a second from random senders, after 15 s")
    ours, theirs = GossipConfig(), GossipConfig(optimization_threshold=7)
    for low, high in ((0.001, 0.010), (0.005, 0.050), (0.020, 0.120)):
        result = duplicates(ours, (low, high))
        kept = patience._PRUNE_AFTER, patience._GRAFT_AFTER, patience._WAIT_MAX, patience._JITTER_STEPS
        # As in iroh-gossip: one duplicate prunes, one miss grafts, the wait is fixed.
        patience._PRUNE_AFTER, patience._GRAFT_AFTER, patience._WAIT_MAX, patience._JITTER_STEPS = 1, 0.0, 0.0, 1
        plain = duplicates(theirs, (low, high))
        patience._PRUNE_AFTER, patience._GRAFT_AFTER, patience._WAIT_MAX, patience._JITTER_STEPS = kept
        print(f"  links of {low * 1e3:3.0f} to {high * 1e3:3.0f} ms   ours {result:5.1%}   plain rules {plain:5.1%}")


async def memory() -> None:
    peer = PythonPeer()
    await peer.start(lambda content: None, None)
    with open("/proc/self/statm") as file:
        rss = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    assert "torch" not in sys.modules
    print(f"\na process with a node in one topic: {rss:.0f} MiB resident")
    await peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("latency", "flow", "simulation", "memory")
    parser.add_argument("part", nargs="?", choices=parts)
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive:
        run(receive_process(json.loads(options.receive)))
        return
    wanted = (options.part,) if options.part else parts
    rust = importlib.util.find_spec("aster") is not None
    pairs = [("python", "python")]
    if rust:
        pairs += [("python", "rust"), ("rust", "python"), ("rust", "rust")]
    # First: later parts import more.
    if "memory" in wanted:
        run(memory())
    if "latency" in wanted:
        for interval in LATENCY_INTERVALS:
            print(f"\none hop of 100 bytes, two processes, a message every {interval * 1e3:.0f} ms")
            for sender, receiver in pairs:
                median, tenth = run(latency(sender, receiver, interval))
                times = f"median {median * 1e3:6.2f} ms   90 % below {tenth * 1e3:6.2f} ms"
                print(f"  {sender:>6} -> {receiver:<6}  {times}", flush=True)
    if "flow" in wanted:
        print(f"\n1 KiB to {NEIGHBORS} neighbours in two processes")
        # Not beside Rust: its wheel drops events when Python takes them too slowly, so the count would be too low.
        for rate, name in ((None, "as fast as it goes"), (FLOW_RATE, f"{FLOW_RATE} a second sent")):
            received, share = run(flow(rate))
            print(f"  {name:20} {received:6.0f} messages/s   sender {share:4.0%} of a core", flush=True)
    if "simulation" in wanted:
        simulation()


def run(coroutine: Any) -> Any:
    """Runs on a loop of the kind that nodes use."""
    from distro_optim.comm.loop import LoopThread

    thread = LoopThread("benchmark")
    try:
        return thread.run(coroutine, 3 * PROCESS_SECONDS)
    finally:
        thread.stop()


if __name__ == "__main__":
    main()
