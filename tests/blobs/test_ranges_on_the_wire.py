"""Chunk sets: the wire forms of iroh-blobs' own tests, and what lies behind the end of a blob."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.buffer import Reader, Writer
from distro_optim.comm.iroh.blobs.ranges import ALL, LAST_CHUNK, NOTHING, ChunkRanges, RangesSeq
from distro_optim.errors import ProtocolError

pytestmark = pytest.mark.waiting


SETS = [
    ((), "00"),
    ((0,), "01 00"),
    ((64,), "01 40"),
    ((10000,), "01 90 4e"),
    ((0, 64), "02 00 40"),
    ((1, 3, 9, 13), "04 01 02 06 04"),
    ((2**64 - 1,), "01 ff ff ff ff ff ff ff ff ff 01"),
]
SEQUENCES = [
    (RangesSeq.single(), "02 00 01 00 01 00"),
    (RangesSeq(((0, ALL),)), "01 00 01 00"),
    (
        RangesSeq(((0, ChunkRanges((1, 3))), (1, ChunkRanges((7, 13))), (2, NOTHING))),
        "03 00 02 01 02 01 02 07 06 01 00",
    ),
    (RangesSeq(((3, ChunkRanges((7,))), (4, ALL))), "02 03 01 07 01 01 00"),
    (RangesSeq(()), "00"),
    (RangesSeq.first(5), "02 00 01 00 05 00"),
]

boundary_lists = st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=12).map(lambda b: tuple(sorted(b)))


@pytest.mark.parametrize(("boundaries", "wire"), SETS)
def test_a_set_is_written_as_the_distances_of_its_boundaries(boundaries: tuple[int, ...], wire: str) -> None:
    writer = Writer()
    ChunkRanges(boundaries).push(writer)
    assert writer.finish() == bytes.fromhex(wire)
    assert ChunkRanges.pull(Reader(bytes.fromhex(wire))) == ChunkRanges(boundaries)


@pytest.mark.parametrize(("sequence", "wire"), SEQUENCES)
def test_a_sequence_is_written_as_runs(sequence: RangesSeq, wire: str) -> None:
    writer = Writer()
    sequence.push(writer)
    assert writer.finish() == bytes.fromhex(wire)
    assert RangesSeq.pull(Reader(bytes.fromhex(wire))) == sequence


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2**60), boundary_lists), max_size=6))
def test_any_sequence_comes_back(runs: list[tuple[int, tuple[int, ...]]]) -> None:
    sequence = RangesSeq(tuple((index, ChunkRanges(b)) for index, b in sorted(runs)))
    writer = Writer()
    sequence.push(writer)
    assert RangesSeq.pull(Reader(writer.finish())) == sequence


@pytest.mark.parametrize(
    ("wire", "boundaries"),
    [("03 05 00 03", (8,)), ("04 01 02 00 02", (1, 5)), ("02 07 00", ())],
    ids=["an empty span at the start", "two spans that touch", "nothing but an empty span"],
)
def test_empty_spans_dissolve(wire: str, boundaries: tuple[int, ...]) -> None:
    assert ChunkRanges.pull(Reader(bytes.fromhex(wire))).boundaries == boundaries


@pytest.mark.parametrize(
    "wire",
    ["02 ff ff ff ff ff ff ff ff ff 01 01", "ff ff ff ff ff ff ff ff ff 01", "80", "02 00"],
    ids=["a boundary above 64 bits", "2^64-1 boundaries announced", "half a varint", "one of two boundaries"],
)
def test_an_impossible_set_is_refused(wire: str) -> None:
    with pytest.raises(ProtocolError):
        ChunkRanges.pull(Reader(bytes.fromhex(wire)))


@pytest.mark.parametrize(
    ("boundaries", "chunks", "kept"),
    [
        # the cases in the comments of bao-tree's truncation, for a blob of seven chunks
        ((0, 6), 7, (0, 6)),
        ((0, 7), 7, (0,)),
        ((0, 10, 11, 12), 7, (0,)),
        ((0, 6, 7, 10), 7, (0,)),
        ((3, 6, 7, 10), 7, (3,)),
        ((0, 5, 7, 10), 7, (0, 5, 7)),
        ((2**64 - 1,), 1, (2**64 - 1,)),
        ((), 7, ()),
    ],
)
def test_what_lies_behind_the_end_becomes_the_last_chunk(
    boundaries: tuple[int, ...], chunks: int, kept: tuple[int, ...]
) -> None:
    assert ChunkRanges(boundaries).truncated(chunks * 1024).boundaries == kept


@given(boundary_lists, st.integers(0, 2**64 - 1))
def test_membership_counts_the_boundaries_passed(boundaries: tuple[int, ...], chunk: int) -> None:
    assert (chunk in ChunkRanges(boundaries)) == (sum(b <= chunk for b in boundaries) % 2 == 1)


def test_boundaries_that_do_not_rise_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="rise"):
        ChunkRanges((3, 3))
    assert not NOTHING
    assert LAST_CHUNK
    assert ChunkRanges.span(5, 5) == NOTHING
