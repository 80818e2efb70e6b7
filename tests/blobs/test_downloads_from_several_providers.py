"""A download takes what each provider can prove and asks the next one only for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from blobs.samples import SampleBlob, sample
from distro_optim.comm.iroh.blobs.decoder import Piece
from distro_optim.comm.iroh.blobs.getter import Attempt, Download, Purpose
from distro_optim.comm.iroh.blobs.provider import ProviderStream, Send
from distro_optim.comm.iroh.blobs.ranges import LAST_CHUNK
from distro_optim.comm.iroh.blobs.request import GetRequest, pull_request
from distro_optim.errors import (
    BlobUnavailableError,
    HashMismatchError,
    LimitExceededError,
    ProtocolError,
    SizeConflictError,
    TruncatedError,
)

pytestmark = pytest.mark.waiting


MIB = 2**20
BLOB = SampleBlob(sample(3 * MIB + 100))
Peer = Callable[[bytes], bytes]


def honest(request: bytes) -> bytes:
    stream = ProviderStream({BLOB.hash: BLOB}.get)
    list(stream.receive(request))
    return b"".join(action.data for action in stream.receive_end() if isinstance(action, Send))


def cut_after(length: int) -> Peer:
    return lambda request: honest(request)[:length]


def corrupt_at(at: int) -> Peer:
    def answer(request: bytes) -> bytes:
        response = bytearray(honest(request))
        response[at] ^= 1
        return bytes(response)

    return answer


def with_size(size: int) -> Peer:
    return lambda request: size.to_bytes(8, "little") + honest(request)[8:]


def absent(request: bytes) -> bytes:
    return b""


def garbage(request: bytes) -> bytes:
    return bytes(range(256)) * 40_000


class Fetch:
    """Carries a download out and keeps what a store would have."""

    def __init__(self, peers: dict[str, Peer], max_size: int = 10 * MIB, silent: Sequence[str] = ()) -> None:
        self.silent = silent
        self.download = Download(BLOB.hash, list(peers), max_size=max_size)
        self.data = b""
        self.asked: list[tuple[str, bytes, Purpose]] = []
        while (attempt := self.download.next_attempt()) is not None:
            self.asked.append((attempt.provider, attempt.request, attempt.purpose))
            error = self.carry_out(attempt, peers[attempt.provider](attempt.request))
            attempt.was_silent = error is not None and attempt.provider in self.silent
            self.download.ended(attempt, error)
            if self.download.must_discard:
                self.data, self.download.must_discard = b"", False

    def carry_out(self, attempt: Attempt[str], response: bytes) -> ProtocolError | None:
        try:
            for at in range(0, len(response), 100_000):
                self.keep(attempt, attempt.receive(response[at : at + 100_000]))
            self.keep(attempt, attempt.receive_end())
        except ProtocolError as error:
            return error
        return None

    def keep(self, attempt: Attempt[str], pieces: Iterator[Piece]) -> None:
        for offset, data in pieces:
            if attempt.purpose is Purpose.DATA:
                assert offset == len(self.data)
                self.data += data

    @property
    def failures(self) -> list[tuple[str, type[Exception]]]:
        return [(provider, type(error)) for provider, error in self.download.failures]


def test_one_honest_provider_is_enough() -> None:
    fetch = Fetch({"a": honest, "b": honest})
    fetch.download.raise_if_failed()
    assert fetch.data == BLOB.data
    assert [provider for provider, _, _ in fetch.asked] == ["a"]


def test_who_has_not_got_it_is_passed_over() -> None:
    fetch = Fetch({"a": absent, "b": honest})
    assert fetch.data == BLOB.data
    assert fetch.failures == [("a", TruncatedError)]


@pytest.mark.parametrize("at", [100, 30_000, MIB + 5000, 3 * MIB + 12_000])
def test_after_a_cut_the_next_is_asked_for_the_rest(at: int) -> None:
    fetch = Fetch({"a": cut_after(at), "b": honest})
    assert fetch.data == BLOB.data
    _, request, _ = fetch.asked[1]
    parsed = pull_request(request)
    assert isinstance(parsed, GetRequest)
    first = parsed.ranges.runs[0][1].boundaries[0]
    # At most one group, and the pairs, are asked for twice.
    assert first * 1024 >= at - 16384 - 64 * (at // 16384 + 10)


def test_who_fell_silent_is_asked_once_more_for_the_rest_before_anybody_else() -> None:
    answers = iter([cut_after(MIB + 5000), honest])
    fetch = Fetch({"a": lambda request: next(answers)(request), "b": absent}, silent="a")
    assert fetch.data == BLOB.data
    assert [provider for provider, _, _ in fetch.asked] == ["a", "a"]
    assert fetch.failures == []


def test_who_falls_silent_every_time_is_not_asked_a_third_time() -> None:
    fetch = Fetch({"a": absent, "b": honest}, silent="a")
    assert fetch.data == BLOB.data
    assert [provider for provider, _, _ in fetch.asked] == ["a", "a", "b"]
    assert fetch.failures == [("a", TruncatedError)]


@pytest.mark.parametrize("at", [8, 100, 20_000, MIB + 5000, 3 * MIB + 12_000])
def test_who_corrupts_is_found_out_and_the_next_goes_on_where_it_was(at: int) -> None:
    fetch = Fetch({"a": corrupt_at(at), "b": honest})
    assert fetch.data == BLOB.data
    assert fetch.failures == [("a", HashMismatchError)]


def test_ten_megabytes_of_garbage_are_refused_at_the_size_header() -> None:
    fetch = Fetch({"a": garbage, "b": honest})
    assert fetch.data == BLOB.data
    assert fetch.failures == [("a", LimitExceededError)]


def test_a_wrong_size_from_the_first_is_settled_by_proof() -> None:
    """The lie leaves the first groups provable: only the last chunk tells."""
    # The same number of chunks, so the tree has the same shape.
    liar = with_size(BLOB.size - 1)
    fetch = Fetch({"a": lambda request: liar(request)[:2_000_000], "b": honest})
    fetch.download.raise_if_failed()
    assert fetch.data == BLOB.data
    purposes = [(provider, purpose) for provider, _, purpose in fetch.asked]
    assert purposes == [("a", Purpose.DATA), ("b", Purpose.DATA), ("b", Purpose.SIZE_PROOF), ("b", Purpose.DATA)]
    assert pull_request(fetch.asked[2][1]) == GetRequest.blob(BLOB.hash, LAST_CHUNK)


def test_a_wrong_size_from_the_second_costs_nothing_of_what_is_there() -> None:
    fetch = Fetch({"a": cut_after(2_000_000), "b": with_size(BLOB.size - 1), "c": honest})
    fetch.download.raise_if_failed()
    assert fetch.data == BLOB.data
    provider, request, purpose = fetch.asked[-1]
    assert (provider, purpose) == ("c", Purpose.DATA)
    assert request != push_request_for_all()
    assert fetch.failures[1][1] in (HashMismatchError, SizeConflictError)


def push_request_for_all() -> bytes:
    return Download(BLOB.hash, ["x"], max_size=1).next_attempt().request  # type: ignore[union-attr]


def test_a_blob_above_the_limit_is_refused() -> None:
    fetch = Fetch({"a": honest}, max_size=BLOB.size - 1)
    assert fetch.data == b""
    assert fetch.failures == [("a", LimitExceededError)]


def test_when_nobody_has_it_the_error_tells_what_each_one_did() -> None:
    fetch = Fetch({"a": absent, "b": corrupt_at(20), "c": cut_after(12)})
    with pytest.raises(BlobUnavailableError, match=r"a: .*b: .*c: ") as caught:
        fetch.download.raise_if_failed()
    assert [name for name, _ in caught.value.attempts] == ["a", "b", "c"]
    with pytest.raises(BlobUnavailableError, match="nobody to ask"):
        Fetch({}).download.raise_if_failed()


def test_providers_that_contradict_each_other_for_ever_do_not_keep_it_busy() -> None:
    sizes = [BLOB.size - n for n in range(20)]
    fetch = Fetch({str(size): with_size(size) if size != BLOB.size else cut_after(10**6) for size in sizes})
    assert len(fetch.asked) <= 3 * len(sizes)


def test_a_size_that_nothing_came_of_is_forgotten() -> None:
    fetch = Fetch({"a": lambda request: (BLOB.size + 5).to_bytes(8, "little") + bytes(100), "b": honest})
    assert fetch.data == BLOB.data
    assert [purpose for _, _, purpose in fetch.asked] == [Purpose.DATA, Purpose.DATA]
