"""The least CPU that a round over iroh costs a Python peer: the calls of the ``iroh`` package that its messages need.

    python benchmarks/round_floor.py                  # 16 peers, with the package as this project makes it
    python benchmarks/round_floor.py --stock          # with the package as it comes
    python benchmarks/round_floor.py --no-signatures

Beside ``benchmarks/rounds.py --iroh``, whose messages it sends and nothing else: each peer is a process with an
endpoint on loopback, and one connection to each of the others. In a round it says three things to all others, its
result, its weights and that it has finished, each in one write; reads theirs; fetches the result of each of the others
over a stream of its own, and serves its own to each of them. It makes and checks the signatures of all that. There are
no rounds, no coordinator, no gossip, no blobs (what arrives is not hashed), no limits, no watch over connections and no
model: bytes are counted, and thrown away.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, Final

from distro_optim.comm.iroh import ffi
from distro_optim.comm.iroh.node.opening import Opener
from distro_optim.comm.signing import SecretKey, is_signed_by

Pipe = multiprocessing.connection.Connection

ALPN: Final = b"floor/0"
ROUND_SECONDS: Final = 1.25
LATER: Final = 0.6  # of a round, when "finished" is said
FRAME: Final = 280  # bytes of a gossip frame, on average
REQUEST: Final = 39
RESULT: Final = 5 * 1024
READ: Final = 8 * 1024
WARM: Final = 3  # rounds that are not counted
END_SECONDS: Final = 60.0  # for all that was said to come
SAID: Final = 3  # by each peer in a round


@dataclass
class Settings:
    peers: int
    rounds: int
    stock: bool
    signatures: bool


class Peer:
    def __init__(self, settings: Settings, number: int) -> None:
        self.settings, self.number = settings, number
        self.endpoint: Any = None
        self.connections: list[Any] = []
        self.writers: list[tuple[Any, Any]] = []  # a stream for each of two topics, to each of the others
        self.tasks: set[asyncio.Task[None]] = set()
        self.heard = self.fetched = 0
        self.key = SecretKey(os.urandom(32))
        self.frame = bytes(FRAME)
        self.signature = self.key.sign(self.frame)

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def sign(self, times: int) -> None:
        if self.settings.signatures:
            for _ in range(times):
                self.key.sign(self.frame)

    def check(self, times: int) -> None:
        if self.settings.signatures:
            for _ in range(times):
                is_signed_by.__wrapped__(self.key.public, self.frame, self.signature)  # each time anew

    # -- connections ---------------------------------------------------------------------------------------------------

    async def open(self) -> tuple[bytes, list[str]]:
        opener = Opener(
            SecretKey(os.urandom(32)), "127.0.0.1:0", usual_ports=None, relays="none", discovery="none", external=()
        )
        self.endpoint = await opener.open([ALPN])
        raw = self.endpoint.addr()
        return raw.id().to_bytes(), list(raw.direct_addresses())

    async def meet(self, places: list[tuple[bytes, list[str]]]) -> None:
        """Dials those that come later in the list, and takes the others in."""
        import iroh

        accepting = asyncio.create_task(self._accept(self.number))
        for peer, direct in places[self.number + 1 :]:
            address = iroh.EndpointAddr(iroh.EndpointId.from_bytes(peer), None, direct)
            self.connections.append(await self.endpoint.connect(address, ALPN))
        await accepting
        for connection in self.connections:
            self.writers.append((await connection.open_uni(), await connection.open_uni()))
            self.spawn(self._listen(connection))
            self.spawn(self._serve(connection))

    async def _accept(self, count: int) -> None:
        for _ in range(count):
            incoming = await self.endpoint.accept_next()
            accepting = await incoming.accept()
            self.connections.append(await accepting.connect())

    # -- a round -------------------------------------------------------------------------------------------------------

    async def _listen(self, connection: Any) -> None:
        while True:
            self.spawn(self._read(connection, await connection.accept_uni()))

    async def _read(self, connection: Any, stream: Any) -> None:
        rest = b""
        while data := await stream.read(READ):
            data = rest + data
            rest = data[len(data) // FRAME * FRAME :]
            for place in range(0, len(data) - len(rest), FRAME):
                self.heard += 1
                self.check(1)
                kind = data[place]
                if kind == 1:  # a result; its commitment is signed, too, and so is that of "finished"
                    self.check(1)
                    self.spawn(self._fetch(connection))
                elif kind == 3:
                    self.check(1)

    async def _fetch(self, connection: Any) -> None:
        pair = await connection.open_bi()
        send, recv = pair.send(), pair.recv()
        await send.write_all(bytes(REQUEST))
        await send.finish()
        length = 0
        while data := await recv.read(READ):
            length += len(data)
        assert length == RESULT
        self.fetched += 1

    async def _serve(self, connection: Any) -> None:
        while True:
            pair = await connection.accept_bi()
            self.spawn(self._answer(pair.send(), pair.recv()))

    async def _answer(self, send: Any, recv: Any) -> None:
        while await recv.read(READ):
            pass
        await send.write_all(bytes(RESULT))
        await send.finish()

    async def say(self, kind: int, topic: int, signatures: int) -> None:
        self.sign(signatures)
        frame = bytes([kind]) + self.frame[1:]
        await asyncio.gather(*(streams[topic].write_all(frame) for streams in self.writers))

    async def rounds(self, begin: float) -> list[float]:
        """CPU seconds of this process when each round began."""
        spent = []
        for number in range(self.settings.rounds + 1):
            await asyncio.sleep(max(0.0, begin + number * ROUND_SECONDS - time.time()))
            spent.append(time.process_time())
            await self.say(1, 0, 2)
            await self.say(2, 1, 1)
            await asyncio.sleep(LATER * ROUND_SECONDS)
            await self.say(3, 0, 2)
        others, said = self.settings.peers - 1, self.settings.rounds + 1
        async with asyncio.timeout(END_SECONDS):
            while (self.heard, self.fetched) != (SAID * others * said, others * said):
                await asyncio.sleep(ROUND_SECONDS)
        return spent


async def life(settings: Settings, number: int, wire: Pipe) -> None:
    peer = Peer(settings, number)
    wire.send(await peer.open())
    await peer.meet(await asyncio.to_thread(wire.recv))
    wire.send(None)
    spent = await peer.rounds(await asyncio.to_thread(wire.recv))
    wire.send((spent[-1] - spent[WARM]) / (len(spent) - 1 - WARM))
    await asyncio.to_thread(wire.recv)
    for task in peer.tasks:
        task.cancel()
    await peer.endpoint.close()


def one(settings: Settings, number: int, wire: Pipe) -> None:
    if not settings.stock:
        ffi.accelerate()
    asyncio.run(life(settings, number, wire))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stock", action="store_true", help="leave the iroh package as it comes")
    parser.add_argument("--no-signatures", dest="signatures", action="store_false")
    settings = Settings(**vars(parser.parse_args()))
    ffi.load_iroh()  # once, before the forks
    context = multiprocessing.get_context("fork")
    wires, processes = [], []
    try:
        for number in range(settings.peers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=one, args=(settings, number, theirs), daemon=True))
            processes[-1].start()
            wires.append(ours)
        places = [wire.recv() for wire in wires]
        for wire in wires:
            wire.send(places)
        for wire in wires:
            wire.recv()
        for wire in wires:
            wire.send(time.time() + 1)
        cpu = [wire.recv() for wire in wires]
        for wire in wires:
            wire.send(None)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
    how = "as it comes" if settings.stock else "made faster"
    signed = "with" if settings.signatures else "without"
    print(
        f"{settings.peers} peers, the package {how}, {signed} signatures: "
        f"{1000 * statistics.mean(cpu):.0f} ms of CPU in a round and peer"
    )


if __name__ == "__main__":
    main()
