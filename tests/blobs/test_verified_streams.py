"""A decoder yields exactly what was asked for, and nothing that the hash does not prove."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs.decoder import Decoder, Piece
from distro_optim.comm.iroh.blobs.encoder import encode
from distro_optim.comm.iroh.blobs.prefix import SPAN_LEN, PrefixVerifier, restored_prefix
from distro_optim.comm.iroh.blobs.ranges import ALL, LAST_CHUNK, ChunkRanges
from distro_optim.errors import HashMismatchError, LimitExceededError, ProtocolError, TruncatedError

pytestmark = pytest.mark.waiting


MIB = 2**20
sizes = st.one_of(st.integers(0, 70_000), st.sampled_from([1024, 1025, 16384, 16385, 32768, 49153, 114_689]))
boundary_lists = st.lists(st.one_of(st.integers(0, 120), st.just(2**64 - 1)), unique=True, max_size=6)


def decode(
    root: bytes, ranges: ChunkRanges, response: bytes, cut: int = 0, prefix: PrefixVerifier | None = None
) -> tuple[Decoder, list[Piece]]:
    """Feeds a response in pieces of ``cut`` bytes (0: at once) and joins what comes out."""
    decoder = Decoder(root, ranges, max_size=10 * MIB, prefix=prefix)
    pieces: list[Piece] = []
    for at in range(0, len(response), cut or max(1, len(response))):
        pieces += decoder.receive(response[at : at + cut] if cut else response)
    pieces += decoder.finish()
    return decoder, pieces


def collect(pieces: Iterable[Piece], into: list[Piece]) -> None:
    """Like ``into.extend``, but keeps what came before an error."""
    for piece in pieces:
        into.append(piece)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(sizes, boundary_lists, st.sampled_from([0, 1000, 16449]))
def test_what_is_decoded_is_what_was_encoded(size: int, boundaries: list[int], cut: int) -> None:
    blob, ranges = SampleBlob(sample(size)), ChunkRanges(tuple(sorted(boundaries)))
    response = b"".join(encode(blob, ranges)) if ranges else b""
    decoder, pieces = decode(blob.hash, ranges, response, cut)
    assert decoder.is_complete
    got = set()
    for offset, data in pieces:
        assert blob.data[offset : offset + len(data)] == data
        got |= set(range(offset // 1024, -(-(offset + len(data)) // 1024)))
    if size:
        wanted = ranges.truncated(size)
        last = (size - 1) // 1024
        expected = {c for c in range(last + 1) if c in wanted}
        if any(b > last for b in wanted.boundaries[::2]):
            expected.add(last)
        assert got == expected


@pytest.mark.parametrize("size", [1, 16385, 3 * MIB + 5])
def test_a_stream_may_arrive_byte_by_byte_or_at_once(size: int) -> None:
    blob = SampleBlob(sample(size))
    response = b"".join(encode(blob))
    for cut in (1 if size < 100_000 else 777, 65536, 0):
        decoder, pieces = decode(blob.hash, ALL, response, cut)
        assert b"".join(piece.data for piece in pieces) == blob.data
        assert decoder.prefix is not None
        assert decoder.prefix.is_complete
        assert bytes(decoder.prefix.outboard) == blob.outboard


@pytest.mark.slow
@pytest.mark.parametrize(("size", "boundaries"), [(20_000, (0,)), (40_000, (20, 21)), (3000, (1,)), (700, (0,))])
def test_every_changed_byte_is_noticed(size: int, boundaries: tuple[int, ...]) -> None:
    blob, ranges = SampleBlob(sample(size)), ChunkRanges(boundaries)
    response = bytearray(b"".join(encode(blob, ranges)))
    # Every byte of the pairs and a sample of the data. The size is proven only by a request that has the last chunk.
    first = 8 if boundaries == (20, 21) else 0
    for at in [*range(first, min(len(response), 400)), *range(400, len(response), 1999), len(response) - 1]:
        response[at] ^= 0x40
        with pytest.raises(ProtocolError):
            decode(blob.hash, ranges, bytes(response))
        response[at] ^= 0x40


@pytest.mark.slow
@pytest.mark.parametrize("bad_group", [0, 1, 63, 64, 100, 191])
def test_the_first_bad_group_is_named_and_all_before_it_is_kept(bad_group: int) -> None:
    blob = SampleBlob(sample(3 * MIB))
    liar = SampleBlob(blob.data)
    corrupted = bytearray(blob.data)
    corrupted[bad_group * 16384 + 5] ^= 1
    if bad_group < 190:
        corrupted[(bad_group + 1) * 16384] ^= 1
    liar.data = bytes(corrupted)
    decoder = Decoder(blob.hash, ALL, max_size=10 * MIB)
    got: list[Piece] = []
    with pytest.raises(HashMismatchError) as caught:
        collect((verified for piece in encode(liar) for verified in decoder.receive(piece)), got)
    assert caught.value.at == bad_group * 16384
    assert b"".join(piece.data for piece in got) == blob.data[: bad_group * 16384]
    assert decoder.prefix is not None
    assert decoder.prefix.length == bad_group * 16384


@pytest.mark.parametrize("size", [16385, 40_000, 2 * MIB + 1])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_a_cut_stream_is_continued_by_a_range_request(size: int, share: float) -> None:
    blob = SampleBlob(sample(size))
    response = b"".join(encode(blob))
    first = Decoder(blob.hash, ALL, max_size=size)
    got: list[Piece] = []
    collect(first.receive(response[: int(len(response) * share)]), got)
    with pytest.raises(TruncatedError):
        collect(first.finish(), got)
    prefix = first.prefix
    have = prefix.length if prefix else 0
    assert b"".join(piece.data for piece in got) == blob.data[:have]
    assert have >= int(len(response) * share) - 16384 - 64 * (size // 16384 + 1)
    rest = ChunkRanges.span(have // 1024)
    second, pieces = decode(blob.hash, rest, b"".join(encode(blob, rest)), prefix=prefix)
    assert second.prefix is not None
    assert second.prefix.is_complete
    assert b"".join(piece.data for piece in [*got, *pieces]) == blob.data
    assert bytes(second.prefix.outboard) == blob.outboard


def test_the_last_chunk_proves_the_size() -> None:
    blob = SampleBlob(sample(40_000))
    response = b"".join(encode(blob, LAST_CHUNK))
    _, pieces = decode(blob.hash, LAST_CHUNK, response)
    assert [(p.offset, len(p.data)) for p in pieces] == [(39 * 1024, 64)]
    for lie in (39_999, 40_001, 39_936, 1, 80_000):
        with pytest.raises(ProtocolError):
            decode(blob.hash, LAST_CHUNK, lie.to_bytes(8, "little") + response[8:])


def test_a_size_above_the_limit_is_refused_before_anything_is_made() -> None:
    decoder = Decoder(bytes(32), ALL, max_size=1000)
    for size in (1001, 2**63, 2**64 - 1):
        with pytest.raises(LimitExceededError):
            list(decoder.receive(size.to_bytes(8, "little")))


def test_a_second_provider_cannot_change_the_size() -> None:
    blob = SampleBlob(sample(40_000))
    prefix = PrefixVerifier(blob.hash, 40_000, bytearray(blob.outboard))
    decoder = Decoder(blob.hash, ALL, max_size=10 * MIB, prefix=prefix)
    with pytest.raises(ProtocolError, match="announced to have 50000"):
        list(decoder.receive((50_000).to_bytes(8, "little")))


def test_bytes_behind_the_end_are_refused() -> None:
    blob = SampleBlob(sample(1025))
    with pytest.raises(ProtocolError, match="follow the end"):
        decode(blob.hash, ALL, b"".join(encode(blob)) + b"x")
    with pytest.raises(ProtocolError, match="follow the end"):
        decode(blob.hash, ChunkRanges(()), b"x")


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=0, max_size=600), st.integers(0, 2000))
def test_any_bytes_raise_only_protocol_errors(garbage: bytes, size: int) -> None:
    for head in (b"", size.to_bytes(8, "little")):
        with pytest.raises(ProtocolError):
            decode(bytes(32), ALL, head + garbage)


@pytest.mark.parametrize("stored", [0, 100, MIB, MIB + 5, 2 * MIB, 3 * MIB + 77])
def test_a_stored_download_is_proven_again_up_to_where_it_holds(stored: int) -> None:
    blob = SampleBlob(sample(3 * MIB + 77))
    prefix = restored_prefix(blob.hash, blob.size, bytearray(blob.outboard), stored, blob.read)
    assert prefix.length == (blob.size if stored == blob.size else stored // SPAN_LEN * SPAN_LEN)


@pytest.mark.parametrize(("torn", "holds"), [(5, 0), (MIB + 1, MIB), (3 * MIB, 3 * MIB)])
def test_torn_data_ends_a_stored_download(torn: int, holds: int) -> None:
    blob = SampleBlob(sample(3 * MIB + 77))
    data = bytearray(blob.data)
    data[torn] ^= 1
    prefix = restored_prefix(
        blob.hash, blob.size, bytearray(blob.outboard), blob.size, lambda at, n: bytes(data[at : at + n])
    )
    assert prefix.length == holds


def test_a_stored_download_without_its_pairs_is_worth_nothing() -> None:
    blob = SampleBlob(sample(3 * MIB))
    prefix = restored_prefix(blob.hash, blob.size, bytearray(len(blob.outboard)), blob.size, blob.read)
    assert prefix.length == 0
