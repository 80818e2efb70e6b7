"""A blob that is larger than it may be: it is refused at its header, and what a false header can cost is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from blobs.conftest import Peer
from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs.getter import Attempt, Download
from distro_optim.comm.iroh.blobs.outboard import outboard_len
from distro_optim.comm.iroh.blobs.prefix import SPAN_LEN
from distro_optim.comm.iroh.blobs.provider import ProviderStream, Send
from distro_optim.comm.iroh.blobs.span import SPAN_WIRE_LEN
from distro_optim.errors import BlobUnavailableError, HashMismatchError, LimitExceededError, ProtocolError

pytestmark = [pytest.mark.waiting]

MIB = 2**20
KIB = 2**10
HEADER = 8
LARGE = SampleBlob(sample(5 * MIB))

STREAM_WINDOW = 1280 * KIB
"""What a provider may send before anybody has read it: quinn's ``stream_receive_window``, 12.5 MB/s for 100 ms."""


def no_room(size: int) -> bytearray:
    raise AssertionError(f"room for {size} bytes was asked for")


def bytes_until_refused(attempt: Attempt[str], response: bytes, *, at_once: int = 1) -> tuple[int, Exception, int]:
    """How many bytes went in, what came out in the end, and how many bytes were yielded as proven."""
    proven = 0
    for at in range(0, len(response), at_once):
        try:
            for piece in attempt.receive(response[at : at + at_once]):
                proven += len(piece.data)
        except ProtocolError as error:
            return min(at + at_once, len(response)), error, proven
    raise AssertionError("it was not refused")


def answer_to(attempt: Attempt[str], blob: SampleBlob) -> bytes:
    stream = ProviderStream({blob.hash: blob}.get)
    list(stream.receive(attempt.request))
    return b"".join(action.data for action in stream.receive_end() if isinstance(action, Send))


def attempt_at(blob: SampleBlob, max_size: int, **options: object) -> Attempt[str]:
    attempt = Download(blob.hash, ["peer"], max_size=max_size, **options).next_attempt()  # type: ignore[arg-type]
    assert attempt is not None
    return attempt


@pytest.mark.parametrize("max_size", [0, 1, 100_000, 5 * MIB - 1])
def test_it_is_refused_at_the_last_byte_of_its_header_before_any_room_is_made(max_size: int) -> None:
    attempt = attempt_at(LARGE, max_size, new_outboard=no_room)
    taken, error, proven = bytes_until_refused(attempt, answer_to(attempt, LARGE))
    assert (taken, proven) == (HEADER, 0)
    assert isinstance(error, LimitExceededError)
    assert attempt.prefix is None


def test_a_blob_of_just_the_allowed_size_is_taken() -> None:
    attempt = attempt_at(LARGE, LARGE.size)
    proven = sum(len(piece.data) for piece in attempt.receive(answer_to(attempt, LARGE)))
    assert proven == LARGE.size


@pytest.mark.parametrize("told", [1, KIB, 16 * KIB, 17 * KIB, MIB, 2 * MIB - 5, 4 * MIB])
def test_a_header_that_tells_less_costs_a_span_at_most_and_proves_nothing(told: int) -> None:
    attempt = attempt_at(LARGE, 4 * MIB)
    response = told.to_bytes(HEADER, "little") + answer_to(attempt, LARGE)[HEADER:]
    taken, error, proven = bytes_until_refused(attempt, response, at_once=KIB)
    assert isinstance(error, HashMismatchError)
    assert proven == 0
    paths = outboard_len(told)
    assert taken <= min(HEADER + paths + told, HEADER + paths + SPAN_WIRE_LEN) + 2 * KIB


def test_a_download_that_goes_on_is_refused_at_the_header_too_if_less_is_allowed_now() -> None:
    first = Download(LARGE.hash, ["peer"], max_size=LARGE.size)
    attempt = first.next_attempt()
    assert attempt is not None
    pieces = attempt.receive(answer_to(attempt, LARGE)[: 3 * SPAN_LEN])
    assert sum(len(piece.data) for piece in pieces)
    first.ended(attempt, None)
    assert first.prefix is not None
    assert 0 < first.prefix.length < LARGE.size

    again = attempt_at(LARGE, LARGE.size - 1, prefix=first.prefix)
    taken, error, proven = bytes_until_refused(again, answer_to(again, LARGE))
    assert (taken, proven) == (HEADER, 0)
    assert isinstance(error, LimitExceededError)


def test_a_download_that_goes_on_takes_no_more_than_is_missing_from_one_who_sends_more() -> None:
    first = Download(LARGE.hash, ["peer", "liar"], max_size=LARGE.size)
    attempt = first.next_attempt()
    assert attempt is not None
    list(attempt.receive(answer_to(attempt, LARGE)[: 3 * SPAN_LEN]))
    first.ended(attempt, None)
    again = first.next_attempt()
    assert again is not None
    response = answer_to(again, LARGE)
    taken, error, _ = bytes_until_refused(again, response + bytes(10 * MIB), at_once=KIB)
    assert isinstance(error, ProtocolError)
    assert again.is_complete
    assert taken <= len(response) + KIB


# -- over a node -------------------------------------------------------------------------------------------------------


def received_by(peer: Peer) -> int:
    """Bytes of the transport on all connections, since the beginning."""

    async def count() -> int:
        return sum(connection.stats().bytes_received for connection in peer.node.connections())

    return peer.node.submit(count()).result(10)


@pytest.mark.slow
def test_over_the_network_little_more_than_the_header_arrives_and_nothing_is_kept(
    make_peer: Callable[..., Peer],
) -> None:
    giver, getter, blob = make_peer(), make_peer(), SampleBlob(sample(32 * MIB))
    giver.store.add(blob.data, tag="t")
    for _ in range(4):
        with pytest.raises(BlobUnavailableError, match=f"{blob.size} bytes is announced, at most {MIB} are allowed"):
            getter.fetch(blob.hash, [giver.id], max_size=MIB)
    assert getter.store.used_bytes == 0
    # The provider has no way to know before we say so; its stream's window is what it may send until then.
    assert received_by(getter) < 4 * STREAM_WINDOW * 1.1


@pytest.mark.slow
def test_a_refused_stream_is_stopped_at_once_though_its_failure_is_remembered(make_peer: Callable[..., Peer]) -> None:
    giver, getter, blob = make_peer(), make_peer(), SampleBlob(sample(32 * MIB))
    giver.store.add(blob.data, tag="t")
    failures: list[Exception] = []

    async def fetch() -> None:
        with pytest.raises(BlobUnavailableError):
            await getter.service.fetch(
                blob.hash, [giver.id], max_size=MIB, on_failure=lambda _, error: failures.append(error)
            )
        while giver.service._answered_now:
            await asyncio.sleep(0.01)

    getter.node.submit(fetch()).result(20)
    assert isinstance(failures[0], LimitExceededError)
