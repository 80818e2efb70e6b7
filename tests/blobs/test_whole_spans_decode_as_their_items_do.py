"""A whole span is checked at once; whatever arrives, the outcome is that of taking it item by item."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs import decoder as decoder_module
from distro_optim.comm.iroh.blobs.decoder import Decoder
from distro_optim.comm.iroh.blobs.encoder import encode
from distro_optim.comm.iroh.blobs.prefix import SPAN_LEN
from distro_optim.comm.iroh.blobs.ranges import ALL, ChunkRanges
from distro_optim.comm.iroh.blobs.span import SPAN_WIRE_LEN, split_span
from distro_optim.comm.iroh.blobs.tree import parent_cv
from distro_optim.errors import ProtocolError

pytestmark = pytest.mark.waiting


CUTS = [90_001, 1 << 20]
SIZES = [SPAN_LEN, 2 * SPAN_LEN, 3 * SPAN_LEN + 5, 4 * SPAN_LEN + 16384]
BLOBS = {size: SampleBlob(sample(size)) for size in SIZES}
RESPONSES = {size: b"".join(encode(blob)) for size, blob in BLOBS.items()}


@dataclass(frozen=True)
class Outcome:
    """What came of a response: proven data, the kind of error and where, what the prefix knows."""

    data: bytes
    error: type[Exception] | None
    at: int | None
    proven: int
    complete: bool
    pairs: bytes


def outcome(blob: SampleBlob, response: bytes, cut: int, *, by_item: bool, ranges: ChunkRanges = ALL) -> Outcome:
    decoder = Decoder(blob.hash, ranges, max_size=2 * blob.size + SPAN_LEN)
    if by_item:
        decoder._by_item = True
    data, error = bytearray(), None
    try:
        for at in range(0, len(response), cut):
            for piece in decoder.receive(response[at : at + cut]):
                assert piece.offset == len(data)
                data += piece.data
        for piece in decoder.finish():
            data += piece.data
    except ProtocolError as raised:
        error = raised
    prefix = decoder.prefix
    proven = prefix.length if prefix else 0
    return Outcome(
        bytes(data),
        type(error) if error else None,
        getattr(error, "at", None),
        proven,
        decoder.is_complete,
        bytes(prefix.outboard) if prefix and decoder.is_complete else b"",
    )


def both(blob: SampleBlob, response: bytes, cut: int) -> Outcome:
    at_once = outcome(blob, response, cut, by_item=False)
    assert at_once == outcome(blob, response, cut, by_item=True)
    return at_once


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cut", [70_001, 262_144, 3 << 20])
def test_a_good_response_is_proven_alike(size: int, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = []

    def counted(view: memoryview) -> tuple[bytes, bytes]:
        spans.append(len(view))
        return split_span(view)

    monkeypatch.setattr(decoder_module, "split_span", counted)
    blob = BLOBS[size]
    result = both(blob, RESPONSES[size], cut)
    assert result.data == blob.data
    assert result.pairs == blob.outboard
    # A blob of one span has its root on top, whose hash has a flag of its own.
    assert spans == [SPAN_WIRE_LEN] * (0 if size == SPAN_LEN else size // SPAN_LEN)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.sampled_from(SIZES), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.sampled_from(CUTS))
def test_a_changed_byte_is_blamed_alike(size: int, share: float, change: int, cut: int) -> None:
    response = bytearray(RESPONSES[size])
    at = 8 + int(share * (len(response) - 8))
    response[at] ^= change
    result = both(BLOBS[size], bytes(response), cut)
    assert result.error is not None
    assert not result.complete
    assert BLOBS[size].data.startswith(result.data)
    assert len(result.data) <= at


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(SIZES), st.floats(0, 1, exclude_max=True), st.sampled_from(CUTS))
def test_a_cut_response_proves_the_same_groups(size: int, share: float, cut: int) -> None:
    response = RESPONSES[size][: int(share * len(RESPONSES[size]))]
    result = both(BLOBS[size], response, cut)
    assert not result.complete
    assert BLOBS[size].data.startswith(result.data)
    # At most the group that was cut and the pairs before it are missing.
    assert len(result.data) == result.proven
    assert len(response) - len(result.data) < 16_384 + 8 + 64 * (size // 16_384 + 1)


@pytest.mark.parametrize("boundaries", [(1024,), (1024, 3072), (0, 1024), (16, 1040), (1, 2000)])
def test_parts_of_a_blob_are_proven_alike(boundaries: tuple[int, ...]) -> None:
    blob, ranges = BLOBS[SIZES[-1]], ChunkRanges(boundaries)
    response = b"".join(encode(blob, ranges))
    results = []
    for by_item in (False, True):
        decoder = Decoder(blob.hash, ranges, max_size=blob.size)
        decoder._by_item |= by_item
        pieces = [piece for part in (response[:100_000], response[100_000:]) for piece in decoder.receive(part)]
        pieces += decoder.finish()
        assert decoder.is_complete
        results.append(b"".join(piece.data for piece in pieces))
    assert results[0] == results[1]


def test_swapped_halves_of_a_span_are_refused() -> None:
    """Both halves are genuine, and so is the pair above them; only their order is a lie."""
    blob, response = BLOBS[SIZES[-1]], bytearray(RESPONSES[SIZES[-1]])
    start = 8 + 64 * 3  # behind the root and two nodes on the way to the first span
    pair = bytes(response[start : start + 64])
    half = (SPAN_WIRE_LEN - 64) // 2
    left = bytes(response[start + 64 : start + 64 + half])
    right = bytes(response[start + 64 + half : start + SPAN_WIRE_LEN])
    assert parent_cv(left[:64]) == pair[:32]
    response[start + 64 : start + SPAN_WIRE_LEN] = right + left
    assert both(blob, bytes(response), 1 << 20).data == b""
