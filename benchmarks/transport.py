"""Peer-to-peer transport in numbers, beside the Rust implementation on the same machine in the same minute.

::

    $ python benchmarks/transport.py                  the whole table, about a minute
    $ python benchmarks/transport.py blobs gossip     parts of it
    $ python benchmarks/transport.py --json out.json

Everything runs on loopback between processes of its own. The Rust peer is iroh 0.97 with iroh-blobs 0.99 and
iroh-gossip 0.97, the versions Psyche pins, from the wheel ``aster-rpc``. Every transfer's hash is checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from blake3 import blake3
from rich.console import Console
from rich.table import Table

from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh import ffi
from distro_optim.comm.iroh.blobs.net import BlobService
from distro_optim.comm.iroh.blobs.store import MemoryStore
from distro_optim.comm.iroh.connection import READ_SIZE, Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.config import PSYCHE_GOSSIP
from distro_optim.comm.iroh.gossip.frames import FrameReader, encode_frame, encode_header
from distro_optim.comm.iroh.gossip.messages import Join, encode_message
from distro_optim.comm.iroh.gossip.net import GOSSIP_ALPN, GossipService
from distro_optim.comm.iroh.swarm import IrohSwarm, topic_of_run
from distro_optim.comm.loop import LoopThread
from distro_optim.comm.tickets import BlobTicket, EndpointTicket

MIB: Final = 1 << 20
BLOB_SIZE: Final = 128 * MIB
SEED: Final = 7
TOPIC: Final = topic_of_run("benchmark")
STREAM_ALPN: Final = b"distro-optim/benchmark/0"
MESSAGE_SIZE: Final = 1024
NEIGHBORS: Final = 8
FLOOD_RATE: Final = 2000
FLOOD_SECONDS: Final = 5.0
HOPS: Final = 500
# The last message is on its way when the time is up.
_SUSTAINED: Final = 0.98
MEMORY_BLOBS: Final = 1000
MEMORY_LIMIT: Final = 64 * MIB
ANSWER_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        what: was measured.
        value: with its unit.
        beside: the incumbent, measured in the same run.
        target: what the project promises.
        met: whether it is; None where nothing is promised.
    """

    what: str
    value: str
    beside: str = ""
    target: str = ""
    met: bool | None = None


# -- processes: this file runs itself in a role, which speaks JSON lines -----------------------------------------------


def tell(**words: Any) -> None:
    print(json.dumps(words), flush=True)


class Role:
    """A process of this file in a role."""

    def __init__(self, name: str, *arguments: str, **environment: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--role", name, *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark ended early")
        words: dict[str, Any] = json.loads(line)
        return words

    def say(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()

    def __enter__(self) -> Role:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def loopback_node(**options: Any) -> Node:
    return Node(bind_addr="127.0.0.1:0", relay="none", **options)


@contextmanager
def busy_training_thread(busy: bool) -> Iterator[None]:
    """A thread that computes in Python all the time, as a data loader or an eager model does."""
    done = threading.Event()

    def train() -> None:
        value = 0
        while not done.is_set():
            for number in range(1000):
                value = (value * 31 + number) % 1_000_003

    thread = threading.Thread(target=train, daemon=True)
    if busy:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if busy:
            thread.join()


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# -- blobs -------------------------------------------------------------------------------------------------------------


def the_blob(size: int) -> bytes:
    return Random(SEED).randbytes(size)


async def rust_node() -> Any:
    from aster import _aster

    config = _aster.EndpointConfig(alpns=[], relay_mode="disabled", bind_addr="127.0.0.1:0")
    return await _aster.IrohNode.memory_with_alpns([], config)


def rust_address(node: Any) -> EndpointAddr:
    info = node.node_addr_info()
    direct = tuple(SocketAddr.parse(text) for text in info.direct_addresses)
    return EndpointAddr(bytes.fromhex(info.endpoint_id), (), direct)


def role_provider(side: str, busy: str) -> None:
    data = the_blob(BLOB_SIZE)
    if side == "python":
        with loopback_node() as node:
            store = MemoryStore()
            BlobService(node, store)
            began = time.perf_counter()
            root = store.add(data, tag="blob")
            seconds = time.perf_counter() - began
            with busy_training_thread(busy == "busy"):
                tell(ticket=str(BlobTicket.raw(node.addr(), root)), add_seconds=seconds, cpu=time.process_time())
                sys.stdin.readline()
                tell(cpu=time.process_time())
        return

    async def serve() -> None:
        from aster import _aster

        node = await rust_node()
        began = time.perf_counter()
        root = bytes.fromhex(await _aster.blobs_client(node).add_bytes(data))
        seconds = time.perf_counter() - began
        tell(ticket=str(BlobTicket.raw(rust_address(node), root)), add_seconds=seconds, cpu=time.process_time())
        await asyncio.to_thread(sys.stdin.readline)
        tell(cpu=time.process_time())

    asyncio.run(serve())


def role_getter(side: str, busy: str, text: str) -> None:
    ticket = BlobTicket.parse(text)

    def done(data: bytes, seconds: float, cpu: float) -> None:
        right = blake3(data).digest() == ticket.hash and len(data) == BLOB_SIZE
        tell(seconds=seconds, cpu=cpu, right=right)

    if side == "python":
        with loopback_node() as node, busy_training_thread(busy == "busy"):
            service = BlobService(node, MemoryStore())
            node.addresses.add(ticket.addr)
            began, cpu = time.perf_counter(), time.process_time()
            fetching = service.fetch(ticket.hash, [ticket.addr.id], max_size=BLOB_SIZE, tag="blob")
            data = bytes(node.submit(fetching).result().data)
            done(data, time.perf_counter() - began, time.process_time() - cpu)
        return

    async def get() -> None:
        from aster import _aster

        node = await rust_node()
        began, cpu = time.perf_counter(), time.process_time()
        data = bytes(await _aster.blobs_client(node).download_blob(text))
        done(data, time.perf_counter() - began, time.process_time() - cpu)
        await node.close()

    asyncio.run(get())


def transfer(getter: str, provider: str, busy: str) -> tuple[float, float]:
    """MB/s of one transfer, and the processor seconds it took both sides; 1 MB is 10^6 bytes."""
    with Role("provider", provider, busy) as giving:
        offer = giving.hear()
        with Role("getter", getter, busy, offer["ticket"]) as getting:
            answer = getting.hear()
        giving.say("done")
        cpu = answer["cpu"] + giving.hear()["cpu"] - offer["cpu"]
    if not answer["right"]:
        raise RuntimeError("the blob that arrived is not the one that was sent")
    return BLOB_SIZE / 1e6 / answer["seconds"], cpu


def measure_blobs() -> list[Result]:
    rounds = 4
    rates: dict[tuple[str, str, str], list[float]] = {}
    cpu: dict[tuple[str, str, str], list[float]] = {}
    pairs = [
        ("python", "python", "idle"),
        ("rust", "rust", "idle"),
        ("python", "python", "busy"),
        ("python", "rust", "idle"),
        ("rust", "python", "idle"),
    ]
    # In turns, so that whatever else the machine does hits all alike.
    for _ in range(rounds):
        for pair in pairs:
            rate, seconds = transfer(*pair)
            rates.setdefault(pair, []).append(rate)
            cpu.setdefault(pair, []).append(seconds)
    # The best of each: whatever else runs can only make a transfer slower. The range shows how much it did.
    best = {pair: max(values) for pair, values in rates.items()}
    ours, theirs, busy = best[pairs[0]], best[pairs[1]], best[pairs[2]]

    def spread(pair: tuple[str, str, str]) -> str:
        return f"{best[pair]:.0f} MB/s (worst {min(rates[pair]):.0f})"

    beside = f"Rust from Rust {spread(pairs[1])}"
    return [
        Result("blob 128 MiB, Python from Python", spread(pairs[0]), beside, "ratio >= 1.0", ours >= theirs),
        Result("  both with a busy Python thread", spread(pairs[2]), "", "half of idle", busy >= ours / 2),
        Result(
            "  processor time, both sides together",
            f"{min(cpu[pairs[0]]):.2f} s",
            f"Rust from Rust {min(cpu[pairs[1]]):.2f} s",
        ),
        Result("blob 128 MiB, Python from Rust", spread(pairs[3]), beside),
        Result("blob 128 MiB, Rust from Python", spread(pairs[4]), beside),
    ]


# -- the byte copy -----------------------------------------------------------------------------------------------------


def role_sink() -> None:
    async def drain(connection: Connection) -> None:
        send, recv = await connection.accept_bi()
        hasher, size = blake3(), 0
        while data := await recv.read(READ_SIZE):
            hasher.update(data)
            size += len(data)
        await send.write(size.to_bytes(8, "little") + hasher.digest())
        await send.finish()
        await connection.closed()

    with loopback_node() as node:
        node.accept(STREAM_ALPN, drain)
        tell(ticket=str(EndpointTicket(node.addr())))
        sys.stdin.read()


def role_source(text: str, size: str) -> None:
    data = the_blob(int(size))

    async def pour(node: Node) -> float:
        connection = await node.connect(EndpointTicket.parse(text).addr, STREAM_ALPN)
        send, recv = await connection.open_bi()
        began = time.perf_counter()
        for start in range(0, len(data), READ_SIZE):
            await send.write(data[start : start + READ_SIZE])
        await send.finish()
        receipt = await recv.read_to_end(100)
        seconds = time.perf_counter() - began
        if receipt != len(data).to_bytes(8, "little") + blake3(data).digest():
            raise RuntimeError("other bytes arrived than were sent")
        return seconds

    with loopback_node() as node:
        seconds = node.submit(pour(node)).result()
        tell(seconds=seconds, accelerated=ffi.accelerate().byte_copy)


def measure_copy() -> list[Result]:
    def rate(size: int, stock: bool) -> float:
        with Role("sink") as sink:
            ticket = sink.hear()["ticket"]
            with Role("source", ticket, str(size), **{ffi.STOCK_VARIABLE: "1" if stock else "0"}) as source:
                answer = source.hear()
                if answer["accelerated"] is stock:
                    raise RuntimeError("the replacement of the byte copy is not as asked for")
                return size / 1e6 / float(answer["seconds"])

    ours = statistics.median(rate(128 * MIB, False) for _ in range(3))
    stock = statistics.median(rate(8 * MIB, True) for _ in range(3))
    return [
        Result(
            "sending on one stream",
            f"{ours:.0f} MB/s",
            f"stock copy {stock:.1f} MB/s",
            "15 times",
            ours >= 15 * stock,
        )
    ]


# -- gossip ------------------------------------------------------------------------------------------------------------


def role_echo(text: str) -> None:
    """Broadcasts each message back, with one byte more."""

    async def echo(node: Node) -> None:
        topic = await GossipService(node, PSYCHE_GOSSIP).join(TOPIC, [EndpointTicket.parse(text).addr])
        await topic.joined(ANSWER_SECONDS)
        tell(ready=True)
        async for message in topic:
            await topic.broadcast(message.content + b"!")

    with loopback_node() as node:
        running = node.submit(echo(node))
        sys.stdin.read()
        running.cancel()


def role_neighbors(text: str, count: str) -> None:
    """Eight neighbours in one process, which join, read, and count the messages that come; nothing more.

    Eight whole nodes, which also decode, verify and forward, would need more processors than most machines have, and
    then it would be them that is measured.
    """
    loop, total = LoopThread(), int(count)
    nodes = [loopback_node(loop=loop).start() for _ in range(NEIGHBORS)]
    # Of a Gossip message: two tags, the id, the length of the content.
    content_at = 2 + 32 + 2

    async def read(connection: Connection, seen: set[bytes], latencies: list[int], done: asyncio.Event) -> None:
        recv, reader = await connection.accept_uni(), FrameReader(PSYCHE_GOSSIP.max_message_size)
        while len(seen) < total:
            for frame in reader.feed(await recv.read()):
                if bytes(frame[:2]) == b"\1\0":
                    stamp = bytes(frame[content_at + 8 : content_at + 16])
                    # CLOCK_MONOTONIC is one clock for all processes of a machine.
                    latencies.append(time.monotonic_ns() - int.from_bytes(stamp, "little"))
                    seen.add(bytes(frame[content_at : content_at + 8]))
        done.set()

    async def neighbors() -> None:
        readers = []
        for node in nodes:
            connection = await node.connect(EndpointTicket.parse(text).addr, GOSSIP_ALPN)
            send = await connection.open_uni()
            await send.write(encode_header(TOPIC) + encode_frame(encode_message(Join(None))))
            seen: set[bytes] = set()
            latencies: list[int] = []
            done = asyncio.Event()
            readers.append((seen, latencies, done, send, asyncio.create_task(read(connection, seen, latencies, done))))
        tell(ready=True)
        for _, _, done, _, _ in readers:
            await done.wait()
        last = time.monotonic_ns()
        latency = statistics.median(delay for _, latencies, *_ in readers for delay in latencies) / 1e9
        tell(last=last, latency=latency, received=sum(len(latencies) for _, latencies, *_ in readers))

    loop.run(neighbors(), ANSWER_SECONDS)
    for node in nodes:
        node.close()
    loop.stop()


def measure_gossip() -> list[Result]:
    return [_measure_hop(), _measure_flood()]


def _measure_hop() -> Result:
    async def ping(node: Node, topic: Any) -> list[float]:
        messages = aiter(topic)
        hops = []
        for number in range(HOPS):
            content = number.to_bytes(8, "little") + bytes(MESSAGE_SIZE - 8)
            began = time.perf_counter()
            await topic.broadcast(content)
            while (await anext(messages)).content != content + b"!":
                pass
            hops.append((time.perf_counter() - began) / 2)
        return hops

    with loopback_node() as node:

        async def join() -> Any:
            return await GossipService(node, PSYCHE_GOSSIP).join(TOPIC)

        topic = node.submit(join()).result()
        with Role("echo", str(EndpointTicket(node.addr()))) as echo:
            echo.hear()
            hops = node.submit(ping(node, topic)).result(ANSWER_SECONDS)
    median, tail = statistics.median(hops) * 1e3, sorted(hops)[int(len(hops) * 0.99)] * 1e3
    return Result(
        "gossip, one hop, 1 KiB", f"{median:.2f} ms median, {tail:.2f} ms p99", "", "< 1 ms median", median < 1
    )


def _measure_flood() -> Result:
    total = int(FLOOD_RATE * FLOOD_SECONDS)

    async def flood(topic: Any) -> int:
        began = time.monotonic_ns()
        for number in range(total):
            due = began + int(number * 1e9 / FLOOD_RATE)
            if (ahead := (due - time.monotonic_ns()) / 1e9) > 0.001:
                await asyncio.sleep(ahead)
            stamp = time.monotonic_ns().to_bytes(8, "little")
            await topic.broadcast(number.to_bytes(8, "little") + stamp + bytes(MESSAGE_SIZE - 16))
        return began

    with loopback_node() as node:

        async def join() -> Any:
            return await GossipService(node, PSYCHE_GOSSIP).join(TOPIC)

        topic = node.submit(join()).result()
        with Role("neighbors", str(EndpointTicket(node.addr())), str(total)) as neighbors:
            neighbors.hear()

            async def settled() -> None:
                while len(topic.neighbors) < NEIGHBORS:
                    await asyncio.sleep(0.01)

            node.submit(settled()).result(ANSWER_SECONDS)
            began = node.submit(flood(topic)).result(ANSWER_SECONDS)
            answer = neighbors.hear()
    if answer["received"] != total * NEIGHBORS:
        raise RuntimeError("a message was lost, or delivered twice")
    seconds = (answer["last"] - began) / 1e9
    return Result(
        f"gossip, 1 KiB to {NEIGHBORS} neighbours",
        f"{total / seconds:.0f} messages/s, {answer['latency'] * 1e3:.1f} ms median delay",
        "",
        f"{FLOOD_RATE}/s sustained",
        total / seconds >= FLOOD_RATE * _SUSTAINED,
    )


# -- memory ------------------------------------------------------------------------------------------------------------


def role_memory() -> None:
    with loopback_node() as node:
        node.submit(asyncio.sleep(0)).result()
        tell(fresh=resident_bytes(), torch="torch" in sys.modules)


def role_churn() -> None:
    """Two swarms in one process: one publishes, the other fetches, both forget."""
    loop = LoopThread()
    nodes = [loopback_node(loop=loop).start() for _ in range(2)]
    stores = [MemoryStore(max_bytes=MEMORY_LIMIT) for _ in nodes]

    async def churn() -> tuple[int, int]:
        alice, bob = (IrohSwarm(node, TOPIC, store=store) for node, store in zip(nodes, stores, strict=True))
        random, warm = Random(SEED), 0
        for number in range(MEMORY_BLOBS):
            data = random.randbytes(MIB)
            ticket = await alice.publish(data, f"blob_{number}")
            if await bob.fetch(ticket, max_size=MIB, tag=f"blob_{number}") != data:
                raise RuntimeError("another blob arrived than was published")
            old = f"blob_{number - 20}"
            for swarm in (alice, bob):
                swarm.forget(old.__eq__)
            if number == MEMORY_BLOBS // 10:
                warm = resident_bytes()
        return warm, resident_bytes()

    began = time.perf_counter()
    warm, end = loop.run(churn())
    tell(warm=warm, end=end, used=sum(store.used_bytes for store in stores), seconds=time.perf_counter() - began)
    for node in nodes:
        node.close()
    loop.stop()


def measure_memory() -> list[Result]:
    with Role("memory") as role:
        fresh = role.hear()
    with Role("churn") as role:
        churn = role.hear()
    grown = churn["end"] - churn["warm"]
    return [
        Result(
            "memory of a fresh node",
            f"{fresh['fresh'] / 1e6:.0f} MB",
            "",
            "< 120 MB without torch",
            fresh["fresh"] < 120e6 and not fresh["torch"],
        ),
        Result(
            f"{MEMORY_BLOBS} blobs of 1 MiB published and fetched, in {churn['seconds']:.0f} s",
            f"{churn['end'] / 1e6:.0f} MB at the end, {grown / 1e6:+.0f} MB since the 100th",
            "",
            f"growth < the store's {MEMORY_LIMIT // MIB} MiB",
            grown < MEMORY_LIMIT,
        ),
    ]


# -- the table ---------------------------------------------------------------------------------------------------------

PARTS: Final[dict[str, Callable[[], list[Result]]]] = {
    "blobs": measure_blobs,
    "copy": measure_copy,
    "gossip": measure_gossip,
    "memory": measure_memory,
}
ROLES: Final[dict[str, Callable[..., None]]] = {
    "provider": role_provider,
    "getter": role_getter,
    "sink": role_sink,
    "source": role_source,
    "echo": role_echo,
    "neighbors": role_neighbors,
    "memory": role_memory,
    "churn": role_churn,
}


def print_table(results: list[Result]) -> None:
    table = Table(
        title=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}"
    )
    for column in ("measured", "ours", "beside", "promised", "kept"):
        table.add_column(column)
    for result in results:
        kept = "" if result.met is None else "yes" if result.met else "NO"
        table.add_row(result.what, result.value, result.beside, result.target, kept)
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.role:
        ROLES[options.role[0]](*options.role[1:])
        return 0
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    results = []
    for name in options.parts or PARTS:
        print(f"measuring {name} ...", file=sys.stderr)
        results += PARTS[name]()
    print_table(results)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 1 if any(result.met is False for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
