"""state.toml and JSON: what Psyche's files say, what ours keep, and how a wrong line is named."""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.comm.postcard import decode, encode
from distro_optim.coordinator.formats.text import from_json, from_plain, from_toml, to_json, to_plain, to_toml
from distro_optim.coordinator.model import LLMTrainingDataLocation
from distro_optim.coordinator.types import (
    AdamW,
    Client,
    Coordinator,
    CoordinatorEpochState,
    DummyData,
    Gcp,
    GcsRepo,
    HttpLLMTrainingDataLocation,
    NodeIdentity,
    NumberedFiles,
    P2PGcs,
    Round,
    RunState,
    Seeded,
    TokenSize,
    WeightedHttpData,
    Witness,
    WitnessBloom,
    WitnessProof,
)
from distro_optim.errors import LimitExceededError, ProtocolError

TRACES = sorted((Path(__file__).parents[1] / "vectors" / "coordinator").glob("trace_*.jsonl.gz"))

# What Psyche's crates make of its config/test/state.toml.
TEST_STATE_BYTES = (
    "04746573740100800400000100000000022d431cebe2363a3f0000000000000000f168e388b5f8043f14d00f0005050502003c0a02020104"
    "04000300010000000000000000000000000000000000000000000000000000000000000001000000"
)


def first_lines() -> list[dict[str, Any]]:
    return [json.loads(gzip.open(path, "rt").readline()) for path in TRACES]


@pytest.mark.parametrize("record", first_lines(), ids=lambda record: record["coordinator"]["run_id"])
def test_the_recorded_json_has_the_recorded_bytes(record: dict[str, Any]) -> None:
    state = from_plain(Coordinator, record["coordinator"])
    assert encode(state).hex() == record["postcard"]
    assert to_plain(state) == record["coordinator"]
    assert from_json(Coordinator, to_json(state)) == state


def test_a_state_of_psyche_is_read_from_its_bytes_and_survives_toml() -> None:
    state = decode(Coordinator, bytes.fromhex(TEST_STATE_BYTES))
    text = to_toml(state)
    assert 'run_id = "test"' in text
    assert "[model.LLM.lr_schedule.Cosine]" in text
    again = from_toml(Coordinator, text)
    assert again == state
    assert encode(again).hex() == TEST_STATE_BYTES


def rich_states() -> list[Coordinator]:
    base = decode(Coordinator, bytes.fromhex(TEST_STATE_BYTES))
    bloom = WitnessBloom((2**64 - 1,) * 8, tuple(range(2**63, 2**63 + 16)))
    rounds = (Round((Witness(WitnessProof(1, 2, True), bloom),), 7, 2**64 - 1, 3, 4, 0), Round(), Round(), Round())
    client = Client(NodeIdentity(bytes(range(32)), bytes(range(32, 64))))
    busy = replace(
        base,
        run_id="läuft",
        run_state=RunState.ROUND_TRAIN,
        epoch_state=CoordinatorEpochState(rounds, (client,), (client, client)),
        pending_pause=True,
    )
    locations: list[LLMTrainingDataLocation] = [
        DummyData(),
        WeightedHttpData("https://example.org/weights.json"),
        HttpLLMTrainingDataLocation(NumberedFiles("https://x/{}.ds", 1, 4, 9), TokenSize.FOUR_BYTES, Seeded(bytes(32))),
        HttpLLMTrainingDataLocation(Gcp("bucket", "folder"), TokenSize.TWO_BYTES, Seeded(b"\xff" * 32)),
    ]
    models = [replace(base.model, data_location=location) for location in locations]
    models.append(replace(base.model, checkpoint=P2PGcs(GcsRepo("bucket", "prefix"))))
    models.append(replace(base.model, checkpoint=P2PGcs(GcsRepo("bucket"))))
    models.append(replace(base.model, optimizer=AdamW(betas=decode_f32(0.9, 0.95), weight_decay=0.5, eps=0.25)))
    return [busy, *(replace(base, model=model) for model in models)]


def decode_f32(*values: float) -> tuple[float, ...]:
    return struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values))


@pytest.mark.parametrize("state", rich_states())
def test_every_kind_of_state_survives_toml_and_json_with_all_of_its_64_bits(state: Coordinator) -> None:
    assert from_toml(Coordinator, to_toml(state)) == state
    assert from_json(Coordinator, to_json(state)) == state
    assert encode(from_toml(Coordinator, to_toml(state))) == encode(state)


def test_float32_values_are_written_as_short_as_they_can_be() -> None:
    text = to_json(AdamW(decode_f32(0.9, 0.95), decode_f32(0.1)[0], decode_f32(1e-8)[0]))
    assert json.loads(text) == {"betas": [0.9, 0.95], "weight_decay": 0.1, "eps": 1e-08, "clip_grad_norm": None}


def test_progress_and_epoch_may_be_left_out() -> None:
    plain = to_plain(decode(Coordinator, bytes.fromhex(TEST_STATE_BYTES)))
    for key in ("progress", "epoch_state", "run_state_start_unix_timestamp", "pending_pause"):
        del plain[key]
    plain["a_key_from_the_future"] = 1
    state = from_plain(Coordinator, plain)
    assert encode(state).hex() == TEST_STATE_BYTES


def changed(path: str, value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(decode(Coordinator, bytes.fromhex(TEST_STATE_BYTES)))
    *parents, last = path.split(".")
    at = plain
    for parent in parents:
        at = at[parent]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return plain


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        ("run_state", "Sleeping", "run_state", "one of Uninitialized, .* is expected, not 'Sleeping'"),
        ("run_state", 1, "run_state", "is expected, not 1"),
        ("run_id", "x" * 33, "run_id", "33 bytes is above the limit of 32"),
        ("run_id", 5, "run_id", "a string is expected"),
        ("config.min_clients", 65536, "config.min_clients", "65536 does not fit in u16"),
        ("config.min_clients", -1, "config.min_clients", "-1 does not fit in u16"),
        ("config.min_clients", 1.5, "config.min_clients", "whole number"),
        ("config.min_clients", True, "config.min_clients", "whole number"),
        ("config.epoch_time", ..., "config.epoch_time", "missing"),
        ("config", [], "config", "a table is expected"),
        ("model.LLM.architecture", "Rnn", "model.LLM.architecture", "HfLlama"),
        ("model.LLM.optimizer", {"Sgd": {}}, "model.LLM.optimizer", "'Sgd'"),
        ("model.LLM.optimizer", {"AdamW": {}, "Distro": {}}, "model.LLM.optimizer", "a variant"),
        ("model.LLM.checkpoint", {"Hub": {"repo_id": 5}}, "model.LLM.checkpoint.Hub.repo_id", "string"),
        ("epoch_state.rounds", [], "epoch_state.rounds", "4 items are needed"),
        ("epoch_state.rounds_head", 4, "epoch_state", "rounds_head is 4"),
        ("epoch_state.clients", [{}] * 257, "epoch_state.clients", "257 items are above the limit of 256"),
        (
            "epoch_state.clients",
            [{"id": {"signer": [0] * 32, "p2p_identity": [0] * 31 + [256]}, "state": "Healthy", "exited_height": 0}],
            "epoch_state.clients[0].id.p2p_identity[31]",
            "256 does not fit in u8",
        ),
        ("pending_pause", 256, "pending_pause", "does not fit in u8"),
    ],
)
def test_a_wrong_field_is_named(path: str, value: Any, field: str, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        from_plain(Coordinator, changed(path, value))
    assert caught.value.field == field


def test_a_number_of_thousands_of_digits_is_refused_in_a_short_message() -> None:
    with pytest.raises(ProtocolError, match="thousands of digits does not fit in u32"):
        from_plain(Coordinator, changed("model.LLM.max_seq_len", 10**5000))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@given(st.sampled_from(["run_id", "config", "config.min_clients", "model", "model.LLM.checkpoint",
                        "model.LLM.lr_schedule", "epoch_state", "epoch_state.rounds", "progress"]), PLAIN)  # fmt: skip
def test_arbitrary_values_raise_only_protocol_errors(path: str, value: Any) -> None:
    with contextlib.suppress(ProtocolError):
        from_plain(Coordinator, changed(path, value))


@given(st.text(max_size=50))
def test_arbitrary_text_raises_only_protocol_errors(text: str) -> None:
    for read in (from_toml, from_json):
        with pytest.raises(ProtocolError):
            read(Coordinator, text)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a = " + "[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "x = " + "1" * 10_000],
    ids=["brackets", "toml brackets", "json tables", "json digits", "toml digits"],
)
def test_text_made_to_break_a_parser_raises_only_protocol_errors(text: str) -> None:
    for read in (from_toml, from_json):
        with pytest.raises(ProtocolError):
            read(Coordinator, text)


def test_a_number_too_large_for_its_float_is_refused() -> None:
    with pytest.raises(LimitExceededError):
        from_plain(AdamW, {"betas": [1e300, 0], "weight_decay": 0, "eps": 0})
