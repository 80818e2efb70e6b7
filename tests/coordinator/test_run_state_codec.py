"""The run state and the messages around it have Psyche's bytes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.comm.framing import Else
from distro_optim.comm.postcard import decode, encode
from distro_optim.coordinator.messages import (
    CLIENT_TO_DATA_SERVER,
    CLIENT_TO_SERVER,
    DATA_SERVER_TO_CLIENT,
    SERVER_TO_CLIENT,
    CheckpointMessage,
    CoordinatorMessage,
    HealthCheckMessage,
    Join,
    RequestTrainingData,
    TokenizedData,
    TrainingData,
    WarmupStep,
    WitnessMessage,
    WitnessStep,
)
from distro_optim.coordinator.types import (
    LLM,
    BatchId,
    Client,
    Committee,
    CommitteeProof,
    ConstantLR,
    Coordinator,
    CoordinatorConfig,
    CoordinatorEpochState,
    CoordinatorProgress,
    DummyData,
    DummyOptimizer,
    Ephemeral,
    Hub,
    HubRepo,
    LLMArchitecture,
    LLMTrainingDataType,
    MerkleRoot,
    NodeIdentity,
    Round,
    RunState,
    Witness,
    WitnessBloom,
    WitnessEvalResult,
    WitnessMetadata,
    WitnessProof,
)
from distro_optim.errors import LimitExceededError, ProtocolError

TRACES = sorted((Path(__file__).parents[1] / "vectors" / "coordinator").glob("trace_*.jsonl.gz"))

ZERO = Coordinator(
    run_id="",
    run_state=RunState.UNINITIALIZED,
    model=LLM(
        max_seq_len=0,
        cold_start_warmup_steps=0,
        architecture=LLMArchitecture.HF_LLAMA,
        checkpoint=Ephemeral(),
        data_type=LLMTrainingDataType.PRETRAINING,
        data_location=DummyData(),
        lr_schedule=ConstantLR(0.0, 0.0, 0),
        optimizer=DummyOptimizer(),
    ),
    config=CoordinatorConfig(*[0] * 14),
    progress=CoordinatorProgress(0, 0, 0),
    epoch_state=CoordinatorEpochState(first_round=False),
)

SHA_HELLO_BLOOM = WitnessBloom(
    keys=(1, 2, 3, 4, 5, 6, 7, 8),
    words=(0, 1152923703630102528, 16384, *[0] * 5, 67108864, *[0] * 3, 2**63 + 8, 0, 9007199254740992, 65536),
)
SHA_HELLO_BYTES = (
    "080102030405060708136269747665633a3a6f726465723a3a4c7362304000800800"
    "8080808080c080801080800100000000008080802000000088808080808080808001008080808080808010808004"
)
EMPTY_BLOOM = "08" + "00" * 8 + "136269747665633a3a6f726465723a3a4c736230" + "4000" + "8008" + "00" * 16


def recorded_states() -> Iterator[tuple[str, dict[str, Any], bytes]]:
    for path in TRACES:
        with gzip.open(path, "rt") as lines:
            for number, line in enumerate(lines):
                record = json.loads(line)
                found = record if "postcard" in record else record.get("state", {})
                if "postcard" in found:
                    yield f"{path.stem}:{number}", found, bytes.fromhex(found["postcard"])


def test_every_recorded_state_decodes_and_encodes_to_the_same_bytes() -> None:
    count = 0
    for name, found, data in recorded_states():
        state = decode(Coordinator, data)
        assert encode(state) == data, name
        count += 1
        if "sha256" not in found:
            continue
        assert hashlib.sha256(data).hexdigest() == found["sha256"]
        assert state.progress.step == found["step"]
        assert state.run_state.value == found["run_state"]
        assert len(state.current_round.witnesses) == found["witnesses"]
        assert state.current_round.height == found["height"]
    assert count > 50


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (ZERO, "00" * 79),
        (CoordinatorEpochState(), "00" * 30 + "0100"),
        (BatchId(128, 300), "8001ac02"),
        (SHA_HELLO_BLOOM, SHA_HELLO_BYTES),
        (WitnessBloom(), EMPTY_BLOOM),
        (
            WitnessMetadata(7, 1.5, 0.0, float("inf"), (WitnessEvalResult("arc_easy", 0.25),), (1, -1, 300), 2, 0.5),
            "070000c03f000000000000807f01086172635f656173790000803e030201d804020000003f",
        ),
    ],
)
def test_values_have_psyches_bytes(value: object, expected: str) -> None:
    assert encode(value).hex() == expected
    assert decode(type(value), bytes.fromhex(expected)) == value


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Join("test"), "01000474657374"),
        (CheckpointMessage(Hub(HubRepo("a/b", "main"))), "01030203612f6201046d61696e"),
        (
            HealthCheckMessage(
                ((NodeIdentity.from_single_key(b"\t" * 32), CommitteeProof(Committee.TRAINER, 1, 130)),)
            ),
            "010201" + "09" * 64 + "02018201",
        ),
        (
            WitnessMessage(
                WarmupStep(
                    Witness(WitnessProof(3, 300, True), SHA_HELLO_BLOOM, WitnessBloom(), MerkleRoot(b"\xab" * 32))
                )
            ),
            "01010103ac0201" + SHA_HELLO_BYTES + EMPTY_BLOOM + "ab" * 32,
        ),
    ],
)
def test_client_messages_have_psyches_bytes(message: Any, expected: str) -> None:
    assert CLIENT_TO_SERVER.encode(Else(message)).hex() == expected
    assert CLIENT_TO_SERVER.decode(bytes.fromhex(expected)) == Else(message)


def test_the_server_message_is_the_bare_state() -> None:
    assert SERVER_TO_CLIENT.encode(Else(CoordinatorMessage(ZERO))) == b"\x01\x00" + bytes(79)
    assert SERVER_TO_CLIENT.decode(b"\x01\x00" + bytes(79)).message.state == ZERO


def test_data_server_messages_round_trip() -> None:
    request = Else(RequestTrainingData(BatchId(3, 4)))
    assert CLIENT_TO_DATA_SERVER.encode(request) == bytes.fromhex("01000304")
    answer = Else(TrainingData(BatchId(3, 4), (TokenizedData((1, 300)), TokenizedData((2,), labels=(-1,)))))
    data = DATA_SERVER_TO_CLIENT.encode(answer)
    assert data == bytes.fromhex("0100" "0304" "02" "0202d804000000" "010401010100" "00")  # fmt: skip
    assert DATA_SERVER_TO_CLIENT.decode(data) == answer


def test_identities_are_equal_by_their_signer() -> None:
    a, b = NodeIdentity(b"\1" * 32, b"\2" * 32), NodeIdentity(b"\1" * 32, b"\3" * 32)
    assert a == b
    assert len({a, b}) == 1
    assert str(a) == "01010101"


def test_intervals_print_as_in_psyche() -> None:
    assert [str(BatchId(5, 5)), str(BatchId(0, 24))] == ["B5", "B[0, 24]"]
    assert len(BatchId(0, 24)) == 25


# -- a stranger's state --------------------------------------------------------------------------------------------


def busy_state(num_clients: int, num_witnesses: int) -> Coordinator:
    """A state of the largest size, for bounds and speed."""
    clients = tuple(
        Client(NodeIdentity.from_single_key(bytes([i & 255, i >> 8]) + bytes(30))) for i in range(num_clients)
    )
    words = tuple(0x9E3779B97F4A7C15 * i & (2**64 - 1) for i in range(1, 17))
    bloom = WitnessBloom(words[:8], words)
    witnesses = tuple(Witness(WitnessProof(i, i, True), bloom, bloom) for i in range(num_witnesses))
    rounds = tuple(Round(witnesses, 2**40, 2**63, i, num_clients, 0) for i in range(4))
    return replace(ZERO, run_id="x" * 32, epoch_state=CoordinatorEpochState(rounds, clients, clients))


def test_the_largest_state_round_trips_and_fits_a_frame_with_room_to_spare() -> None:
    state = busy_state(256, 32)
    data = encode(state)
    assert decode(Coordinator, data) == state
    assert len(data) < 128 * 1024


@pytest.mark.parametrize(
    ("wrong", "field", "error"),
    [
        (b"\x00\x08", "run_state", ProtocolError),  # the ninth of eight
        (b"\x21" + b"x" * 33, "run_id", LimitExceededError),
        (b"\x01\xff", "run_id", ProtocolError),
        (b"\x00\x00\x01", "model", ProtocolError),  # a second kind of model
        (b"\x00\x00\x00\x00\x00\x04", "model.LLM.architecture", ProtocolError),
        (b"\x00\x00\x00\x00\x00\x00\x02\x41" + b"x" * 65, "model.LLM.checkpoint.Hub.repo.repo_id", LimitExceededError),
    ],
)
def test_a_wrong_field_is_named(wrong: bytes, field: str, error: type[ProtocolError]) -> None:
    with pytest.raises(error) as caught:
        decode(Coordinator, wrong + bytes(300))
    assert caught.value.field == field


def test_a_count_beyond_its_limit_is_named() -> None:
    clean = encode(ZERO)
    names = []
    for at in range(len(clean)):
        try:
            decode(Coordinator, clean[:at] + b"\x81\x02" + clean[at + 1 :] + bytes(400 * 300))  # 257
        except LimitExceededError as error:
            names.append(error.field)
        except ProtocolError:
            pass
    assert {"epoch_state.clients", "epoch_state.exited_clients", "epoch_state.rounds[3].witnesses"} <= set(names)


def test_a_filter_of_another_shape_is_refused() -> None:
    good = bytes.fromhex(EMPTY_BLOOM)
    for old, new in (
        (b"Lsb0", b"Msb0"),
        (b"\x40\x00\x80\x08", b"\x40\x00\x80\x07"),
        (b"\x40\x00\x80", b"\x20\x00\x80"),
    ):
        with pytest.raises(ProtocolError):
            decode(WitnessBloom, good.replace(old, new))
    with pytest.raises(ProtocolError, match="8 keys"):
        decode(WitnessBloom, b"\x07" + good[2:])


def test_a_head_outside_the_ring_is_refused() -> None:
    bad = bytes(26) + b"\x04" + bytes(5)
    with pytest.raises(ProtocolError, match="rounds_head"):
        decode(CoordinatorEpochState, bad)


def test_an_interval_that_runs_backwards_is_refused() -> None:
    with pytest.raises(ProtocolError, match="backwards"):
        decode(BatchId, b"\x02\x01")


def test_any_nonzero_byte_is_true_in_a_small_boolean() -> None:
    """As in Psyche, where a warm-up report with such a byte gets into the state that everybody receives."""
    assert decode(WitnessProof, b"\x00\x00\x07").witness is True


@pytest.mark.slow
@settings(deadline=None)
@given(st.data())
def test_flipped_bits_raise_only_protocol_errors(data: st.DataObject) -> None:
    encoded = bytearray(BUSY)
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ProtocolError):
        decode(Coordinator, encoded, allow_trailing=True)


BUSY = encode(busy_state(5, 2))


@pytest.mark.slow
@given(st.binary(max_size=400))
def test_arbitrary_messages_raise_only_protocol_errors(data: bytes) -> None:
    for codec in (CLIENT_TO_SERVER, SERVER_TO_CLIENT, CLIENT_TO_DATA_SERVER, DATA_SERVER_TO_CLIENT):
        with contextlib.suppress(ProtocolError):
            codec.decode(data)


def test_a_witness_step_round_trips() -> None:
    metadata = WitnessMetadata(7, 1.5, 0.0, 2.0, (), (), 0, 0.5)
    message = Else(WitnessMessage(WitnessStep(Witness(WitnessProof(1, 2, True)), metadata)))
    assert CLIENT_TO_SERVER.decode(CLIENT_TO_SERVER.encode(message)) == message
