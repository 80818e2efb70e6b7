"""Psyche's messages in Psyche's bytes, and our own report in one announcement."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm import postcard
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.announcements import MAX_ANNOUNCEMENT
from distro_optim.comm.signing import SecretKey, SignedMessage
from distro_optim.comm.tickets import BlobTicket
from distro_optim.compress import CompressedUpdate, make_plan
from distro_optim.coordinator.types import BatchId, Committee, CommitteeProof, MerkleRoot
from distro_optim.errors import ProtocolError
from distro_optim.strategy.rounds.announcer import Repeats
from distro_optim.strategy.rounds.broadcasts import MAX_MARKS, Broadcast, Finished, TrainingResult, WeightsReport
from distro_optim.strategy.rounds.results import encode_result, max_result_size, read_result
from distro_optim.strategy.rounds.trust.votes import Electorate
from distro_optim.strategy.rounds.weights import WeightsTable, differing_tensors, tensor_digest, weights_report
from distro_optim.testing.updates import random_update, same_update
from distro_optim.verify.commitment import Commitment, finished_hash
from rounds.simulator import PLAN

KEY = SecretKey(bytes(31) + b"\x01")
DATA_HASH = bytes.fromhex("4b0236be5a7bcbef4130e7222fd350e8462b0b75f5ffba61d5ddf36f1d3c2ce7")
BLOB_HASH = bytes.fromhex("f3adff931096c81f8bfc4ed091fc58cf865072bc9764fe00a83e880a7ed6f46c")
RESULT = Broadcast(
    7,
    CommitteeProof(Committee.TRAINER, 1, 0),
    Commitment(DATA_HASH, KEY.sign(DATA_HASH)),
    0x12345678,
    TrainingResult(
        BatchId(16, 19),
        BlobTicket.raw(EndpointAddr(KEY.public, direct=(SocketAddr.parse("127.0.0.1:4433"),)), BLOB_HASH),
    ),
)


def test_a_result_is_announced_in_the_bytes_of_psyche() -> None:
    data = postcard.encode(RESULT)
    ticket = KEY.public + bytes.fromhex("0101007f000001d12200") + BLOB_HASH
    commitment = b"\x60" + DATA_HASH + KEY.sign(DATA_HASH)
    assert data == bytes.fromhex("07020100") + commitment + bytes.fromhex("f8acd19101001013") + ticket
    assert len(data) == 183
    assert len(SignedMessage.seal(KEY, data)) == 281
    assert postcard.decode(Broadcast, data) == RESULT


def test_readiness_is_announced_in_the_bytes_of_psyche() -> None:
    data_hash = finished_hash(bytes(32))
    ready = Broadcast(
        0,
        CommitteeProof(Committee.TIE_BREAKER, 0, 0),
        Commitment(data_hash, KEY.sign(data_hash)),
        5,
        Finished(MerkleRoot(), warmup=True),
    )
    commitment = b"\x60" + hashlib.sha256(bytes(32)).digest() + KEY.sign(data_hash)
    assert postcard.encode(ready) == bytes(4) + commitment + b"\x05\x01" + bytes(32) + b"\x01"


@given(st.binary(max_size=400))
def test_any_bytes_are_a_broadcast_or_a_protocol_error(data: bytes) -> None:
    for form in (Broadcast, WeightsReport):
        try:
            postcard.decode(form, data)
        except ProtocolError:
            pass


@given(st.integers(0, 182), st.integers(0, 255))
def test_a_broadcast_with_one_byte_changed_is_read_or_refused(place: int, value: int) -> None:
    data = bytearray(postcard.encode(RESULT))
    data[place] = value
    try:
        postcard.decode(Broadcast, bytes(data))
    except ProtocolError:
        pass


@pytest.mark.parametrize("tensors", [0, 1, 3, MAX_MARKS, MAX_MARKS + 1, 10_000])
def test_a_report_on_any_model_fits_in_an_announcement_and_names_what_differs(tensors: int) -> None:
    digests = [hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(tensors)]
    names = [f"layer{n}" for n in range(tensors)]
    ours = weights_report(3, 70_000, digests, 2**32 - 1)
    assert len(postcard.encode(ours)) <= MAX_ANNOUNCEMENT
    assert postcard.decode(WeightsReport, postcard.encode(ours)) == ours
    assert differing_tensors(ours, ours, names) == ()
    for changed in {0, tensors // 2, tensors - 1} & set(range(tensors)):
        other = weights_report(3, 70_000, [*digests[:changed], bytes(32), *digests[changed + 1 :]], 0)
        named = differing_tensors(ours, other, names)
        assert names[changed] in named
        assert len(named) <= -(-tensors // MAX_MARKS)


def test_reports_of_models_with_another_number_of_tensors_name_none() -> None:
    ours, other = weights_report(0, 1, [bytes(32)], 0), weights_report(0, 1, [bytes(32)] * 2, 0)
    assert differing_tensors(ours, other, ["a"]) == ()


def test_a_tensor_hash_tells_names_types_shapes_and_the_sign_of_zero_apart() -> None:
    zero = torch.zeros(4)
    others = [zero.view(2, 2), zero.bool(), zero.bfloat16(), -zero]
    digests = {tensor_digest("a", zero), tensor_digest("b", zero), *(tensor_digest("a", other) for other in others)}
    assert len(digests) == 6
    assert tensor_digest("a", zero) == tensor_digest("a", torch.zeros(8)[::2])
    assert tensor_digest("s", torch.tensor(1.0)) != tensor_digest("s", torch.tensor(2.0))


def test_where_nobody_has_standing_the_largest_group_is_right_and_of_equal_ones_that_of_the_first_client() -> None:
    a, b = weights_report(0, 1, [bytes(32)], 0), weights_report(0, 1, [b"\x01" * 32], 0)
    table, all_vote = WeightsTable(), Electorate((b"1", b"2", b"3"))
    table.add(b"2", b)
    verdict = table.judge(b"1", a, all_vote, final=True)
    assert verdict.agrees
    assert not verdict.confirmed
    assert not table.judge(b"1", a, Electorate((b"2", b"1", b"3")), final=True).agrees
    table.add(b"3", b)
    verdict = table.judge(b"1", a, all_vote, final=True)
    assert (verdict.agrees, verdict.right, verdict.report) == (False, (b"2", b"3"), b)
    assert table.judge(b"9", b, all_vote, final=True).confirmed


def test_what_was_said_is_said_again_soon_and_then_ever_more_rarely_with_a_new_nonce() -> None:
    repeats = Repeats()
    assert repeats.next_at is None
    repeats.add(Broadcast(7, RESULT.proof, RESULT.commitment, 2**32 - 1, RESULT.data), 100.0)
    said: list[tuple[float, int]] = []
    while (at := repeats.next_at) is not None and at < 150:
        assert repeats.due(at - 0.001) == []
        said += [(at, broadcast.nonce) for broadcast in repeats.due(at)]
    assert said == [(101.0, 0), (103.0, 1), (107.0, 2), (115.0, 3), (125.0, 4), (135.0, 5), (145.0, 6)]


def test_what_is_about_earlier_steps_is_not_said_again() -> None:
    repeats = Repeats()
    for step in (7, 8):
        repeats.add(Broadcast(step, RESULT.proof, RESULT.commitment, 0, RESULT.data), 0.0)
    repeats.drop_before(8)
    assert [broadcast.step for broadcast in repeats.due(1.0)] == [8]


def test_a_run_without_tensors_has_empty_results_that_commit_to_step_and_batch() -> None:
    plan = make_plan([], "divisor")
    update = CompressedUpdate.empty(plan, quantized=True)
    blob, data_hash = encode_result(update, step=7, trainer_nonce=2, batch=BatchId(16, 19))
    assert data_hash == hashlib.sha256(struct.pack(">IQQ", 7, 16, 19)).digest()
    assert len(blob) <= max_result_size(plan)
    result = read_result(blob, step=7, batch=BatchId(16, 19), data_hash=data_hash, plan=plan)
    assert (result.trainer_nonce, result.update.tensors()) == (2, [])
    for step, batch in ((8, BatchId(16, 19)), (7, BatchId(16, 20))):
        with pytest.raises(ProtocolError):
            read_result(blob, step=step, batch=batch, data_hash=data_hash, plan=plan)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_result_with_one_byte_changed_is_refused_or_is_another_spelling_of_the_same(place: int, value: int) -> None:
    update = random_update(PLAN, quantized=False, seed=3)
    blob, data_hash = encode_result(update, step=7, trainer_nonce=2, batch=BatchId(16, 19))
    damaged = bytearray(blob)
    damaged[place % len(blob)] = value
    try:
        result = read_result(bytes(damaged), step=7, batch=BatchId(16, 19), data_hash=data_hash, plan=PLAN)
    except ProtocolError:
        return
    # Neither the nonce nor a tensor's flag is part of the commitment.
    assert same_update(result.update, update)


def test_the_size_limit_admits_the_largest_honest_result() -> None:
    blob, _ = encode_result(
        random_update(PLAN, quantized=False), step=2**32 - 1, trainer_nonce=2**32 - 1, batch=BatchId(2**63, 2**64 - 1)
    )
    assert len(blob) <= max_result_size(PLAN)
