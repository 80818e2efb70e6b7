"""Responses are, byte for byte, those of a Rust provider (iroh-blobs 0.99) and of the plain encoder."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs.encoder import PIECE_LEN, encode, encoded_len
from distro_optim.comm.iroh.blobs.ranges import ALL, ChunkRanges
from reference import plain_blake3 as plain

pytestmark = pytest.mark.waiting


# size, boundaries, length of the response, first half of its SHA-256; recorded from iroh-blobs 0.99
RECORDED = [
    (0, (0,), 8, "af5570f5a1810b7af78caf4bc70a660f"),
    (1, (0,), 9, "a536aa3cede6ea3c1f3e0357c3c60e0f"),
    (1025, (0,), 1033, "e729c79e0ec86013d8ae3ce6775522eb"),
    (16384, (0,), 16392, "004cd334572d932a2797030bb0252a9b"),
    (16385, (0,), 16457, "dc26d1992066dbcd0ed5800532991228"),
    (40000, (0,), 40136, "4cf0c97438968914bc65d703a624200a"),
    (40000, (20, 21), 1416, "9722d90e6e628f1a2440cd56eff2dee1"),
    (40000, (2**64 - 1,), 328, "ba5227b7ae3dc635c4af0524ca53a25b"),
    (100000, (3, 4, 60), 40360, "1d68229522c3cf7e2c0de00b58e33fab"),
]


@pytest.mark.parametrize(("size", "boundaries", "length", "digest"), RECORDED)
def test_a_response_is_the_recorded_one(size: int, boundaries: tuple[int, ...], length: int, digest: str) -> None:
    response = b"".join(encode(SampleBlob(sample(size)), ChunkRanges(boundaries)))
    assert len(response) == length
    assert hashlib.sha256(response).hexdigest()[:32] == digest


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.integers(0, 70_000), st.sampled_from([16384, 16385, 32768, 49153, 65536])),
    st.lists(st.one_of(st.integers(0, 80), st.just(2**64 - 1)), unique=True, max_size=6),
)
def test_any_range_of_any_blob_is_encoded_as_the_plain_encoder_does(size: int, boundaries: list[int]) -> None:
    blob, chosen = SampleBlob(sample(size)), tuple(sorted(boundaries))
    response = b"".join(encode(blob, ChunkRanges(chosen)))
    assert response == (plain.encode(blob.data, chosen))


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 100_000, 2**20 + 1])
def test_the_length_of_a_whole_response_is_known_beforehand(size: int) -> None:
    pieces = list(encode(SampleBlob(sample(size)), ALL))
    assert sum(map(len, pieces)) == encoded_len(size)
    assert all(0 < len(piece) < PIECE_LEN + 16384 + 64 for piece in pieces)
