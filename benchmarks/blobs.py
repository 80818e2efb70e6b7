"""Blobs: verified transfer between two processes, beside the Rust peer in the same run; hashing; memory.

    python benchmarks/blobs.py            all of it, about a minute
    python benchmarks/blobs.py transfer   one part: transfer, hashing, churn or memory

Transfers go over loopback, without relay, from a provider process to a getter process; the getter's time runs from
before the dial until the blob is there and proven, and its hash is compared. The Rust peer (iroh-blobs 0.99) comes
with ``pip install aster-rpc==0.1.2``; without it its rows are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MIB = 2**20
TRANSFER_BYTES = 128 * MIB
LOOPBACK = {"bind_addr": "127.0.0.1:0", "relay": "none", "discovery": False}
# (getter, provider, whether the getter's main thread computes in Python all the while)
PAIRS = [
    ("rust", "rust", False),
    ("python", "python", False),
    ("python", "rust", False),
    ("rust", "python", False),
    ("python", "python", True),
]


def test_data(size: int) -> bytes:
    return random.Random(1).randbytes(size)


def rss_mib() -> float:
    """Resident memory now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MIB


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- processes ---------------------------------------------------------------------------------------------------------


def python_peer(max_bytes: int | None = None) -> tuple[Any, Any]:
    from distro_optim.comm.iroh.blobs.net import BlobService
    from distro_optim.comm.iroh.blobs.store import MemoryStore
    from distro_optim.comm.iroh.endpoint import Node

    node = Node(**LOOPBACK).start()

    async def build() -> BlobService:
        return BlobService(node, MemoryStore(max_bytes))

    return node, node.submit(build()).result()


async def rust_peer() -> tuple[Any, Any]:
    from aster import _aster

    config = _aster.EndpointConfig(alpns=[], relay_mode="disabled", bind_addr="127.0.0.1:0")
    node = await _aster.IrohNode.memory_with_alpns([], config)
    return node, _aster.blobs_client(node)


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def provide_python(size: int) -> None:
    from distro_optim.comm.tickets import BlobTicket

    node, service = python_peer()
    began = time.perf_counter()
    root = service.store.add(test_data(size), tag="benchmark")
    say(ticket=str(BlobTicket.raw(node.addr(), root)), seconds=time.perf_counter() - began)
    sys.stdin.readline()
    node.close()


def provide_rust(size: int) -> None:
    async def main() -> None:
        node, blobs = await rust_peer()
        root = await blobs.add_bytes(test_data(size))
        say(ticket=blobs.create_ticket(root))
        await asyncio.to_thread(sys.stdin.readline)
        await node.close()

    asyncio.run(main())


@contextmanager
def busy_main_thread(busy: bool) -> Iterator[threading.Event]:
    """Yields an event; until it is set, the main thread computes in pure Python if ``busy``, else it sleeps."""
    done = threading.Event()
    yield done
    counter = 0
    if busy:
        while not done.is_set():
            for _ in range(1000):
                counter = counter * 31 + 7 & 0xFFFFFFFF
    else:
        done.wait()


def get_python(ticket_text: str, busy: bool) -> None:
    from distro_optim.comm.tickets import BlobTicket

    ticket = BlobTicket.parse(ticket_text)
    node, service = python_peer()
    node.addresses.add(ticket.addr)
    began, cpu = time.perf_counter(), time.process_time()
    finished: list[tuple[float, float]] = []

    def note(_: Any) -> None:
        finished.append((time.perf_counter() - began, time.process_time() - cpu))
        done.set()

    with busy_main_thread(busy) as done:
        fetching = node.submit(service.fetch(ticket.hash, [ticket.addr.id], max_size=2**31, tag="benchmark"))
        fetching.add_done_callback(note)
    blob = fetching.result()
    seconds, cpu_seconds = finished[0]
    say(seconds=seconds, cpu=cpu_seconds, sha256=hashlib.sha256(blob.data).hexdigest())
    node.close()


def get_rust(ticket: str) -> None:
    async def main() -> None:
        node, blobs = await rust_peer()
        began, cpu = time.perf_counter(), time.process_time()
        data = await blobs.download_blob(ticket)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        say(seconds=seconds, cpu=cpu_seconds, sha256=hashlib.sha256(data).hexdigest())
        await node.close()

    asyncio.run(main())


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def answer_of(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a benchmark process ended: {process.args}")
    return json.loads(line)


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)


def cpu_seconds_of(process: subprocess.Popen[str]) -> float:
    """User and system time of a running process, in steps of a hundredth."""
    with open(f"/proc/{process.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- parts -------------------------------------------------------------------------------------------------------------


def transfer(repeats: int) -> None:
    expected = hashlib.sha256(test_data(TRANSFER_BYTES)).hexdigest()
    has_rust = importlib.util.find_spec("aster") is not None
    pairs = [pair for pair in PAIRS if has_rust or "rust" not in pair]
    rates: dict[tuple[str, str, bool], list[float]] = {pair: [] for pair in pairs}
    cpu: dict[tuple[str, str, bool], list[tuple[float, float]]] = {pair: [] for pair in pairs}
    # Round by round, so that a slow moment of the machine hits all of them.
    for _ in range(repeats):
        for getter, provider, busy in pairs:
            providing = spawn("provide", provider, str(TRANSFER_BYTES))
            ticket = answer_of(providing)["ticket"]
            before = cpu_seconds_of(providing)
            getting = spawn("get", getter, ticket, str(int(busy)))
            result = answer_of(getting)
            cpu[getter, provider, busy].append((result["cpu"], cpu_seconds_of(providing) - before))
            end(getting)
            end(providing)
            assert result["sha256"] == expected, "the data is wrong"
            rates[getter, provider, busy].append(TRANSFER_BYTES / result["seconds"] / 1e6)
    print(f"\nverified transfer of {TRANSFER_BYTES // MIB} MiB between two processes, loopback, {repeats} rounds")
    print(f"{'getter <- provider':44} {'median MB/s':>12} {'from - to':>14} {'CPU s: getter':>15} {'provider':>9}")
    for (getter, provider, busy), values in rates.items():
        name = f"{getter} <- {provider}" + (", main thread busy in Python" if busy else "")
        spread = f"{min(values):.0f} - {max(values):.0f}"
        getting_cpu, providing_cpu = (
            statistics.median(side) for side in zip(*cpu[getter, provider, busy], strict=True)
        )
        print(f"{name:44} {statistics.median(values):12.0f} {spread:>14} {getting_cpu:15.2f} {providing_cpu:9.2f}")
    if has_rust:
        rust = statistics.median(rates["rust", "rust", False])
        idle = statistics.median(rates["python", "python", False])
        busy_rate = statistics.median(rates["python", "python", True])
        print(f"python / rust: {idle / rust:.2f} (wanted: 1.0); busy / rust: {busy_rate / rust:.2f} (wanted: 0.5)")


def hashing() -> None:
    from blake3 import blake3

    from distro_optim.comm.iroh.blobs.decoder import Decoder
    from distro_optim.comm.iroh.blobs.encoder import encode
    from distro_optim.comm.iroh.blobs.outboard import build_outboard
    from distro_optim.comm.iroh.blobs.ranges import ALL
    from distro_optim.comm.iroh.blobs.store import Blob

    data = test_data(64 * MIB)
    root, outboard = build_outboard(data)
    assert root == blake3(data).digest()
    blob = Blob(data, outboard)
    response = list(encode(blob))

    def decode() -> None:
        decoder = Decoder(root, ALL, max_size=len(data))
        assert sum(len(piece.data) for part in response for piece in decoder.receive(part)) == len(data)
        assert decoder.is_complete

    rows = {
        "blake3 of the whole, native (for comparison)": lambda: blake3(data).digest(),
        "hash and outboard of new data": lambda: build_outboard(data),
        "encode a response": lambda: sum(map(len, encode(blob))),
        "decode and verify a response": decode,
    }
    print("\n64 MiB, one thread")
    for name, work in rows.items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        print(f"{name:46} {len(data) / min(times) / 1e6:8.0f} MB/s")


def churn(blobs: int, size: int, room: int) -> None:
    """Publishes and fetches many blobs through two stores that hold only a few."""
    provider, provided = python_peer(room)
    getter, fetched = python_peer(room)
    getter.addresses.add(provider.addr())
    before = rss_mib()
    began = time.perf_counter()
    for i in range(blobs):
        # Cheap, and different each time.
        data = i.to_bytes(8, "little") * (size // 8)
        root = provided.store.add(data, tag=f"result_{i % 8}")
        blob = getter.submit(fetched.fetch(root, [provider.endpoint_id], max_size=size, tag=f"result_{i % 8}")).result()
        assert bytes(blob.data) == data
        assert provided.store.used_bytes <= room
        assert fetched.store.used_bytes <= room
    seconds = time.perf_counter() - began
    print(
        f"\n{blobs} blobs of {size // MIB} MiB published, fetched and verified in one process: {seconds:.1f} s, "
        f"{blobs * size / seconds / 1e6:.0f} MB/s\n"
        f"each store's limit {room // MIB} MiB; resident {before:.0f} MiB before, {rss_mib():.0f} after, "
        f"{peak_rss_mib():.0f} at most"
    )
    assert peak_rss_mib() < before + 2 * room / MIB + 64, "the process outgrew the limit of its stores"
    for node in (getter, provider):
        node.close()


def memory() -> None:
    python_peer()
    assert "torch" not in sys.modules
    print(f"\na fresh node with a blob service, without torch: {rss_mib():.0f} MiB resident (wanted: below 120)")


PARTS = ("transfer", "hashing", "churn", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--repeats", type=int, default=5)
    if len(sys.argv) > 1 and sys.argv[1] == "provide":
        {"python": provide_python, "rust": provide_rust}[sys.argv[2]](int(sys.argv[3]))
    elif len(sys.argv) > 1 and sys.argv[1] == "get":
        get_python(sys.argv[3], bool(int(sys.argv[4]))) if sys.argv[2] == "python" else get_rust(sys.argv[3])
    elif len(sys.argv) > 1 and sys.argv[1] == "part":
        {"hashing": hashing, "memory": memory, "churn": lambda: churn(1000, MIB, 16 * MIB)}[sys.argv[2]]()
    else:
        options = parser.parse_args()
        for part in options.part or PARTS:
            if part == "transfer":
                transfer(options.repeats)
            else:
                # In a process of its own: memory is measured.
                subprocess.run([sys.executable, __file__, "part", part], check=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
