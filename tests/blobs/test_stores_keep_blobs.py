"""Every store keeps what is tagged, within its limit, and finishes downloads that were cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs.decoder import Decoder
from distro_optim.comm.iroh.blobs.disk import DiskStore
from distro_optim.comm.iroh.blobs.encoder import encode
from distro_optim.comm.iroh.blobs.getter import missing_ranges
from distro_optim.comm.iroh.blobs.outboard import outboard_len
from distro_optim.comm.iroh.blobs.store import MAX_TAG_LEN, BlobStore, MemoryStore, PartialBlob
from distro_optim.comm.iroh.blobs.tree import root_hash
from distro_optim.errors import ConfigurationError, ExchangeError, HashMismatchError, StoreFullError

pytestmark = pytest.mark.waiting


MIB = 2**20
MakeStore = Callable[..., BlobStore]


@pytest.fixture(params=["memory", "disk"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    opened: list[DiskStore] = []

    def make(max_bytes: int | None = None, **options: float) -> BlobStore:
        if request.param == "memory":
            return MemoryStore(max_bytes, **options)
        opened.append(DiskStore(tmp_path / str(len(opened)), max_bytes=max_bytes, durable=False, **options))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


def download(partial: PartialBlob, blob: SampleBlob, stop: int | None = None) -> None:
    """Feeds a partial blob what is missing of it, or only the first ``stop`` bytes of the response."""
    ranges = missing_ranges(partial.prefix)
    decoder = Decoder(blob.hash, ranges, max_size=blob.size, prefix=partial.prefix, new_outboard=partial.new_outboard)
    response = b"".join(encode(blob, ranges))[:stop]
    for piece in decoder.receive(response):
        partial.append(piece.data)
    partial.prefix = decoder.prefix


@pytest.mark.parametrize("size", [0, 1, 1024, 16384, 16385, MIB + 1])
def test_a_blob_comes_back_with_its_outboard(make_store: MakeStore, size: int) -> None:
    store, sampled = make_store(), SampleBlob(sample(size))
    assert store.add(sampled.data, tag="t") == sampled.hash
    blob = store.get(sampled.hash)
    assert blob is not None
    assert bytes(blob) == sampled.data
    assert bytes(blob.outboard) == sampled.outboard
    assert len(blob) == blob.size == size
    assert sampled.hash in store
    assert bytes(32) not in store
    assert store.used_bytes == size + outboard_len(size)


def test_what_is_added_is_a_copy(make_store: MakeStore) -> None:
    store, data = make_store(), bytearray(b"before")
    root = store.add(data)
    data[:] = b"after!"
    blob = store.get(root)
    assert blob is not None
    assert bytes(blob) == b"before"


def test_the_same_blob_is_kept_once(make_store: MakeStore) -> None:
    store = make_store()
    assert store.add(b"x" * 100, tag="a") == store.add(b"x" * 100, tag="b")
    assert store.used_bytes == 100
    assert set(store.tags()) == {"a", "b"}


def test_garbage_is_what_no_tag_names(make_store: MakeStore) -> None:
    store = make_store()
    kept, dropped = store.add(b"kept", tag="k"), store.add(b"dropped")
    assert store.collect_garbage() == 7
    assert kept in store
    assert dropped not in store
    assert store.used_bytes == 4


def test_a_tag_that_moves_lets_its_old_blob_go(make_store: MakeStore) -> None:
    store = make_store()
    old, new = store.add(b"old", tag="t"), store.add(b"new", tag="t")
    store.collect_garbage()
    assert old not in store
    assert new in store


def test_tags_are_deleted_by_what_they_are_called(make_store: MakeStore) -> None:
    store = make_store()
    for step in range(6):
        store.add(bytes([step]), tag=f"distro-result_{step}")
    assert store.delete_tags(lambda name: int(name.partition("_")[2]) < 4) == 4
    store.collect_garbage()
    assert sorted(store.tags()) == ["distro-result_4", "distro-result_5"]
    assert store.used_bytes == 2


def test_a_reader_keeps_what_the_store_drops(make_store: MakeStore) -> None:
    store, data = make_store(), sample(100_000)
    blob = store.get(store.add(data))
    store.collect_garbage()
    assert store.used_bytes == 0
    assert blob is not None
    assert bytes(blob) == data


def test_a_full_store_drops_garbage_before_it_refuses(make_store: MakeStore) -> None:
    store = make_store(max_bytes=1000)
    old = store.add(b"a" * 600)
    store.add(b"b" * 600, tag="b")
    assert old not in store
    with pytest.raises(StoreFullError, match="600 of 1000"):
        store.add(b"c" * 600, tag="c")
    assert store.used_bytes == 600
    assert set(store.tags()) == {"b"}


def test_many_blobs_pass_through_a_store_of_ten(make_store: MakeStore) -> None:
    store = make_store(max_bytes=10 * 1000)
    for i in range(200):
        store.add(i.to_bytes(1000, "little"), tag=f"t_{i % 9}")
        assert store.used_bytes <= 10 * 1000
    assert len(store.tags()) == 9


@pytest.mark.parametrize("size", [0, 5, 16385, 2 * MIB + 77])
def test_a_download_becomes_a_blob(make_store: MakeStore, size: int) -> None:
    store, sampled = make_store(), SampleBlob(sample(size))
    partial = store.begin(sampled.hash)
    download(partial, sampled)
    store.complete(partial, tag="t")
    partial.close()
    blob = store.get(sampled.hash)
    assert blob is not None
    assert bytes(blob) == sampled.data
    assert bytes(blob.outboard) == sampled.outboard
    assert store.used_bytes == size + outboard_len(size)
    assert store.tags() == {"t": sampled.hash}


def test_a_download_that_was_cut_is_continued(make_store: MakeStore) -> None:
    store, sampled = make_store(), SampleBlob(sample(3 * MIB))
    first = store.begin(sampled.hash)
    download(first, sampled, 2 * MIB + 50_000)
    first.close()
    second = store.begin(sampled.hash)
    assert second.prefix is not None
    assert second.prefix.length == 2 * MIB
    download(second, sampled)
    store.complete(second, tag="t")
    second.close()
    blob = store.get(sampled.hash)
    assert blob is not None
    assert bytes(blob) == sampled.data


def test_a_download_that_was_cut_waits_until_its_room_is_needed(make_store: MakeStore) -> None:
    store, sampled = make_store(max_bytes=4 * MIB), SampleBlob(sample(3 * MIB))
    partial = store.begin(sampled.hash)
    download(partial, sampled, 2 * MIB + 50_000)
    partial.close()
    assert store.collect_garbage() == 0
    assert store.used_bytes == 2 * MIB + outboard_len(3 * MIB)
    store.add(sample(3 * MIB + 1), tag="t")
    assert store.used_bytes == 3 * MIB + 1 + outboard_len(3 * MIB + 1)


def test_a_download_that_nobody_continues_in_time_is_garbage(make_store: MakeStore) -> None:
    store, sampled = make_store(keep_cut_seconds=0.0), SampleBlob(sample(3 * MIB))
    partial = store.begin(sampled.hash)
    download(partial, sampled, 2 * MIB + 50_000)
    store.collect_garbage()
    assert store.used_bytes == 2 * MIB + outboard_len(3 * MIB)
    partial.close()
    store.collect_garbage()
    assert store.used_bytes == 0
    again = store.begin(sampled.hash)
    assert again.prefix is None
    again.close()


def test_a_download_can_be_started_again(make_store: MakeStore) -> None:
    store, sampled = make_store(), SampleBlob(sample(3 * MIB))
    partial = store.begin(sampled.hash)
    download(partial, sampled, 2 * MIB)
    partial.restart()
    assert store.used_bytes == 0
    download(partial, sampled)
    store.complete(partial, tag="t")
    assert sampled.hash in store
    partial.close()


def test_one_blob_is_downloaded_once_at_a_time(make_store: MakeStore) -> None:
    store = make_store()
    partial = store.begin(bytes(32))
    with pytest.raises(ExchangeError, match="already"):
        store.begin(bytes(32))
    partial.close()
    store.begin(bytes(32)).close()


def test_a_download_does_not_outgrow_the_store(make_store: MakeStore) -> None:
    store, sampled = make_store(max_bytes=2 * MIB), SampleBlob(sample(3 * MIB))
    partial = store.begin(sampled.hash)
    with pytest.raises(StoreFullError):
        download(partial, sampled)
    assert store.used_bytes <= 2 * MIB
    partial.restart()
    partial.close()
    assert store.used_bytes == 0


def test_what_is_not_proven_does_not_become_a_blob(make_store: MakeStore) -> None:
    store, sampled = make_store(), SampleBlob(sample(3 * MIB))
    partial = store.begin(sampled.hash)
    with pytest.raises(HashMismatchError):
        store.complete(partial)
    download(partial, sampled, 2 * MIB)
    with pytest.raises(HashMismatchError):
        store.complete(partial)
    assert sampled.hash not in store
    partial.close()


def test_a_blob_that_was_added_meanwhile_is_counted_once(make_store: MakeStore) -> None:
    store, sampled = make_store(), SampleBlob(sample(100_000))
    partial = store.begin(sampled.hash)
    download(partial, sampled)
    store.add(sampled.data, tag="t")
    store.complete(partial)
    partial.close()
    assert store.used_bytes == sampled.size + len(sampled.outboard)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "model-x.y z", "ü" * (MAX_TAG_LEN // 2), "con", "A", "a%2Fb"])
def test_any_short_text_is_a_tag(make_store: MakeStore, name: str) -> None:
    store = make_store()
    root = store.add(b"x", tag=name)
    assert store.tags() == {name: root}


def test_a_tag_that_is_empty_or_long_is_a_mistake(make_store: MakeStore) -> None:
    store = make_store()
    for name in ("", "x" * (MAX_TAG_LEN + 1)):
        with pytest.raises(ConfigurationError):
            store.add(b"x", tag=name)
    with pytest.raises(ConfigurationError, match="32 bytes"):
        store.set_tag("t", b"short")
    assert store.tags() == {}


def test_a_directory_is_opened_again_with_all_that_was_in_it(tmp_path: Path) -> None:
    sampled, cut = SampleBlob(sample(100_000)), SampleBlob(sample(3 * MIB))
    with DiskStore(tmp_path) as store:
        store.add(sampled.data, tag="a.b/c")
        store.add(b"untagged")
        partial = store.begin(cut.hash)
        download(partial, cut, 2 * MIB)
        partial.close()
        used = store.used_bytes
    with DiskStore(tmp_path) as store:
        assert store.used_bytes == used
        assert store.tags() == {"a.b/c": sampled.hash}
        blob = store.get(sampled.hash)
        assert blob is not None
        assert bytes(blob) == sampled.data
        assert root_hash(b"untagged") in store
        partial = store.begin(cut.hash)
        assert partial.prefix is not None
        assert partial.prefix.length == MIB
        download(partial, cut)
        store.complete(partial, tag="t")
        partial.close()
        assert cut.hash in store


def test_a_directory_is_open_once_at_a_time(tmp_path: Path) -> None:
    with DiskStore(tmp_path), pytest.raises(ConfigurationError, match="in use"):
        DiskStore(tmp_path)
    DiskStore(tmp_path).close()


def test_a_directory_of_another_version_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("distro_optim blobs 2\n")
    with pytest.raises(ConfigurationError, match="blobs 2"):
        DiskStore(tmp_path)


def test_strange_files_in_a_directory_do_no_harm(tmp_path: Path) -> None:
    with DiskStore(tmp_path) as store:
        root = store.add(sample(100_000), tag="t")
    name = root.hex()
    for path in ("tmp/7", "tags/bad", "blobs/zz.data", f"partial/{name[2:]}.data", "partial/x.y.pairs"):
        (tmp_path / path).write_bytes(b"strange")
    (tmp_path / "blobs" / "ab").mkdir(exist_ok=True)
    (tmp_path / "blobs" / "ab" / f"{'ab' * 32}.pairs").write_bytes(bytes(64))
    (tmp_path / "blobs" / "ab" / f"{'ab' * 32}.data").write_bytes(bytes(100_000))
    (tmp_path / "partial" / f"{'cd' * 32}.99999999999.pairs").write_bytes(b"short")
    (tmp_path / "partial" / f"{'cd' * 32}.data").write_bytes(b"short")
    with DiskStore(tmp_path) as store:
        assert root in store
        assert bytes.fromhex("ab" * 32) not in store
        assert store.tags() == {"t": root}
        partial = store.begin(bytes.fromhex("cd" * 32))
        assert partial.prefix is None
        partial.close()
    with DiskStore(tmp_path, keep_cut_seconds=0.0) as store:
        store.collect_garbage()
        assert store.used_bytes == 100_000 + outboard_len(100_000)
