"""Training data: Psyche's order of the sequences, and the server that hands them out."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comm.stream_contract import run
from coordinator.coordinator_swarm import RUN, key
from distro_optim.comm.framing import ClientLink, Else, encode_frame
from distro_optim.comm.serving.connection import Connection
from distro_optim.comm.serving.limits import ServerLimits
from distro_optim.comm.streams import MemoryListener, Stream
from distro_optim.coordinator.messages import (
    CLIENT_TO_DATA_SERVER,
    DATA_SERVER_TO_CLIENT,
    RejectionReason,
    RequestRejected,
    RequestTrainingData,
    TrainingData,
)
from distro_optim.coordinator.model import Seeded, TokenSize
from distro_optim.coordinator.types import BatchId, Client, NodeIdentity
from distro_optim.data.data_file import read_data_file
from distro_optim.data.remote.server import DataServer
from distro_optim.data.remote.service import MAX_WAITING, DataService
from distro_optim.data.shuffle import ChaCha8, slice_shuffle
from distro_optim.data.token_files import TokenFiles
from distro_optim.errors import ConfigurationError, LimitExceededError
from runs import waiting_run

pytestmark = pytest.mark.waiting


SEED = bytes(range(1, 33))


# -- the order -----------------------------------------------------------------------------------------------------


def test_the_key_stream_is_that_of_rands_chacha8() -> None:
    generator = ChaCha8(SEED)
    assert [generator.next_u32() for _ in range(8)] == [
        2947029050, 31235183, 2985115977, 1313868222, 1939665820, 3040118765, 3666376826, 1741542700,
    ]  # fmt: skip
    zeros = ChaCha8(bytes(32))
    assert [zeros.next_u32() for _ in range(4)] == [0x2FEF003E, 0xD6405F89, 0xE8B85B7F, 0xA1A5091F]


def shuffled(count: int, seed: bytes) -> list[int]:
    items = list(range(count))
    slice_shuffle(items, ChaCha8(seed))
    return items


@pytest.mark.parametrize(
    ("count", "seed", "expected"),
    [
        (0, SEED, []),
        (1, SEED, [0]),
        (4, b"\x2a" * 32, [3, 1, 2, 0]),
        (5, SEED, [3, 1, 2, 0, 4]),
        (10, SEED, [3, 1, 2, 6, 7, 9, 8, 4, 5, 0]),
        (10, bytes(32), [3, 8, 6, 7, 1, 0, 5, 9, 2, 4]),
        (10, b"\x2a" * 32, [3, 1, 8, 4, 5, 6, 0, 9, 2, 7]),
        (20, SEED, [18, 1, 17, 6, 15, 9, 8, 14, 16, 12, 19, 5, 0, 2, 4, 7, 11, 10, 3, 13]),
    ],
)
def test_lists_are_shuffled_as_by_rand(count: int, seed: bytes, expected: list[int]) -> None:
    assert shuffled(count, seed) == expected


def test_long_lists_are_shuffled_as_by_rand() -> None:
    items = shuffled(100_000, SEED)
    assert items[:8] == [581, 95762, 1993, 96683, 17759, 18272, 94111, 8231]
    assert items[-4:] == [93074, 91176, 70244, 18340]
    assert sorted(items) == list(range(100_000))


def test_a_seed_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="32 bytes, got 31"):
        ChaCha8(bytes(31))


def write_tokens(path: Path, tokens: Any, dtype: str = "<u2") -> None:
    path.write_bytes(np.asarray(tokens, dtype=dtype).tobytes())


def test_sequences_are_numbered_file_by_file_without_the_last_of_each(tmp_path: Path) -> None:
    write_tokens(tmp_path / "b.bin", range(100, 109))  # two sequences of 4, and one token
    write_tokens(tmp_path / "a.ds", range(12))  # three, of which the last does not count
    write_tokens(tmp_path / "c.npy", range(200, 204))  # one, which does not count
    write_tokens(tmp_path / "ignored.txt", range(50))
    files = TokenFiles(tmp_path, TokenSize.TWO_BYTES, 4)
    assert len(files) == 4
    assert [sample.input_ids.tolist() for sample in files.get_samples(BatchId(0, 3))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [100, 101, 102, 103],
        [104, 105, 106, 107],
    ]
    assert files.has(BatchId(3, 3))
    assert not files.has(BatchId(3, 4))


def test_the_order_is_shuffled_over_all_files(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", [70_000 + n for n in range(13)], "<u4")
    write_tokens(tmp_path / "b.bin", [80_000 + n for n in range(9)], "<u4")
    plain = TokenFiles(tmp_path, TokenSize.FOUR_BYTES, 2)
    mixed = TokenFiles(tmp_path, TokenSize.FOUR_BYTES, 2, Seeded(SEED))
    batch = BatchId(0, 9)
    expected = [plain.get_samples(batch)[index].input_ids.tolist() for index in shuffled(10, SEED)]
    assert [sample.input_ids.tolist() for sample in mixed.get_samples(batch)] == expected


DATA_TOML = 'dir = "tokens"\ntoken_size = "TwoBytes"\nseq_len = 4\nshuffle_seed = [{}]\n'


def data_file(tmp_path: Path, text: str | None = None) -> Path:
    (tmp_path / "tokens").mkdir()
    write_tokens(tmp_path / "tokens" / "a.bin", range(101))
    path = tmp_path / "data.toml"
    path.write_text(text or DATA_TOML.format(", ".join(map(str, SEED))))
    return path


def test_a_data_file_opens_the_folder_beside_it(tmp_path: Path) -> None:
    assert len(read_data_file(data_file(tmp_path))) == 25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DATA_TOML.format("1, 2"), "shuffle_seed"),
        (DATA_TOML.format(", ".join(["256"] * 32)), r"shuffle_seed\[0\]"),
        (DATA_TOML.format(", ".join(["1"] * 32)).replace("TwoBytes", "SixBytes"), "token_size"),
        (DATA_TOML.format(", ".join(["1"] * 32)).replace("tokens", "nowhere"), "cannot read token files"),
        (DATA_TOML.format(", ".join(["1"] * 32)).replace("= 4", "= 1000"), "no file in"),
        (DATA_TOML.format(", ".join(["1"] * 32)).replace("= 4", "= 0"), "seq_len must be at least 1"),
        ("dir = ", "not TOML"),
    ],
)
def test_a_wrong_data_file_is_named_with_its_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_data_file(data_file(tmp_path, text))


# -- the service ---------------------------------------------------------------------------------------------------


class FakeData:
    seq_len = 4

    def has(self, batch: BatchId) -> bool:
        return batch.end < 1_000_000


def member_state() -> Any:
    """A run whose only member is client 1."""
    state = waiting_run(RUN)
    member = Client(NodeIdentity.from_single_key(key(1).public))
    return replace(state, epoch_state=replace(state.epoch_state, clients=(member,)))


def request(start: int, end: int) -> bytes:
    return encode_frame(CLIENT_TO_DATA_SERVER.encode(Else(RequestTrainingData(BatchId(start, end)))))


def connected(service: DataService, number: int) -> tuple[Connection, ClientLink]:
    session = service.connect("a:1", 0.0)
    link = ClientLink(key(number), DATA_SERVER_TO_CLIENT, CLIENT_TO_DATA_SERVER)
    opening = session.next_frame()
    assert opening is not None
    link.receive(opening)
    session.sent(0.0)
    service.receive(session, link.data_to_send(), 0.0)
    return session, link


def new_service(**limits: Any) -> DataService:
    return DataService(FakeData(), member_state, draw=random.Random(3).randbytes, limits=ServerLimits(**limits))


def test_a_members_request_is_passed_on() -> None:
    service = new_service()
    session, _ = connected(service, 1)
    service.receive(session, request(5, 9), 0.0)
    assert service.take_output().requests == [(session, BatchId(5, 9))]


@pytest.mark.parametrize(
    ("number", "start", "end"),
    [(2, 0, 1), (1, 999_999, 1_000_000), (1, 2**63, 2**64 - 1), (1, 0, 999_999)],
    ids=["stranger", "beyond the end", "far beyond the end", "too much at once"],
)
def test_what_cannot_be_served_is_refused_and_the_connection_lives(number: int, start: int, end: int) -> None:
    service = new_service()
    session, link = connected(service, number)
    service.receive(session, request(start, end), 0.0)
    assert not service.take_output().requests
    frame = session.next_frame()
    assert frame is not None
    assert link.receive(frame) == [RequestRejected(BatchId(start, end), RejectionReason.NOT_IN_THIS_ROUND)]
    assert service.has(session)


def test_who_asks_on_without_waiting_is_cut_off() -> None:
    service = new_service()
    session, _ = connected(service, 1)
    service.receive(session, request(0, 1) * (MAX_WAITING + 1), 0.0)
    output = service.take_output()
    assert len(output.requests) == MAX_WAITING
    assert session in output.closing
    assert not service.has(session)


def test_who_does_not_read_its_answers_gets_no_more() -> None:
    service = new_service(stall_seconds=5)
    session, _ = connected(service, 1)
    for number in range(MAX_WAITING):
        service.receive(session, request(0, 1), 1.0)
        service.answer(session, bytes([number]), 1.0)
    service.receive(session, request(0, 1), 1.0)
    assert not service.has(session)
    other, _ = connected(service, 1)
    service.receive(other, request(0, 1), 1.0)
    service.answer(other, b"data", 1.0)
    service.tick(5.0)
    assert service.has(other)
    service.tick(7.0)
    assert not service.has(other)


def test_connections_are_limited() -> None:
    service = new_service(connections=1)
    connected(service, 1)
    with pytest.raises(LimitExceededError):
        service.connect("b:1", 0.0)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_end_one_session(data: bytes) -> None:
    service = new_service()
    good, _ = connected(service, 1)
    bad, _ = connected(service, 2)
    service.receive(bad, data, 0.0)
    service.receive(good, request(0, 0), 0.0)
    assert service.take_output().requests == [(good, BatchId(0, 0))]


def test_data_go_over_a_stream(tmp_path: Path) -> None:
    files = read_data_file(data_file(tmp_path))

    async def read_message(stream: Stream, link: ClientLink) -> Any:
        messages: list[Any] = []
        while not messages:
            data = await stream.read()
            assert data
            messages = link.receive(data)
            if answer := link.data_to_send():
                await stream.write(answer + request(3, 5))
        return messages[0]

    async def work() -> None:
        listener = MemoryListener()
        service = DataService(files, member_state, draw=os.urandom)
        async with DataServer(service, files, [listener]):
            stream = await listener.connect()
            link = ClientLink(key(1), DATA_SERVER_TO_CLIENT, CLIENT_TO_DATA_SERVER)
            answer = await read_message(stream, link)
            assert isinstance(answer, TrainingData)
            assert answer.data_ids == BatchId(3, 5)
            assert [list(one.input_ids) for one in answer.raw_data] == [
                sample.input_ids.tolist() for sample in files.get_samples(BatchId(3, 5))
            ]
            await stream.write(request(20, 25))
            assert isinstance(await read_message(stream, link), RequestRejected)
            await stream.close()
            while service.num_connections:
                await asyncio.sleep(0)

    run(work)
