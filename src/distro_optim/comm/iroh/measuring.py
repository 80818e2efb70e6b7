"""How fast the line to a run's host is, both ways: bytes that mean nothing, counted and thrown away.

For ``distro-optim doctor``, which is not in the run. One question a connection::

    question    u32 (little endian), how many bytes are asked for; then bytes, up to the end of the stream
    answer      one byte, when all of that was read; then as many zeros as were asked for

The host answers strangers, so what they can have of its line is bounded: :data:`MAX_BYTES` each way, one at a time,
and :data:`BYTES_PER_SECOND` in the long run.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from ...errors import LimitExceededError, PeerTimeoutError, ProtocolError
from ..addresses import EndpointAddr
from ..serving.limits import Bucket
from .connection import Connection
from .endpoint import Node

__all__ = ["MEASURE_ALPN", "LineMeasure", "MeasuringPlace", "measure_line"]

MEASURE_ALPN: Final = b"distro-optim/measure/0"

MAX_BYTES: Final = 2 << 20
"""Each way; at a megabyte a second it takes two seconds. Chosen arbitrarily."""

SMALL_BYTES: Final = 64 << 10
"""What is tried first, so that a slow line is not kept busy for long."""

BYTES_PER_SECOND: Final = 256 << 10
BURST: Final = 4 * MAX_BYTES
"""All strangers together: two whole measurements at once, and a quarter of a megabyte a second. Chosen so that they do
not slow a run down."""

SECONDS: Final = 20.0
"""For a question with its answer."""

ENOUGH_SECONDS: Final = 1.0
"""A small measurement that takes longer says enough about the line."""

_COUNT_BYTES: Final = 4
_CHUNK: Final = 64 << 10
_READ: Final = b"\x01"


@dataclass(frozen=True)
class LineMeasure:
    """A line.

    Attributes:
        path: ``"direct"`` or ``"relayed"``; ``"none"`` if it is not known.
        rtt: seconds there and back; None if it is not known.
        up: bytes a second that we can send.
        down: bytes a second that we can receive.
    """

    path: str
    rtt: float | None
    up: float
    down: float


class MeasuringPlace:
    """Lets others measure the line to ``node``."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._budget = Bucket(BYTES_PER_SECOND, BURST, time.monotonic())
        self._busy = False
        node.exempt(MEASURE_ALPN)
        node.accept(MEASURE_ALPN, self._serve)

    def close(self) -> None:
        """Serves no more."""
        self._node.refuse(MEASURE_ALPN)

    async def _serve(self, connection: Connection) -> None:
        if self._busy:
            raise LimitExceededError("another measurement is under way")
        self._busy = True
        try:
            async with asyncio.timeout(SECONDS):
                await self._answer(connection)
                await connection.closed()
        finally:
            self._busy = False

    async def _answer(self, connection: Connection) -> None:
        connection.limit_streams(uni=0, bi=1)
        send, recv = await connection.accept_bi()
        wanted = int.from_bytes(await recv.read_exact(_COUNT_BYTES), "little")
        if wanted > MAX_BYTES:
            raise ProtocolError(f"{wanted} bytes are asked for, at most {MAX_BYTES} are given")
        self._spend(wanted)
        came = 0
        while data := await recv.read(_CHUNK):
            self._spend(len(data))
            came += len(data)
            if came > MAX_BYTES:
                raise LimitExceededError(f"more than {MAX_BYTES} bytes came")
        await send.write(_READ)
        zeros = bytes(_CHUNK)
        while wanted > 0:
            await send.write(zeros[: min(wanted, _CHUNK)])
            wanted -= _CHUNK
        await send.finish()

    def _spend(self, count: int) -> None:
        if not self._budget.take(count, time.monotonic()):
            raise LimitExceededError("the line has been measured enough for now")


async def measure_line(node: Node, host: EndpointAddr) -> LineMeasure:
    """Measures the line from ``node`` to ``host``; takes a few seconds.

    Raises:
        ExchangeError: the host cannot be reached, does not answer in time, or lets nobody measure now.
        ProtocolError: its answer is malformed.
    """
    node.exempt(MEASURE_ALPN)
    small, seconds = await _measure(node, host, SMALL_BYTES)
    return small if seconds > ENOUGH_SECONDS else (await _measure(node, host, MAX_BYTES))[0]


async def _measure(node: Node, host: EndpointAddr, size: int) -> tuple[LineMeasure, float]:
    connection = await node.connect(host, MEASURE_ALPN)
    try:
        async with asyncio.timeout(SECONDS):
            send, recv = await connection.open_bi()
            began = time.monotonic()
            await send.write(size.to_bytes(_COUNT_BYTES, "little"))
            for start in range(0, size, _CHUNK):
                await send.write(bytes(min(_CHUNK, size - start)))
            await send.finish()
            if await recv.read_exact(len(_READ)) != _READ:
                raise ProtocolError("what answers a measurement is not what we speak")
            turned = time.monotonic()
            came = 0
            while data := await recv.read(_CHUNK):
                came += len(data)
            ended = time.monotonic()
            way = connection.stats().way
    except PeerTimeoutError:
        raise
    except TimeoutError:
        raise PeerTimeoutError(f"{2 * size} bytes did not get there and back within {SECONDS:g} s") from None
    finally:
        connection.close()
    if came != size:
        raise ProtocolError(f"{came} of {size} bytes came back")
    # The first byte of the answer takes a round trip that is not the line's speed.
    rtt = way.rtt or 0.0
    up, down = max(turned - began - rtt, 1e-6), max(ended - turned, 1e-6)
    return LineMeasure(way.path, way.rtt, size / up, size / down), ended - began
