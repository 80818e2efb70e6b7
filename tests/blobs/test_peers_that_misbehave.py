"""Attacks on a blob service, numbered. The offender is cut off; the others are served."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from random import Random

import pytest

from blobs.conftest import Peer
from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs.encoder import encode
from distro_optim.comm.iroh.blobs.net import FetchLimits, ServeLimits
from distro_optim.comm.iroh.blobs.ranges import ChunkRanges
from distro_optim.comm.iroh.blobs.request import ALPN, GetRequest, push_request
from distro_optim.comm.iroh.connection import Connection, RecvStream, SendStream
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.errors import (
    BlobUnavailableError,
    ConnectionLostError,
    ExchangeError,
    HashMismatchError,
    LimitExceededError,
    PeerTimeoutError,
    TruncatedError,
)

pytestmark = [pytest.mark.waiting]

MIB = 2**20
QUICK = ServeLimits(request_seconds=0.5, write_seconds=0.5)
HASTY = FetchLimits(stall_seconds=1.5, open_seconds=5.0)

Answer = Callable[[SendStream, RecvStream], Awaitable[None]]


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """Bytes allocated at most since it was called last, over what there was then. Ask for it before nodes are made.

    Tracing begins and ends without nodes: Python before 3.12.9 may crash where it ends while other threads allocate,
    as those of iroh do.
    """
    tracemalloc.start()
    before = 0

    def since() -> int:
        nonlocal before
        now, most = tracemalloc.get_traced_memory()
        grown, before = most - before, now
        tracemalloc.reset_peak()
        return grown

    yield since
    tracemalloc.stop()


@pytest.fixture
def make_impostor(make_node: Callable[..., Node]) -> Callable[[Answer], Node]:
    """Makes nodes that answer every blob request with a function of the test's."""

    def make(answer: Answer) -> Node:
        async def serve(connection: Connection) -> None:
            streams = []
            try:
                while True:
                    send, recv = await connection.accept_bi()
                    streams.append((send, recv))
                    await recv.read_to_end(2**20)
                    try:
                        await answer(send, recv)
                    except ExchangeError:
                        pass
            except ConnectionLostError:
                pass

        node = make_node()
        node.accept(ALPN, serve)
        return node

    return make


def failure_of(getter: Peer, impostor: Node, honest: Peer, blob: SampleBlob) -> Exception:
    """Fetches from the impostor, then the honest one: the blob must come, and the impostor's failure is returned."""
    failures: list[tuple[bytes, Exception]] = []
    fetched = getter.fetch(
        blob.hash,
        [impostor.endpoint_id, honest.id],
        max_size=blob.size,
        on_failure=lambda provider, error: failures.append((provider, error)),
        timeout=30,
    )
    assert bytes(fetched) == blob.data
    ((provider, error),) = failures
    assert provider == impostor.endpoint_id
    return error


def test_1_ten_megabytes_of_garbage(make_peer: Callable[..., Peer], make_impostor: Callable[[Answer], Node]) -> None:
    async def answer(send: SendStream, recv: RecvStream) -> None:
        garbage = Random(1).randbytes(MIB)
        for _ in range(10):
            await send.write(garbage)
        await send.finish()

    honest, getter, blob = make_peer(), make_peer(), SampleBlob(sample(3 * MIB))
    honest.store.add(blob.data, tag="t")
    error = failure_of(getter, make_impostor(answer), honest, blob)
    assert isinstance(error, LimitExceededError | HashMismatchError)


@pytest.mark.slow
def test_2_garbage_behind_a_plausible_size_is_given_up_after_a_megabyte(
    peak: Callable[[], int], make_peer: Callable[..., Peer], make_impostor: Callable[[Answer], Node]
) -> None:
    blob = SampleBlob(sample(64 * MIB))
    sent = 0

    async def answer(send: SendStream, recv: RecvStream) -> None:
        nonlocal sent
        await send.write(blob.size.to_bytes(8, "little"))
        garbage = Random(2).randbytes(MIB)
        for _ in range(64):
            await send.write(garbage)
            sent += len(garbage)

    honest, getter = make_peer(), make_peer()
    honest.store.add(blob.data, tag="t")
    peak()
    with pytest.raises(BlobUnavailableError):
        getter.fetch(blob.hash, [make_impostor(answer).endpoint_id], max_size=blob.size, timeout=30)
    # The outboard (0.4 % of the size announced), two spans, and what the transport handed over.
    assert 0 < peak() < 8 * MIB
    assert sent < 16 * MIB
    assert getter.store.used_bytes == 0


@pytest.mark.slow
def test_3_a_provider_that_never_answers(
    make_peer: Callable[..., Peer], make_impostor: Callable[[Answer], Node]
) -> None:
    async def answer(send: SendStream, recv: RecvStream) -> None:
        await asyncio.Event().wait()

    honest, getter, blob = make_peer(), make_peer(fetch_limits=HASTY), SampleBlob(sample(50_000))
    honest.store.add(blob.data, tag="t")
    assert isinstance(failure_of(getter, make_impostor(answer), honest, blob), PeerTimeoutError)


@pytest.mark.slow
def test_4_a_provider_that_drips(make_peer: Callable[..., Peer], make_impostor: Callable[[Answer], Node]) -> None:
    blob = SampleBlob(sample(MIB))

    async def answer(send: SendStream, recv: RecvStream) -> None:
        response = b"".join(encode(blob))
        for i in range(len(response)):
            await send.write(response[i : i + 1])
            await asyncio.sleep(0.01)

    honest, getter = make_peer(), make_peer(fetch_limits=HASTY)
    honest.store.add(blob.data, tag="t")
    assert isinstance(failure_of(getter, make_impostor(answer), honest, blob), PeerTimeoutError)


def test_5_a_provider_that_sends_more_than_the_blob(
    make_peer: Callable[..., Peer], make_impostor: Callable[[Answer], Node]
) -> None:
    blob = SampleBlob(sample(20_000))

    async def answer(send: SendStream, recv: RecvStream) -> None:
        await send.write(b"".join(encode(blob)) + bytes(MIB))
        await send.finish()

    getter = make_peer()
    # All of it is proven, so it counts, whatever came behind.
    assert bytes(getter.fetch(blob.hash, [make_impostor(answer).endpoint_id])) == blob.data


def test_6_a_provider_that_hangs_up(make_peer: Callable[..., Peer], make_node: Callable[..., Node]) -> None:
    async def serve(connection: Connection) -> None:
        await connection.accept_bi()

    honest, getter, blob = make_peer(), make_peer(), SampleBlob(sample(50_000))
    honest.store.add(blob.data, tag="t")
    node = make_node()
    node.accept(ALPN, serve)
    # Whether the end of the stream or that of the connection is seen first is a matter of luck.
    assert isinstance(failure_of(getter, node, honest, blob), ConnectionLostError | TruncatedError)


def test_7_a_size_of_two_to_the_64_is_not_believed(
    make_peer: Callable[..., Peer], make_impostor: Callable[[Answer], Node]
) -> None:
    async def answer(send: SendStream, recv: RecvStream) -> None:
        await send.write(b"\xff" * 8 + bytes(1000))
        await send.finish()

    honest, getter, blob = make_peer(), make_peer(), SampleBlob(sample(50_000))
    honest.store.add(blob.data, tag="t")
    assert isinstance(failure_of(getter, make_impostor(answer), honest, blob), LimitExceededError)


def others_are_served(provider: Peer, getter: Peer, root: bytes, data: bytes) -> None:
    getter.store.delete_tags(lambda _: True)
    getter.store.collect_garbage()
    assert bytes(getter.fetch(root, [provider.id], timeout=20)) == data


@pytest.mark.slow
def test_8_ten_thousand_streams(make_peer: Callable[..., Peer], make_node: Callable[..., Node]) -> None:
    provider, getter, attacker = make_peer(serve_limits=QUICK), make_peer(), make_node()
    data = sample(MIB)
    root = provider.store.add(data, tag="t")

    async def attack() -> int:
        connection = await attacker.connect(provider.node.addr(), ALPN)
        streams = []
        try:
            for _ in range(10_000):
                send, recv = await connection.open_bi()
                await send.write(b"\x00")
                streams.append((send, recv))
        except ConnectionLostError:
            assert connection.close_code == 2
        return len(streams)

    attacking = attacker.submit(attack())
    others_are_served(provider, getter, root, data)
    # No more than the transport allows at a time were ever open.
    assert attacking.result(20) <= 200
    others_are_served(provider, getter, root, data)


@pytest.mark.slow
def test_9_a_peer_that_never_reads(make_peer: Callable[..., Peer], make_node: Callable[..., Node]) -> None:
    provider, getter, attacker = make_peer(serve_limits=QUICK), make_peer(), make_node()
    data = Random(9).randbytes(8 * MIB)
    root = provider.store.add(data, tag="t")

    async def attack() -> str:
        connection = await attacker.connect(provider.node.addr(), ALPN)
        streams = []
        for _ in range(20):
            send, recv = await connection.open_bi()
            await send.write(push_request(GetRequest.blob(root)))
            await send.finish()
            streams.append((send, recv))
        return await connection.closed()

    attacking = attacker.submit(attack())
    others_are_served(provider, getter, root, data)
    # The word may be lost on a peer that reads nothing; that it is cut off is not.
    assert attacking.result(20)
    others_are_served(provider, getter, root, data)


def test_10_ten_megabytes_of_request(make_peer: Callable[..., Peer], make_node: Callable[..., Node]) -> None:
    provider, getter, attacker = make_peer(serve_limits=QUICK), make_peer(), make_node()
    root = provider.store.add(sample(1000), tag="t")

    async def attack() -> bytes:
        connection = await attacker.connect(provider.node.addr(), ALPN)
        send, recv = await connection.open_bi()
        try:
            for _ in range(160):
                await send.write(b"\x00" * 65536)
        except ExchangeError:
            pass  # told to stop
        return await recv.read_to_end(100, timeout=10)

    assert attacker.submit(attack()).result(20) == b""
    others_are_served(provider, getter, root, sample(1000))


@pytest.mark.slow
def test_11_a_request_that_picks_at_every_group(make_peer: Callable[..., Peer], make_node: Callable[..., Node]) -> None:
    """Costs hashing all of the blob, which happens beside the loop: others are served meanwhile."""
    provider, getter, attacker = make_peer(), make_peer(), make_node()
    blob = SampleBlob(sample(16 * MIB))
    small = sample(1000)
    provider.store.add(blob.data, tag="big")
    root = provider.store.add(small, tag="small")
    picks = ChunkRanges(tuple(b for group in range(0, 16 * 1024, 16) for b in (group + 3, group + 4)))

    async def attack() -> bytes:
        connection = await attacker.connect(provider.node.addr(), ALPN)
        send, recv = await connection.open_bi()
        await send.write(push_request(GetRequest.blob(blob.hash, picks)))
        await send.finish()
        return await recv.read_to_end(2**24, timeout=60)

    attacking = attacker.submit(attack())
    others_are_served(provider, getter, root, small)
    assert attacking.result(60) == b"".join(encode(blob, picks))


@pytest.mark.slow
def test_12_requests_of_half_a_million_boundaries(
    make_peer: Callable[..., Peer], make_node: Callable[..., Node]
) -> None:
    """Each takes long to read, beside the loop and one at a time: others are served meanwhile."""
    provider, getter, attacker = make_peer(), make_peer(), make_node()
    data = sample(100_000)
    root = provider.store.add(data, tag="t")
    request = push_request(GetRequest.blob(root, ChunkRanges(tuple(range(500_000)))))
    served: list[float] = []

    async def attack() -> list[bytes]:
        connection = await attacker.connect(provider.node.addr(), ALPN)
        streams = [await connection.open_bi() for _ in range(6)]
        for send, _ in streams:
            await send.write(request)
            await send.finish()
        return [await recv.read_to_end(2**20, timeout=60) for _, recv in streams]

    attacking = attacker.submit(attack())
    attacking.add_done_callback(lambda _: served.append(0.0))
    others_are_served(provider, getter, root, data)
    assert not served, "the attack was over before anybody else was served"
    assert attacking.result(60) == [b"".join(encode(SampleBlob(data), ChunkRanges(tuple(range(500_000)))))] * 6
