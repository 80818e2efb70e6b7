"""The on-chain account: sizes that the compiler gave, a real account, and accounts that are none."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.raw_encoder import raw_bytes
from distro_optim.comm.postcard import U64
from distro_optim.coordinator import model, types
from distro_optim.coordinator.formats import account
from distro_optim.coordinator.formats.account import (
    ACCOUNT_SIZE,
    DISCRIMINATOR,
    ClientsEpochRates,
    ClientsState,
    CoordinatorAccount,
    CoordinatorInstanceState,
    RunMetadata,
    SolanaClient,
    read_account,
)
from distro_optim.coordinator.formats.raw import layout_of
from distro_optim.coordinator.model import AdamW, ServerData
from distro_optim.coordinator.types import (
    Client,
    ClientState,
    Coordinator,
    CoordinatorConfig,
    CoordinatorProgress,
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
    WitnessProof,
)
from distro_optim.errors import LimitExceededError, ProtocolError, TruncatedError
from distro_optim.testing.coordinator import report
from runs import client

VECTORS = Path(os.environ.get("DISTRO_OPTIM_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))
REAL_ACCOUNT = VECTORS / "coordinator" / "solana-account-v1.bin"

MODEL_AT = 416
"""Offset of the model of the run in the account."""


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
    for declared in (str, list[U64], bytes):
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
        with pytest.raises(ProtocolError, match=f"has {size} bytes,.* not 119160"):
            read_account(bytes(size))
    with pytest.raises(TruncatedError):
        layout_of(Coordinator).read(bytes(100))


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(16, ACCOUNT_SIZE - 1), st.integers(0, 255)), max_size=20))
def test_any_bytes_raise_only_protocol_errors(changes: list[tuple[int, int]]) -> None:
    data = blank_account()
    for offset, value in changes:
        data[offset] = value
    with contextlib.suppress(ProtocolError):
        read_account(data)


# -- whole accounts ------------------------------------------------------------------------------------------------


def account_of_a_run() -> CoordinatorAccount:
    """What the account of Psyche's own test holds (``REAL_ACCOUNT``), as values."""
    optimizer = Distro(1.0, None, struct.unpack("<f", struct.pack("<f", 0.999))[0], 2, 64, False)
    run = model.LLM(
        max_seq_len=2048,
        cold_start_warmup_steps=0,
        architecture=LLMArchitecture.HF_LLAMA,
        checkpoint=Hub(HubRepo("emozilla/llama2-1.1b-gqa-init")),
        data_type=LLMTrainingDataType.PRETRAINING,
        data_location=HttpLLMTrainingDataLocation(
            Gcp("nous-pretraining-public-us", "fineweb-edu-tokenized-llama2"), TokenSize.TWO_BYTES, DontShuffle()
        ),
        lr_schedule=CosineLR(4e-4, 0.0, 4e-5, 250, 25000),
        optimizer=optimizer,
    )
    config = CoordinatorConfig(15, 30, 15, 1, 0, 60, 25000, 1, 1, 0, 2048, 2048, 0, 3)
    epoch = types.CoordinatorEpochState(first_round=False)
    return CoordinatorAccount(
        1,
        CoordinatorInstanceState(
            RunMetadata("", "", 1_100_000_000, 32768),
            Coordinator("test", RunState.UNINITIALIZED, run, config, CoordinatorProgress(0, 0, 0), epoch),
            ClientsState((), 0, ClientsEpochRates(0, 0), ClientsEpochRates(1_000_000, 0)),
            False,
            False,
            "test",
        ),
        2,
    )


def account_of_a_busy_run() -> CoordinatorAccount:
    """In the middle of a round: members, some who left, and the report of a witness."""
    members = tuple(Client(client(number), ClientState.HEALTHY, 0) for number in range(1, 6))
    gone = (Client(client(7), ClientState.DROPPED, 3), Client(client(8), ClientState.WITHDRAWN, 9))
    seen = report(WitnessProof(4, 2, True), [member.id for member in members], [bytes([n]) * 32 for n in range(9)])
    rounds = (
        types.Round((seen, seen), 4096, 2**64 - 1, 7, 5, 2),
        *(types.Round((), 2048 * height, height, height, 5, 0) for height in (4, 5, 6)),
    )
    quiet = account_of_a_run()
    state = replace(
        quiet.state.coordinator,
        run_id="busy",
        run_state=RunState.ROUND_TRAIN,
        model=replace(
            quiet.state.coordinator.model,
            checkpoint=model.P2P(HubRepo("somebody/something", "a-revision")),
            data_location=ServerData("example.org:1234"),
            optimizer=AdamW((0.5, 0.75), 0.125, 2.0**-20, None),
        ),
        progress=CoordinatorProgress(3, 41, 77),
        epoch_state=types.CoordinatorEpochState(rounds, members, gone, 0, 30, 0, 1_700_000_000, False, True),
        run_state_start_unix_timestamp=1_700_000_123,
        pending_pause=True,
    )
    joined = tuple(SolanaClient(client(n), bytes(8), 10 * n, n, 4 + n % 2) for n in range(1, 9))
    clients_state = ClientsState(joined, 5, ClientsEpochRates(1, 2), ClientsEpochRates(3, 4))
    return replace(quiet, state=replace(quiet.state, coordinator=state, clients_state=clients_state), nonce=2**64 - 1)


def written(value: CoordinatorAccount) -> bytes:
    return DISCRIMINATOR + raw_bytes(CoordinatorAccount, value)


@pytest.mark.parametrize("value", [account_of_a_run(), account_of_a_busy_run()], ids=["fresh", "busy"])
def test_an_account_is_read_as_it_was_written(value: CoordinatorAccount) -> None:
    data = written(value)
    assert len(data) == ACCOUNT_SIZE
    assert read_account(data) == value


def real_account() -> bytes:
    if not REAL_ACCOUNT.exists():
        pytest.skip(f"{REAL_ACCOUNT} is not there; the account that we write ourselves is checked all the same")
    return REAL_ACCOUNT.read_bytes()


def test_a_real_account_holds_the_same_run_as_ours() -> None:
    assert read_account(real_account()) == account_of_a_run()


def test_our_account_is_the_real_one_but_for_bytes_that_nobody_looks_at() -> None:
    """Leftovers in padding and in the room of other variants: few, and all within the model of the run."""
    real, ours = real_account(), written(account_of_a_run())
    other = [at for at in range(ACCOUNT_SIZE) if real[at] != ours[at]]
    assert len(other) < 32
    assert all(MODEL_AT <= at < MODEL_AT + layout_of(model.Model).size for at in other)


@pytest.mark.parametrize("read", [lambda: written(account_of_a_run()), real_account], ids=["ours", "real"])
def test_an_account_holds_what_psyches_own_test_finds_in_it(read: Callable[[], bytes]) -> None:
    found = read_account(read())
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
