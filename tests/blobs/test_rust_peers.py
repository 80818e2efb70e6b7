"""Blobs go to and from iroh-blobs 0.99, live, and each side survives the other's misfortune."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from random import Random
from typing import Any

import pytest
from typing_extensions import override

from blobs.conftest import Peer
from blobs.samples import sample
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.blobs.encoder import encode
from distro_optim.comm.iroh.blobs.ranges import ALL, LAST_CHUNK, ChunkRanges, RangesSeq
from distro_optim.comm.iroh.blobs.request import ALPN, GetManyRequest, GetRequest, Request, push_request
from distro_optim.comm.iroh.blobs.store import Blob, MemoryStore
from distro_optim.comm.tickets import BlobTicket
from distro_optim.errors import BlobUnavailableError, HashMismatchError, StreamResetError

rust = pytest.importorskip("aster._aster", reason="the Rust peer: pip install aster-rpc==0.1.2")

pytestmark = [pytest.mark.waiting]

MIB = 2**20
SIZES = [0, 1, 1023, 1024, 1025, 16384, 16385, MIB + 1]


class RustNode:
    """An iroh 0.97 node on an event loop that runs only while it is waited for."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._node = self.run(self._start())
        self.blobs = rust.blobs_client(self._node)

    async def _start(self) -> Any:
        config = rust.EndpointConfig(alpns=[], relay_mode="disabled", bind_addr="127.0.0.1:0")
        return await rust.IrohNode.memory_with_alpns([], config)

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float = 60.0) -> Any:
        return self._runner.run(asyncio.wait_for(coroutine, timeout))

    def call(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Calls a method of the Rust side and waits; these must be called with a loop running."""

        async def calling() -> Any:
            return await function(*args)

        return self.run(calling())

    @property
    def addr(self) -> EndpointAddr:
        info = self._node.node_addr_info()
        direct = tuple(SocketAddr.parse(text) for text in info.direct_addresses)
        return EndpointAddr(bytes.fromhex(info.endpoint_id), (), direct)

    def add(self, data: bytes) -> bytes:
        return bytes.fromhex(self.call(self.blobs.add_bytes, data))

    def fetch(self, peer: Peer, root: bytes) -> bytes:
        ticket = str(BlobTicket.raw(peer.node.addr(), root))
        return bytes(self.call(self.blobs.download_blob, ticket))

    def close(self) -> None:
        self.call(self._node.close)
        self._runner.close()


@pytest.fixture
def rust_node() -> Iterator[RustNode]:
    node = RustNode()
    yield node
    node.close()


def test_every_size_comes_from_rust(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    peer = make_peer()
    peer.node.addresses.add(rust_node.addr)
    for size in SIZES:
        root = rust_node.add(sample(size))
        assert bytes(peer.fetch(root, [rust_node.addr.id])) == sample(size)


def test_every_size_goes_to_rust(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    peer = make_peer()
    for size in SIZES:
        assert rust_node.fetch(peer, peer.store.add(sample(size), tag=f"t{size}")) == sample(size)


@pytest.mark.slow
def test_sixty_four_megabytes_go_to_rust_and_come_back(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    first, second = make_peer(), make_peer()
    data = Random(1).randbytes(64 * MIB)
    root = first.store.add(data, tag="t")
    assert rust_node.fetch(first, root) == data
    second.node.addresses.add(rust_node.addr)
    assert bytes(second.fetch(root, [rust_node.addr.id])) == data


def ask(peer: Peer, provider: EndpointAddr, request: bytes) -> bytes:
    """The bytes a provider answers a request with."""

    async def asking() -> bytes:
        connection = await peer.node.connect(provider, ALPN)
        try:
            send, recv = await connection.open_bi()
            await send.write(request)
            await send.finish()
            return await recv.read_to_end(2**24, timeout=20)
        finally:
            connection.close()

    return peer.node.submit(asking()).result(30)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 16384, 40_000, 100_000])
def test_any_range_from_python_is_byte_for_byte_that_from_rust(
    make_peer: Callable[..., Peer], rust_node: RustNode, size: int
) -> None:
    asker, provider = make_peer(), make_peer()
    root = rust_node.add(sample(size))
    provider.store.add(sample(size), tag="t")
    rng = Random(size)
    chosen = [ALL, LAST_CHUNK, *(random_ranges(rng, size // 1024 + 4) for _ in range(12))]
    for ranges in chosen:
        request = push_request(GetRequest.blob(root, ranges))
        assert ask(asker, provider.node.addr(), request) == ask(asker, rust_node.addr, request), ranges


def random_ranges(rng: Random, top: int) -> ChunkRanges:
    return ChunkRanges(tuple(sorted(rng.sample(range(top), rng.randint(1, min(top, 6))))))


def test_lists_and_many_are_answered_alike(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    asker, provider = make_peer(), make_peer()
    blobs = [sample(5), sample(20_000)]
    roots = [rust_node.add(data) for data in blobs]
    listing = b"".join(roots)
    for data in (*blobs, listing):
        provider.store.add(data, tag=f"t{len(data)}")
    requests: list[Request] = [
        GetRequest(rust_node.add(listing), RangesSeq(((0, ALL),))),
        GetRequest(rust_node.add(listing), RangesSeq(((1, LAST_CHUNK), (2, ALL), (3, ChunkRanges(()))))),
        GetManyRequest(tuple(roots), RangesSeq.first(2)),
    ]
    for request in map(push_request, requests):
        assert ask(asker, provider.node.addr(), request) == ask(asker, rust_node.addr, request)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"\x05",
        b"\x00" + bytes(10),
        b"\x00" + bytes(32) + b"\xff" * 30,
        b"\x09" + b"\xff" * 9 + b"\x01",
        b"\x00" + bytes(2**20 + 5),
    ],
    ids=["empty", "reserved type", "short", "endless varint", "many hashes", "too large"],
)
def test_bad_requests_get_the_answer_that_rust_gives(
    make_peer: Callable[..., Peer], rust_node: RustNode, request_bytes: bytes
) -> None:
    asker, provider = make_peer(), make_peer()
    assert outcome(asker, provider.node.addr(), request_bytes) == outcome(asker, rust_node.addr, request_bytes)


def test_an_unknown_hash_gets_the_answer_that_rust_gives(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    asker, provider = make_peer(), make_peer()
    request = push_request(GetRequest.blob(bytes(range(32))))
    assert outcome(asker, provider.node.addr(), request) == outcome(asker, rust_node.addr, request) == 3


def outcome(peer: Peer, provider: EndpointAddr, request: bytes) -> bytes | int:
    """What was answered: bytes, or the code of a reset."""
    try:
        return ask(peer, provider, request)
    except StreamResetError as error:
        return error.code


class CutStore(MemoryStore):
    """Loses its data behind a certain byte, so that a provider must break off; notes what was asked."""

    def __init__(self, cut: int) -> None:
        super().__init__()
        self.cut: int | None = cut
        self.first_reads: list[int] = []

    @override
    def get(self, root: bytes) -> Blob | None:
        blob = super().get(root)
        return None if blob is None else CutBlob(blob, self)


class CutBlob(Blob):
    __slots__ = ("_reads", "_store")

    def __init__(self, blob: Blob, store: CutStore) -> None:
        super().__init__(blob.data, blob.outboard)
        self._store, self._reads = store, 0

    @override
    def read(self, offset: int, length: int) -> memoryview:
        if self._reads == 0:
            self._store.first_reads.append(offset)
        self._reads += 1
        if self._store.cut is not None and offset >= self._store.cut:
            raise OSError("the data is gone")
        return super().read(offset, length)


@pytest.mark.slow
def test_a_rust_getter_that_is_cut_resumes_with_a_range(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    store = CutStore(cut=6 * MIB)
    peer = make_peer(store)
    data = Random(2).randbytes(10 * MIB)
    root = store.add(data, tag="t")
    with pytest.raises(Exception, match=r"(?i)download|get"):
        rust_node.fetch(peer, root)
    store.cut = None
    assert rust_node.fetch(peer, root) == data
    assert store.first_reads[0] == 0
    assert store.first_reads[-1] > 0, "it began again from zero"


def test_a_python_getter_that_is_cut_by_its_peer_gets_the_rest_from_rust(
    make_peer: Callable[..., Peer], rust_node: RustNode
) -> None:
    store = CutStore(cut=6 * MIB)
    provider, getter = make_peer(store), make_peer()
    data = Random(3).randbytes(10 * MIB)
    root = store.add(data, tag="t")
    assert rust_node.add(data) == root
    getter.node.addresses.add(rust_node.addr)
    seen: list[int] = []
    failed: list[bytes] = []
    blob = getter.fetch(
        root,
        [provider.id, rust_node.addr.id],
        progress=lambda done, size: seen.append(done),
        on_failure=lambda peer, error: failed.append(peer),
    )
    assert bytes(blob) == data
    assert seen == sorted(seen)
    assert failed == [provider.id]


class CorruptStore(MemoryStore):
    """Serves one bit wrong."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    @override
    def get(self, root: bytes) -> Blob | None:
        blob = super().get(root)
        if blob is None:
            return None
        data = bytearray(blob.data)
        data[self.at] ^= 1
        return Blob(data, blob.outboard)


def test_a_corrupting_provider_is_caught_and_the_getter_goes_on_with_rust(
    make_peer: Callable[..., Peer], rust_node: RustNode
) -> None:
    at = 5 * MIB + 12_345
    liar, getter = make_peer(CorruptStore(at)), make_peer()
    data = Random(4).randbytes(8 * MIB)
    root = liar.store.add(data, tag="t")
    rust_node.add(data)
    getter.node.addresses.add(rust_node.addr)
    failures: list[Exception] = []
    blob = getter.fetch(root, [liar.id, rust_node.addr.id], on_failure=lambda _, error: failures.append(error))
    assert bytes(blob) == data
    (error,) = failures
    assert isinstance(error, HashMismatchError)
    assert error.at == at // 16384 * 16384


def test_a_rust_getter_refuses_what_a_corrupting_provider_sends(
    make_peer: Callable[..., Peer], rust_node: RustNode
) -> None:
    liar = make_peer(CorruptStore(100_000))
    root = liar.store.add(sample(MIB), tag="t")
    with pytest.raises(Exception, match=r"(?i)download|get"):
        rust_node.fetch(liar, root)


def test_a_blob_that_rust_has_not_got_is_unavailable(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    peer = make_peer()
    peer.node.addresses.add(rust_node.addr)
    with pytest.raises(BlobUnavailableError, match="code 3"):
        peer.fetch(bytes(range(32)), [rust_node.addr.id])


def test_a_collection_goes_to_rust(make_peer: Callable[..., Peer], rust_node: RustNode) -> None:
    other = RustNode()
    try:
        collection = bytes.fromhex(
            other.call(other.blobs.add_collection, [("a.txt", b"alpha"), ("b.bin", sample(50_000))])
        )
        peer = make_peer()
        peer.node.addresses.add(other.addr)
        listing = bytes(peer.fetch(collection, [other.addr.id]))
        for i in range(0, len(listing), 32):
            peer.fetch(listing[i : i + 32], [other.addr.id], tag=f"child{i}")
        ask_all = push_request(GetRequest(collection, RangesSeq(((0, ALL),))))
        assert ask(peer, other.addr, ask_all) == b"".join(
            piece
            for root in (collection, *(listing[i : i + 32] for i in range(0, len(listing), 32)))
            for piece in encode(existing(peer, root))
        )
    finally:
        other.close()


def existing(peer: Peer, root: bytes) -> Blob:
    blob = peer.store.get(root)
    assert blob is not None
    return blob
