"""The on-chain account: sizes that the compiler gave, a real account, and accounts that are none."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.coordinator import model, types
from distro_optim.coordinator.formats import account
from distro_optim.coordinator.formats.account import ACCOUNT_SIZE, DISCRIMINATOR, read_account
from distro_optim.coordinator.formats.raw import layout_of
from distro_optim.coordinator.types import (
    Client,
    ClientState,
    Coordinator,
    CoordinatorConfig,
    CosineLR,
    Distro,
    DontShuffle,
    Gcp,
    HttpLLMTrainingDataLocation,
    Hub,
    HubRepo,
    LLMArchitecture,
    LLMTrainingDataType,
    NodeIdentity,
    RunState,
    TokenSize,
)
from distro_optim.errors import LimitExceededError, ProtocolError, TruncatedError

VECTORS = Path(os.environ.get("DISTRO_OPTIM_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))
REAL_ACCOUNT = VECTORS / "coordinator" / "solana-account-v1.bin"


@pytest.mark.parametrize(
    ("declared", "size"),
    [
        (types.NodeIdentity, 64),
        (types.Client, 72),
        (types.WitnessProof, 24),
        (types.CommitteeProof, 24),
        (types.WitnessBloom, 192),
        (types.Witness, 440),
        (types.WitnessMetadata, 392),
        (types.Round, 14112),
        (types.CoordinatorConfig, 64),
        (types.CoordinatorProgress, 16),
        (types.CoordinatorEpochState, 93360),
        (model.HubRepo, 129),
        (model.GcsRepo, 129),
        (model.Checkpoint, 136),
        (model.HttpTrainingDataLocation, 260),
        (model.HttpLLMTrainingDataLocation, 300),
        (model.LLMTrainingDataLocation, 304),
        (model.LearningRateSchedule, 56),
        (model.OptimizerDefinition, 32),
        (model.LLM, 544),
        (model.Model, 552),
        (types.Coordinator, 94048),
        (account.RunMetadata, 360),
        (account.SolanaClient, 96),
        (account.ClientsState, 24624),
        (account.CoordinatorInstanceState, 119136),
        (account.CoordinatorAccount, 119152),
    ],
)
def test_sizes_are_those_of_the_rust_compiler(declared: Any, size: int) -> None:
    assert layout_of(declared).size == size


def test_a_type_without_a_size_has_no_layout() -> None:
    for declared in (str, list[types.U64], bytes):
        with pytest.raises(TypeError):
            layout_of(declared)


# -- an account made by hand ---------------------------------------------------------------------------------------


def blank_account() -> bytearray:
    """All zero but for what the checks ask: such an account is what the program creates."""
    data = bytearray(ACCOUNT_SIZE)
    data[:8] = DISCRIMINATOR
    data[8:16] = struct.pack("<Q", 1)
    return data


def test_a_fresh_account_is_all_zero() -> None:
    state = read_account(blank_account()).state
    assert state.coordinator.run_state is RunState.UNINITIALIZED
    assert state.coordinator.run_id == ""
    assert state.coordinator.progress.step == 0
    assert state.coordinator.epoch_state.first_round is False
    assert state.clients_state.pending() == ()


def test_fields_are_read_from_the_offsets_of_the_rust_compiler() -> None:
    data = blank_account()
    data[376:380] = b"test"
    data[408] = 3  # run_state
    struct.pack_into("<Q", data, 968 + 40, 99)  # config.epoch_time
    data[968 + 63] = 7  # config.waiting_for_members_extra_time
    struct.pack_into("<I", data, 1032 + 4, 41)  # progress.step
    struct.pack_into("<Q", data, 1048 + 14112 * 2 + 14096, 2**64 - 1)  # rounds[2].random_seed
    data[1048 + 14112 + 16] = 1  # rounds[1].witnesses[0].proof.witness
    struct.pack_into("<Q", data, 1048 + 14112 + 280, 5)  # ... .broadcast_bloom.words[0]
    struct.pack_into("<Q", data, 1048 + 14112 + 14080, 1)  # rounds[1].witnesses, how many
    data[57496 + 72 : 57496 + 72 + 64] = bytes([9]) * 64  # clients[1].id
    data[57496 + 72 + 64] = 2  # clients[1].state
    struct.pack_into("<I", data, 57496 + 72 + 68, 6)  # clients[1].exited_height
    struct.pack_into("<Q", data, 75928, 2)  # clients, how many
    struct.pack_into("<I", data, 94376, 3)  # rounds_head
    data[94416] = 1  # pending_pause
    data[94424 + 96 + 32] = 4  # clients_state.clients[1].id.p2p_identity
    struct.pack_into("<Q", data, 94424 + 96 + 88, 12)  # ... .active
    struct.pack_into("<Q", data, 119000, 2)
    struct.pack_into("<Q", data, 119008, 12)  # next_active
    data[119050:119054] = b"v1.2"
    struct.pack_into("<Q", data, 119152, 77)  # nonce

    found = read_account(data)
    coordinator, epoch = found.state.coordinator, found.state.coordinator.epoch_state
    assert (coordinator.run_id, coordinator.run_state) == ("test", RunState.ROUND_TRAIN)
    assert (coordinator.config.epoch_time, coordinator.config.waiting_for_members_extra_time) == (99, 7)
    assert coordinator.progress.step == 41
    assert epoch.rounds[2].random_seed == 2**64 - 1
    assert epoch.rounds[1].witnesses[0].proof.witness is True
    assert epoch.rounds[1].witnesses[0].broadcast_bloom.words[0] == 5
    assert epoch.clients[1] == Client(NodeIdentity.from_single_key(b"\t" * 32), ClientState.WITHDRAWN, 6)
    assert (len(epoch.clients), epoch.rounds_head, coordinator.pending_pause) == (2, 3, True)
    assert found.state.clients_state.clients[1].id.p2p_identity[0] == 4
    assert found.state.clients_state.pending() == (found.state.clients_state.clients[1].id,)
    assert (found.state.client_version, found.nonce) == ("v1.2", 77)


@pytest.mark.parametrize(
    ("offset", "value", "field", "error"),
    [
        (408, 8, "state.coordinator.run_state", ProtocolError),
        (416, 1, "state.coordinator.model", ProtocolError),
        (432, 4, "state.coordinator.model.LLM.architecture", ProtocolError),
        (436, 6, "state.coordinator.model.LLM.checkpoint", ProtocolError),
        (936, 3, "state.coordinator.model.LLM.optimizer", ProtocolError),
        (1048 + 14080, 33, "state.coordinator.epoch_state.rounds[0].witnesses", LimitExceededError),
        (75929, 2, "state.coordinator.epoch_state.clients", LimitExceededError),
        (94376, 4, "state.coordinator.epoch_state", ProtocolError),
        (119001, 2, "state.clients_state.clients", LimitExceededError),
        (0, 0, "discriminator", ProtocolError),
        (8, 2, "version", ProtocolError),
    ],
)
def test_a_wrong_field_is_named(offset: int, value: int, field: str, error: type[ProtocolError]) -> None:
    data = blank_account()
    data[offset] = value
    with pytest.raises(error) as caught:
        read_account(data)
    assert caught.value.field == field


def test_an_account_of_another_size_is_refused() -> None:
    for size in (0, 7, 119072, ACCOUNT_SIZE + 1):
        with pytest.raises(ProtocolError, match="119160 bytes"):
            read_account(bytes(size))
    with pytest.raises(TruncatedError):
        layout_of(Coordinator).read(bytes(100))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(16, ACCOUNT_SIZE - 1), st.integers(0, 255)), max_size=20))
def test_any_bytes_raise_only_protocol_errors(changes: list[tuple[int, int]]) -> None:
    data = blank_account()
    for offset, value in changes:
        data[offset] = value
    with contextlib.suppress(ProtocolError):
        read_account(data)


# -- a real one ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_ACCOUNT.exists(), reason=f"the recorded account is not there: {REAL_ACCOUNT.name}")
def test_a_real_account_holds_what_psyches_own_test_finds_in_it() -> None:
    found = read_account(REAL_ACCOUNT.read_bytes())
    state = found.state
    coordinator = state.coordinator
    assert (found.version, found.nonce, state.client_version) == (1, 2, "test")
    assert (state.metadata.num_parameters, state.metadata.vocab_size) == (1_100_000_000, 32768)
    assert (coordinator.run_id, coordinator.run_state) == ("test", RunState.UNINITIALIZED)
    assert coordinator.config == CoordinatorConfig(15, 30, 15, 1, 0, 60, 25000, 1, 1, 0, 2048, 2048, 0, 3)
    llm = coordinator.model
    assert (llm.max_seq_len, llm.architecture) == (2048, LLMArchitecture.HF_LLAMA)
    assert llm.checkpoint == Hub(HubRepo("emozilla/llama2-1.1b-gqa-init"))
    assert llm.data_type is LLMTrainingDataType.PRETRAINING
    assert llm.data_location == HttpLLMTrainingDataLocation(
        Gcp("nous-pretraining-public-us", "fineweb-edu-tokenized-llama2"), TokenSize.TWO_BYTES, DontShuffle()
    )
    assert llm.lr_schedule == CosineLR(4e-4, 0.0, 4e-5, 250, 25000)
    assert isinstance(llm.optimizer, Distro)
    assert llm.optimizer.compression_decay == pytest.approx(0.999)
    assert (llm.optimizer.clip_grad_norm, llm.optimizer.weight_decay) == (1.0, None)
    assert (llm.optimizer.compression_topk, llm.optimizer.compression_chunk) == (2, 64)
    assert llm.optimizer.quantize_1bit is False
    assert (coordinator.progress.epoch, coordinator.progress.step) == (0, 0)
    assert coordinator.progress.epoch_start_data_index == 0
    assert coordinator.epoch_state == types.CoordinatorEpochState(first_round=False)
    assert state.clients_state.future_epoch_rates.earning_rate_total_shared == 1_000_000
