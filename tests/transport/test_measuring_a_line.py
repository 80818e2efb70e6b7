"""The line to a host can be measured by anybody, and strangers cannot have more of it than a little."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from distro_optim.comm.iroh import measuring
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.measuring import MAX_BYTES, MEASURE_ALPN, MeasuringPlace, measure_line
from distro_optim.comm.loop import LoopThread
from distro_optim.errors import ExchangeError

pytestmark = pytest.mark.waiting


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    loop = LoopThread("measuring")
    nodes = [Node(relay="none", bind_addr="127.0.0.1:0", loop=loop).start() for _ in range(2)]
    MeasuringPlace(nodes[0])
    yield nodes[0], nodes[1]
    for node in nodes:
        node.close()
    loop.stop()


def ask(node: Node, host: Node, question: bytes) -> bytes:
    async def work() -> bytes:
        connection = await node.connect(host.addr(), MEASURE_ALPN)
        try:
            send, recv = await connection.open_bi()
            await send.write(question)
            await send.finish()
            return await recv.read_to_end(2 * MAX_BYTES, timeout=5.0)
        finally:
            connection.close()

    return node.submit(work()).result(10)


def test_both_ways_and_the_round_trip_are_measured(pair: tuple[Node, Node]) -> None:
    host, node = pair
    line = node.submit(measure_line(node, host.addr())).result(30)
    assert line.path == "direct"
    assert line.up > 0
    assert line.down > 0
    assert line.rtt is not None


def test_who_asks_for_too_much_or_sends_too_much_gets_nothing(pair: tuple[Node, Node]) -> None:
    host, node = pair
    assert len(ask(node, host, (5).to_bytes(4, "little") + b"abc")) == 6
    for question in ((MAX_BYTES + 1).to_bytes(4, "little"), bytes(4 + MAX_BYTES + 1), b"\x01"):
        with pytest.raises(ExchangeError):
            ask(node, host, question)


def test_all_strangers_together_get_so_much_and_one_at_a_time(
    pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, node = pair
    for _ in range(4):
        assert len(ask(node, host, MAX_BYTES.to_bytes(4, "little"))) == MAX_BYTES + 1
    with pytest.raises(ExchangeError):
        ask(node, host, MAX_BYTES.to_bytes(4, "little"))

    async def two_at_once() -> Any:
        monkeypatch.setattr(measuring, "SMALL_BYTES", 1)
        first = await node.connect(host.addr(), MEASURE_ALPN)
        send, _ = await first.open_bi()
        await send.write(bytes(4))  # and then keeps the host waiting
        await asyncio.sleep(0.05)
        try:
            return await measure_line(node, host.addr())
        finally:
            first.close()

    with pytest.raises(ExchangeError):
        node.submit(two_at_once()).result(10)
