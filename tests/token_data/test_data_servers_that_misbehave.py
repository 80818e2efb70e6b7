"""A data server that refuses, breaks off, stays silent or lies; and a client that asks too much."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.coordinator_swarm import key
from distro_optim.comm.framing import SERVER_FRAME_LIMIT, Else, ServerLink, encode_frame
from distro_optim.coordinator.messages import (
    CLIENT_TO_DATA_SERVER,
    DATA_SERVER_TO_CLIENT,
    RejectionReason,
    RequestRejected,
    RequestTrainingData,
    TokenizedData,
    TrainingData,
)
from distro_optim.coordinator.types import BatchId
from distro_optim.data.provider import MAX_BATCH
from distro_optim.data.remote.client import DataServerTokens, ServerTimeouts, split_address
from distro_optim.data.remote.requests import DataRequests, RequestRefusedError, cut_batch
from distro_optim.data.token_files import TokenFiles
from distro_optim.errors import ConfigurationError, DataUnavailableError, InvalidDataError
from token_data.arenas import RunningDataServer, ServerArena, ShuffledFilesArena, member_state, never_wait

pytestmark = [pytest.mark.waiting]

SEQ_LEN = 3
BATCH = BatchId(4, 5)
GOOD = (TokenizedData((1, 2, 3)), TokenizedData((4, 5, 6)))


def frame(message: object) -> bytes:
    return encode_frame(DATA_SERVER_TO_CLIENT.encode(Else(message)))


def handshake() -> tuple[DataRequests, ServerLink]:
    requests = DataRequests(key(1), SEQ_LEN)
    server = ServerLink(bytes(32), CLIENT_TO_DATA_SERVER, DATA_SERVER_TO_CLIENT)
    requests.receive(server.opening())
    server.receive(requests.data_to_send())
    return requests, server


# -- without a socket ----------------------------------------------------------------------------------------------


def test_a_request_goes_out_and_its_answer_comes_back() -> None:
    requests, server = handshake()
    assert server.receive(requests.request(BATCH)) == [RequestTrainingData(BATCH)]
    assert server.peer == key(1).public
    answer = frame(TrainingData(BATCH, GOOD))
    assert requests.receive(answer[:10]) is None
    samples = requests.receive(answer[10:])
    assert samples is not None
    assert [sample.input_ids.tolist() for sample in samples] == [[1, 2, 3], [4, 5, 6]]


def test_all_lists_of_a_sequence_are_kept() -> None:
    requests, _ = handshake()
    requests.request(BatchId(0, 0))
    full = TokenizedData((1, 2, 3), (-100, 2, 3), (0, 1, 0), (2, 1))
    samples = requests.receive(frame(TrainingData(BatchId(0, 0), (full,))))
    assert samples is not None
    (sample,) = samples
    given = (sample.input_ids, sample.labels, sample.position_ids, sample.sequence_lengths)
    assert [None if one is None else one.tolist() for one in given] == [[1, 2, 3], [-100, 2, 3], [0, 1, 0], [2, 1]]


def test_a_refusal_says_what_may_be_wrong_and_leaves_the_link_open() -> None:
    requests, _ = handshake()
    requests.request(BATCH)
    with pytest.raises(RequestRefusedError, match=r"B\[4, 5\] \(NotInThisRound\): we are not in the present epoch"):
        requests.receive(frame(RequestRejected(BATCH, RejectionReason.NOT_IN_THIS_ROUND)))
    requests.request(BATCH)
    assert requests.receive(frame(TrainingData(BATCH, GOOD))) is not None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (TrainingData(BatchId(4, 6), GOOD), r"was asked for B\[4, 5\] and answers for B\[4, 6\]"),
        (RequestRejected(BatchId(0, 0), RejectionReason.NOT_IN_THIS_ROUND), "answers for B0"),
        (TrainingData(BATCH, GOOD[:1]), "gives 1 sequences"),
        (TrainingData(BATCH, GOOD * 2), "gives 4 sequences"),
        (TrainingData(BATCH, ()), "gives 0 sequences"),
    ],
)
def test_an_answer_to_something_else_is_refused(answer: object, message: str) -> None:
    requests, _ = handshake()
    requests.request(BATCH)
    with pytest.raises(InvalidDataError, match=message):
        requests.receive(frame(answer))


def test_an_answer_that_nobody_asked_for_is_refused() -> None:
    requests, _ = handshake()
    with pytest.raises(InvalidDataError, match="nothing was asked"):
        requests.receive(frame(TrainingData(BATCH, GOOD)))


def test_an_announced_gigabyte_is_refused_from_its_header() -> None:
    requests, _ = handshake()
    requests.request(BATCH)
    with pytest.raises(InvalidDataError, match="a frame of 1073741824 bytes is announced"):
        requests.receive((1 << 30).to_bytes(4, "big"))


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_are_an_answer_or_a_clear_error(data: bytes, framed: bool) -> None:
    requests, _ = handshake()
    requests.request(BATCH)
    try:
        requests.receive(encode_frame(data) if framed else data)
    except (InvalidDataError, RequestRefusedError):
        pass


@given(st.integers(0, 2**64 - 1 - MAX_BATCH), st.integers(1, MAX_BATCH), st.integers(1, 1 << 20))
def test_pieces_of_a_batch_fit_the_servers_frames(start: int, length: int, seq_len: int) -> None:
    pieces = cut_batch(BatchId(start, start + length - 1), seq_len)
    assert pieces[0].start == start
    assert pieces[-1].end == start + length - 1
    assert all(one.end + 1 == other.start for one, other in pairwise(pieces))
    # Tokens of five bytes, their count, three lists that are not there.
    most = max(len(piece) for piece in pieces)
    assert most == 1 or most * (5 * seq_len + 5 + 3) <= SERVER_FRAME_LIMIT - 64


# -- with one ------------------------------------------------------------------------------------------------------


class Impostor:
    """A TCP server whose connections are handled one after the other by the given functions, the last one for ever."""

    def __init__(self, *handlers: Callable[[socket.socket], None]) -> None:
        self._handlers = list(handlers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            handler = self._handlers.pop(0) if len(self._handlers) > 1 else self._handlers[0]
            try:
                handler(connection)
            except OSError:
                pass

    def __enter__(self) -> Impostor:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        self._thread.join()


def answering(make: Callable[[BatchId], object]) -> Callable[[socket.socket], None]:
    """Shakes hands, and answers every request as it is told."""

    def handler(connection: socket.socket) -> None:
        link = ServerLink(bytes(32), CLIENT_TO_DATA_SERVER, DATA_SERVER_TO_CLIENT)
        connection.sendall(link.opening())
        while data := connection.recv(65536):
            for request in link.receive(data):
                connection.sendall(frame(make(request.data_ids)))

    return handler


def honest(batch: BatchId) -> TrainingData:
    return TrainingData(batch, tuple(TokenizedData((n, n, n)) for n in range(batch.start, batch.end + 1)))


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def stay_silent(connection: socket.socket) -> None:
    connection.recv(1)


def trickle(connection: socket.socket) -> None:
    """A byte of an endless frame now and then."""
    link = ServerLink(bytes(32), CLIENT_TO_DATA_SERVER, DATA_SERVER_TO_CLIENT)
    connection.sendall(link.opening() + (1 << 20).to_bytes(4, "big"))
    connection.settimeout(0.02)
    while True:
        try:
            if not connection.recv(65536):
                return
        except TimeoutError:
            connection.sendall(b"x")


def tokens_at(address: str, seconds: float = 20.0, attempts: int = 3) -> DataServerTokens:
    patience = ServerTimeouts(attempts=attempts, seconds=seconds)
    return DataServerTokens(address, key(1), SEQ_LEN, patience=patience, draw=lambda: 0.0, wait=never_wait)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [hang_up, stay_silent, trickle])
def test_a_broken_connection_is_made_anew(bad: Callable[[socket.socket], None]) -> None:
    with Impostor(bad, answering(honest)) as server, tokens_at(server.address, 0.5) as tokens:
        assert tokens.get_samples(BatchId(7, 7))[0].input_ids.tolist() == [7, 7, 7]
        assert len(server.connections) == 2


@pytest.mark.slow
@pytest.mark.parametrize("bad", [hang_up, stay_silent, trickle])
def test_a_server_that_stays_broken_is_given_up(bad: Callable[[socket.socket], None]) -> None:
    with Impostor(bad) as server, tokens_at(server.address, 0.2) as tokens:
        with pytest.raises(DataUnavailableError, match=rf"data server {server.address} gave nothing in 3 attempts"):
            tokens.get_samples(BatchId(7, 7))


def test_nobody_there_is_said_after_all_attempts() -> None:
    with Impostor(hang_up) as server:
        address = server.address
    with tokens_at(address) as tokens, pytest.raises(DataUnavailableError, match="refused"):
        tokens.get_samples(BatchId(0, 0))


def test_a_refusal_is_asked_again_on_the_same_connection() -> None:
    refusals = iter([True, True, False])

    def later(batch: BatchId) -> object:
        return RequestRejected(batch, RejectionReason.NOT_IN_THIS_ROUND) if next(refusals) else honest(batch)

    with Impostor(answering(later)) as server, tokens_at(server.address) as tokens:
        assert tokens.get_samples(BatchId(7, 7))[0].input_ids.tolist() == [7, 7, 7]
        assert len(server.connections) == 1


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda batch: TrainingData(batch, ()), "gives 0 sequences for B7"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, 2)),)), "has 2 tokens, but the run's sequences have 3"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, -2, 3)),)), "has the token 4294967294, beyond"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, 2, 3), (1, 2)),)), "has 2 labels"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, 2, 3), (1, 2, -5)),)), "has the label -5"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, 2, 3), None, (0, 1, 3)),)), "has the position id 3"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, 2, 3), None, None, (1, 1)),)), "do not add up to 3"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, 2, 3), None, None, (4, -1)),)), "do not add up to 3"),
        (lambda batch: TrainingData(batch, (TokenizedData((1, 2, 3), None, None, (2**31 - 1,) * 2 + (5,)),)), "add up"),
    ],
)
def test_a_server_that_lies_is_not_believed(lie: Callable[[BatchId], object], message: str) -> None:
    with Impostor(answering(lie)) as server, tokens_at(server.address) as tokens:
        with pytest.raises(InvalidDataError, match=f"^data server {server.address}: .*{message}"):
            tokens.get_samples(BatchId(7, 7))


def test_closing_ends_a_request_that_is_under_way() -> None:
    asked = threading.Event()
    errors: list[Exception] = []

    def wait_for_ever(connection: socket.socket) -> None:
        asked.set()
        stay_silent(connection)

    with Impostor(wait_for_ever) as server:
        tokens = tokens_at(server.address, seconds=3600)

        def work() -> None:
            try:
                tokens.get_samples(BatchId(0, 0))
            except DataUnavailableError as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert asked.wait(20)
        tokens.close()
        thread.join(20)
        assert not thread.is_alive()
    assert "closed" in str(errors[0])


# -- our own server ------------------------------------------------------------------------------------------------


@pytest.fixture
def files() -> Iterator[TokenFiles]:
    arena = ShuffledFilesArena()
    provider = arena.open()
    assert isinstance(provider, TokenFiles)
    yield provider
    provider.close()
    arena.__exit__()


def test_who_is_no_member_is_refused_until_it_is_one(files: TokenFiles) -> None:
    outside = replace(member_state(), epoch_state=replace(member_state().epoch_state, clients=()))
    states = [outside]
    with RunningDataServer(files, lambda: states[0]) as server:
        waits: list[float] = []

        def join_while_waiting(seconds: float) -> None:
            waits.append(seconds)
            states[0] = member_state()

        with DataServerTokens(server.address, key(1), files.seq_len, wait=join_while_waiting) as tokens:
            assert tokens.get_samples(BatchId(0, 0))[0].input_ids.tolist() == (
                files.get_samples(BatchId(0, 0))[0].input_ids.tolist()
            )
            assert len(waits) == 1


def test_a_large_batch_is_asked_for_in_pieces() -> None:
    with ServerArena() as arena:
        with arena.open() as tokens:
            assert len(tokens.get_samples(BatchId(0, arena.count - 1))) == arena.count
    assert len(cut_batch(BatchId(0, 2999), 2048)) == 4


@pytest.mark.parametrize("address", ["", "host", "host:", ":5", "host:0", "host:99999", "host:-1", "host:5x"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="must be host:port"):
        split_address(address)


def test_addresses_may_be_of_either_internet() -> None:
    assert split_address("data.example:5000") == ("data.example", 5000)
    assert split_address("[::1]:5000") == ("::1", 5000)


def test_tokens_are_thirty_two_bits() -> None:
    with Impostor(answering(lambda batch: TrainingData(batch, (TokenizedData((0, 1, 2**31 - 1)),)))) as server:
        with tokens_at(server.address) as tokens:
            sample = tokens.get_samples(BatchId(0, 0))[0]
    assert sample.input_ids.dtype == np.int32
    assert sample.input_ids.tolist() == [0, 1, 2**31 - 1]
