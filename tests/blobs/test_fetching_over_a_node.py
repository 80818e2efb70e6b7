"""Fetching: from the store, from several providers, resumed, cancelled, shared, and within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from typing_extensions import override

from blobs.conftest import Peer
from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs.disk import DiskStore
from distro_optim.comm.iroh.blobs.encoder import encoded_len
from distro_optim.comm.iroh.blobs.store import Blob, MemoryStore
from distro_optim.errors import BlobUnavailableError, ConfigurationError, PeerUnreachableError, StoreFullError

pytestmark = [pytest.mark.waiting]

MIB = 2**20


@pytest.mark.parametrize("size", [0, 1, 1025, 16384, 16385, MIB + 1, 5 * MIB])
def test_a_blob_travels_from_node_to_node(make_peer: Callable[..., Peer], size: int) -> None:
    provider, getter = make_peer(), make_peer()
    root = provider.store.add(sample(size), tag="t")
    progress: list[tuple[int, int]] = []
    blob = getter.fetch(root, [provider.id], tag="got", progress=lambda done, of: progress.append((done, of)))
    assert bytes(blob) == sample(size)
    assert getter.store.tags() == {"got": root}
    assert progress[-1] == (size, size)


def test_what_was_fetched_is_served_to_others(make_peer: Callable[..., Peer]) -> None:
    first, second, third = make_peer(), make_peer(), make_peer()
    root = first.store.add(sample(100_000), tag="t")
    second.fetch(root, [first.id])
    assert bytes(third.fetch(root, [second.id])) == sample(100_000)


def test_what_is_there_is_not_fetched(make_peer: Callable[..., Peer]) -> None:
    peer = make_peer()
    root = peer.store.add(sample(1000))
    assert bytes(peer.fetch(root, [], tag="t")) == sample(1000)
    assert peer.store.tags() == {"t": root}


def test_providers_are_tried_in_order_and_the_unreachable_passed_over(make_peer: Callable[..., Peer]) -> None:
    has_not, has, getter = make_peer(), make_peer(), make_peer()
    root = has.store.add(sample(100_000), tag="t")
    failures: list[tuple[bytes, type[Exception]]] = []
    blob = getter.fetch(
        root,
        [bytes(31) + b"\x01", has_not.id, getter.id, has.id],
        on_failure=lambda provider, error: failures.append((provider, type(error))),
    )
    assert bytes(blob) == sample(100_000)
    assert [provider for provider, _ in failures] == [bytes(31) + b"\x01", has_not.id]
    assert issubclass(failures[0][1], PeerUnreachableError)


def test_when_nobody_has_it_every_reason_is_told(make_peer: Callable[..., Peer]) -> None:
    provider, getter = make_peer(), make_peer()
    with pytest.raises(BlobUnavailableError, match="code 3"):
        getter.fetch(bytes(range(32)), [provider.id])
    with pytest.raises(BlobUnavailableError, match="nobody"):
        getter.fetch(bytes(range(32)), [])
    assert getter.store.used_bytes == 0


def test_a_blob_above_the_callers_limit_is_refused(make_peer: Callable[..., Peer]) -> None:
    provider, getter = make_peer(), make_peer()
    root = provider.store.add(sample(100_000), tag="t")
    with pytest.raises(BlobUnavailableError, match="at most 99999"):
        getter.fetch(root, [provider.id], max_size=99_999)
    with pytest.raises(ConfigurationError, match="max_size"):
        getter.fetch(root, [provider.id], max_size=-1)


def test_a_full_store_is_not_the_providers_fault(make_peer: Callable[..., Peer]) -> None:
    provider, getter = make_peer(), make_peer(MemoryStore(max_bytes=MIB))
    root = provider.store.add(sample(3 * MIB), tag="t")
    failures: list[bytes] = []
    with pytest.raises(StoreFullError):
        getter.fetch(root, [provider.id], on_failure=lambda provider, _: failures.append(provider))
    assert failures == []
    assert getter.store.used_bytes == 0
    small = provider.store.add(sample(1000), tag="s")
    assert bytes(getter.fetch(small, [provider.id])) == sample(1000)


class HeldStore(MemoryStore):
    """Hands out blobs whose data is there only up to a certain byte, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[int] = []

    @override
    def get(self, root: bytes) -> Blob | None:
        blob = super().get(root)
        return None if blob is None else NotedBlob(blob, self.reads)


class NotedBlob(Blob):
    __slots__ = ("_reads",)

    def __init__(self, blob: Blob, reads: list[int]) -> None:
        super().__init__(blob.data, blob.outboard)
        self._reads = reads

    @override
    def read(self, offset: int, length: int) -> memoryview:
        self._reads.append(offset)
        return super().read(offset, length)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cancelled_download_goes_on_where_it_was(make_peer: Callable[..., Peer], kind: str, tmp_path: Path) -> None:
    held = HeldStore()
    store = MemoryStore() if kind == "memory" else DiskStore(tmp_path, durable=False)
    provider, getter = make_peer(held), make_peer(store)
    data = Random(1).randbytes(16 * MIB)
    root = held.add(data, tag="t")

    async def fetch_some() -> int:
        reached = asyncio.Event()
        done_bytes = 0

        def progress(done: int, size: int) -> None:
            nonlocal done_bytes
            done_bytes = done
            if done >= 3 * MIB:
                reached.set()

        task = asyncio.ensure_future(getter.service.fetch(root, [provider.id], max_size=16 * MIB, progress=progress))
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return done_bytes

    done = getter.node.submit(fetch_some()).result(30)
    assert 3 * MIB <= done < 16 * MIB
    held.reads.clear()
    seen: list[int] = []
    blob = getter.fetch(root, [provider.id], progress=lambda done, _: seen.append(done))
    assert bytes(blob) == data
    assert min(held.reads) >= 3 * MIB
    assert seen[0] > 3 * MIB
    if isinstance(store, DiskStore):
        store.close()


def test_callers_who_want_the_same_blob_share_one_download(make_peer: Callable[..., Peer]) -> None:
    held = HeldStore()
    provider, getter = make_peer(held), make_peer()
    root = held.add(sample(3 * MIB), tag="t")

    async def all_at_once() -> list[Blob]:
        fetches = [getter.service.fetch(root, [provider.id], max_size=3 * MIB, tag=f"t{i}") for i in range(5)]
        return await asyncio.gather(*fetches)

    blobs = getter.node.submit(all_at_once()).result(30)
    assert all(bytes(blob) == sample(3 * MIB) for blob in blobs)
    assert held.reads.count(0) == 1
    assert len(getter.store.tags()) == 5


@pytest.mark.slow
def test_many_blobs_travel_at_once(make_peer: Callable[..., Peer]) -> None:
    provider, getter = make_peer(), make_peer()
    blobs = [SampleBlob(Random(i).randbytes(1000 * i)) for i in range(60)]
    for i, blob in enumerate(blobs):
        provider.store.add(blob.data, tag=str(i))

    async def fetch_all() -> list[Blob]:
        return await asyncio.gather(
            *(getter.service.fetch(b.hash, [provider.id], max_size=10**6, tag=b.hash.hex()) for b in blobs)
        )

    fetched = getter.node.submit(fetch_all()).result(50)
    assert [bytes(blob) for blob in fetched] == [blob.data for blob in blobs]
    assert len(provider.node.connections()) == 1


@pytest.mark.slow
def test_a_store_far_smaller_than_the_traffic_is_enough(make_peer: Callable[..., Peer]) -> None:
    room = 4 * encoded_len(100_000)
    provider, getter = make_peer(MemoryStore(max_bytes=room)), make_peer(MemoryStore(max_bytes=room))
    for step in range(40):
        data = Random(step).randbytes(100_000)
        root = provider.store.add(data, tag=f"result_{step % 3}")
        assert bytes(getter.fetch(root, [provider.id], tag=f"result_{step % 3}")) == data
        assert provider.store.used_bytes <= room
        assert getter.store.used_bytes <= room
