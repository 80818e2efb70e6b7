"""A provider answers every request as a Rust provider does: data, a reset with code 3, or an end without a byte."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from blobs.samples import SampleBlob, sample
from distro_optim.buffer import Writer
from distro_optim.comm.iroh.blobs.encoder import encode
from distro_optim.comm.iroh.blobs.provider import (
    ERR_INTERNAL,
    ERR_PERMISSION,
    Action,
    Finish,
    KeepOpen,
    ProviderStream,
    Reset,
    Send,
    StopReading,
)
from distro_optim.comm.iroh.blobs.ranges import ALL, ChunkRanges, RangesSeq
from distro_optim.comm.iroh.blobs.request import (
    MAX_REQUEST_LEN,
    GetManyRequest,
    GetRequest,
    ObserveRequest,
    PushRequest,
    Request,
    pull_request,
    push_request,
)
from distro_optim.errors import LimitExceededError, ProtocolError

pytestmark = pytest.mark.waiting


SMALL, LARGE = SampleBlob(sample(1000)), SampleBlob(sample(100_000))
LIST = SampleBlob(SMALL.hash + LARGE.hash)
BROKEN_LIST = SampleBlob(SMALL.hash + b"x")
LIST_OF_UNKNOWN = SampleBlob(SMALL.hash + bytes(32))
BLOBS = {blob.hash: blob for blob in (SMALL, LARGE, LIST, BROKEN_LIST, LIST_OF_UNKNOWN)}
EVERYTHING = RangesSeq(((0, ALL),))
UNKNOWN = bytes(range(32))


def whole(*blobs: SampleBlob, ranges: ChunkRanges = ALL) -> bytes:
    return b"".join(piece for blob in blobs for piece in encode(blob, ranges))


def answer(request: bytes, cut: int = 1 << 20) -> tuple[bytes, list[Action]]:
    """What comes back: the bytes sent, and the other actions."""
    stream = ProviderStream(BLOBS.get)
    actions: list[Action] = []
    for at in range(0, len(request), cut):
        actions += stream.receive(request[at : at + cut])
    actions += stream.receive_end()
    return b"".join(a.data for a in actions if isinstance(a, Send)), [a for a in actions if not isinstance(a, Send)]


ANSWERS: dict[str, tuple[Request, bytes, list[Action]]] = {
    "a whole blob": (GetRequest.blob(LARGE.hash), whole(LARGE), [Finish()]),
    "a part of a blob": (
        GetRequest.blob(LARGE.hash, ChunkRanges((3, 4, 60))),
        whole(LARGE, ranges=ChunkRanges((3, 4, 60))),
        [Finish()],
    ),
    "nothing": (GetRequest(LARGE.hash, RangesSeq(())), b"", [Finish()]),
    "nothing of an unknown blob": (GetRequest(UNKNOWN, RangesSeq(())), b"", [Finish()]),
    "an unknown blob": (GetRequest.blob(UNKNOWN), b"", [Reset(ERR_INTERNAL)]),
    "a list and its children": (GetRequest(LIST.hash, EVERYTHING), whole(LIST, SMALL, LARGE), [Finish()]),
    "only the second child": (
        GetRequest(LIST.hash, RangesSeq(((2, ALL), (3, ChunkRanges(()))))),
        whole(LARGE),
        [Finish()],
    ),
    "children far behind the end": (GetRequest(LIST.hash, RangesSeq(((2**63, ALL),))), b"", [Finish()]),
    "children of what is no list": (
        GetRequest(BROKEN_LIST.hash, EVERYTHING),
        whole(BROKEN_LIST),
        [Reset(ERR_INTERNAL)],
    ),
    "an unknown child": (
        GetRequest(LIST_OF_UNKNOWN.hash, EVERYTHING),
        whole(LIST_OF_UNKNOWN, SMALL),
        [Reset(ERR_INTERNAL)],
    ),
    "two of many": (GetManyRequest((SMALL.hash, LARGE.hash), RangesSeq.first(2)), whole(SMALL, LARGE), [Finish()]),
    "many, one unknown": (
        GetManyRequest((SMALL.hash, UNKNOWN, LARGE.hash), RangesSeq.first(3)),
        whole(SMALL),
        [Reset(ERR_INTERNAL)],
    ),
    "many, only the third": (
        GetManyRequest((UNKNOWN, UNKNOWN, LARGE.hash), RangesSeq(((2, ALL),))),
        whole(LARGE),
        [Finish()],
    ),
    "the state of a blob": (ObserveRequest(LARGE.hash), bytes.fromhex("05a08d060100"), [KeepOpen()]),
    "the state of an unknown blob": (ObserveRequest(UNKNOWN), bytes.fromhex("020000"), [KeepOpen()]),
    "to push": (PushRequest(UNKNOWN, EVERYTHING), b"", [StopReading(ERR_PERMISSION), Reset(ERR_PERMISSION)]),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_who_asks_for(name: str, cut: int) -> None:
    request, sent, actions = ANSWERS[name]
    assert answer(push_request(request), cut) == (sent, actions)


MALFORMED = {
    "nothing at all": b"",
    "a type alone": b"\x00",
    "half a hash": b"\x00" + bytes(16),
    "ranges that end early": push_request(GetRequest.blob(LARGE.hash))[:-1],
    "2^64-1 ranges": b"\x00" + LARGE.hash + b"\xff" * 9 + b"\x01",
    "2^64-1 boundaries": b"\x00" + LARGE.hash + b"\x01\x00" + b"\xff" * 9 + b"\x01",
    "2^64-1 hashes": b"\x09" + b"\xff" * 9 + b"\x01",
    "a boundary above 2^64-1": b"\x00" + LARGE.hash + b"\x01\x00\x02" + b"\xff" * 9 + b"\x01" + b"\x01",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_request_that_cannot_be_read_gets_an_end_without_a_byte(name: str) -> None:
    assert answer(MALFORMED[name]) == (b"", [Finish()])


@pytest.mark.parametrize("kind", [2, 3, 4, 5, 6, 7, 10, 11, 128, 255])
def test_a_request_of_an_unknown_type_is_not_even_read(kind: int) -> None:
    stream = ProviderStream(BLOBS.get)
    assert list(stream.receive(bytes([kind]) + bytes(100))) == [StopReading(0), Finish()]
    assert list(stream.receive(bytes(10**6))) == []
    assert list(stream.receive_end()) == []


def test_a_request_that_is_too_long_is_given_up_at_the_limit() -> None:
    stream = ProviderStream(BLOBS.get)
    piece = b"\x00" + bytes(2**16 - 1)
    for _ in range(16):
        assert list(stream.receive(piece)) == []
    assert list(stream.receive(b"xx")) == [StopReading(0), Finish()]
    for _ in range(160):  # ten megabytes of garbage are not kept
        assert list(stream.receive(piece)) == []
    assert len(stream._request) == 0
    with pytest.raises(LimitExceededError):
        pull_request(bytes(MAX_REQUEST_LEN + 2))


def test_bytes_behind_a_request_do_not_matter() -> None:
    assert answer(push_request(GetRequest.blob(SMALL.hash)) + b"more") == (whole(SMALL), [Finish()])


def test_a_blob_that_vanishes_while_it_is_sent_ends_in_a_reset() -> None:
    class Vanishing(SampleBlob):
        @override
        def read(self, offset: int, length: int) -> bytes:
            raise OSError("no such file")

    blob = Vanishing(LARGE.data)
    stream = ProviderStream({blob.hash: blob}.get)
    assert list(stream.receive(push_request(GetRequest.blob(blob.hash)))) == []
    assert list(stream.receive_end()) == [Reset(ERR_INTERNAL)]


def test_only_parts_of_groups_are_costly() -> None:
    for ranges, costly in ((ALL, False), (ChunkRanges((32,)), False), (ChunkRanges((33,)), True)):
        stream = ProviderStream(BLOBS.get)
        assert list(stream.receive(push_request(GetRequest.blob(LARGE.hash, ranges)))) == []
        stream.receive_end()
        assert stream.is_costly is costly


def test_an_open_request_for_a_long_list_is_made_as_it_is_taken() -> None:
    many = SampleBlob(LARGE.hash * 100_000)
    stream = ProviderStream({many.hash: many, LARGE.hash: LARGE}.get)
    list(stream.receive(push_request(GetRequest(many.hash, EVERYTHING))))
    actions = stream.receive_end()
    assert all(isinstance(next(actions), Send) for _ in range(50))


requests = st.one_of(
    st.builds(GetRequest, st.binary(min_size=32, max_size=32), st.just(EVERYTHING)),
    st.builds(ObserveRequest, st.binary(min_size=32, max_size=32)),
    st.builds(PushRequest, st.binary(min_size=32, max_size=32), st.just(RangesSeq.single())),
    st.builds(
        GetManyRequest,
        st.lists(st.binary(min_size=32, max_size=32), max_size=5).map(tuple),
        st.integers(1, 2**40).map(RangesSeq.first),
    ),
)


@given(requests)
def test_any_request_comes_back(request: Request) -> None:
    assert pull_request(push_request(request)) == request


def test_a_request_for_a_whole_blob_has_the_known_bytes() -> None:
    assert push_request(GetRequest.blob(LARGE.hash)) == b"\x00" + LARGE.hash + bytes.fromhex("020001000100")
    empty = Writer()
    RangesSeq(()).push(empty)
    assert empty.finish() == b"\x00"


@pytest.mark.slow
@settings(max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.sampled_from([0, 1, 8, 9]).flatmap(
            lambda kind: st.binary(max_size=120).map(lambda rest: bytes([kind]) + rest)
        ),
    )
)
def test_any_bytes_raise_only_protocol_errors(data: bytes) -> None:
    try:
        request = pull_request(data)
    except ProtocolError:
        return
    assert pull_request(push_request(request)) == request


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(requests, st.data())
def test_any_damaged_request_gets_an_answer(request: Request, draw: st.DataObject) -> None:
    data = bytearray(push_request(request))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    _, actions = answer(bytes(data[: draw.draw(st.integers(1, len(data)))]))
    assert actions
