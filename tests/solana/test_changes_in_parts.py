"""What an operator changes at once goes into as few transactions as it fits in; nothing of it gets lost."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from solders.keypair import Keypair

from distro_optim.coordinator.formats.account import CoordinatorAccount, RunMetadata
from distro_optim.coordinator.model import (
    LLM,
    P2P,
    Checkpoint,
    Distro,
    DummyCheckpoint,
    Gcp,
    Gcs,
    GcsRepo,
    HttpLLMTrainingDataLocation,
    Hub,
    HubRepo,
    LLMArchitecture,
    LLMTrainingDataType,
    P2PGcs,
    Seeded,
    TokenSize,
    WarmupStableDecayLR,
)
from distro_optim.coordinator.solana.arguments import RunUpdate
from distro_optim.coordinator.solana.instructions import RunInstructions, TreasurerInstructions
from distro_optim.coordinator.solana.programs import Programs
from distro_optim.coordinator.solana.sending import MAX_TRANSACTION_BYTES
from distro_optim.coordinator.solana.settings import Settings, changes_of
from distro_optim.coordinator.solana.steps import in_parts, transaction_bytes
from distro_optim.coordinator.solana.treasury import RunAuthority
from distro_optim.coordinator.types import CoordinatorProgress
from distro_optim.errors import ConfigurationError
from distro_optim.testing import DUMMY_CONFIG, dummy_run
from distro_optim.testing.solana.coordinator_twin import CoordinatorTwin
from solana.solana_arena import OPERATOR, RUN, wallet

LARGEST = LLM(
    2**32 - 1,
    2**32 - 1,
    LLMArchitecture.HF_LLAMA,
    Hub(HubRepo("r" * 64, "v" * 64)),
    LLMTrainingDataType.PRETRAINING,
    HttpLLMTrainingDataLocation(Gcp("b" * 64, "d" * 192), TokenSize.TWO_BYTES, Seeded(bytes(32))),
    WarmupStableDecayLR(1.0, 1.0, 1.0, 1.0, 1, 1, 1, 1),
    Distro(1.0, 1.0, 1.0, 1, 1, True),
)
METADATA = RunMetadata("n" * 64, "d" * 280, 1, 1)
CHANGES = [
    RunUpdate(config=DUMMY_CONFIG, model=LARGEST, progress=CoordinatorProgress(1, 2, 3)),
    RunUpdate(metadata=METADATA),
    RunUpdate(client_version="v" * 96),
]
RUN_INSTRUCTIONS = RunInstructions(Programs(), "x" * 32, RUN.pubkey())
DIRECT = RunAuthority(OPERATOR.pubkey(), RUN_INSTRUCTIONS)
TREASURY = TreasurerInstructions(Programs(), 5, wallet(1).pubkey(), "x" * 32, RUN.pubkey())
THROUGH = RunAuthority(OPERATOR.pubkey(), RUN_INSTRUCTIONS, TREASURY)


def size(authority: RunAuthority, change: RunUpdate) -> int:
    return transaction_bytes(OPERATOR.pubkey(), authority.change(change))


@pytest.mark.parametrize(("authority", "count"), [(DIRECT, 2), (THROUGH, 2)])
def test_the_largest_changes_take_two_transactions(authority: RunAuthority, count: int) -> None:
    whole = replace(CHANGES[0], metadata=METADATA, client_version="v" * 96)
    assert size(authority, whole) > MAX_TRANSACTION_BYTES
    parts = in_parts(OPERATOR.pubkey(), CHANGES, authority.change)
    assert len(parts) == count
    assert all(size(authority, part) <= MAX_TRANSACTION_BYTES for part in parts)
    for field in fields(RunUpdate):
        given = [value for part in parts if (value := getattr(part, field.name)) is not None]
        assert given == [value for value in [getattr(whole, field.name)] if value is not None]


def test_everything_but_the_version_fits_at_once_where_there_is_no_treasury() -> None:
    """1189 and 1245 bytes, as measured with the real programs' layouts; each with a run's longest name."""
    both = replace(CHANGES[0], metadata=METADATA)
    assert size(DIRECT, both) <= MAX_TRANSACTION_BYTES < size(THROUGH, both)
    assert len(in_parts(OPERATOR.pubkey(), CHANGES[:2], DIRECT.change)) == 1
    assert len(in_parts(OPERATOR.pubkey(), CHANGES[:2], THROUGH.change)) == 2


def test_the_size_of_a_transaction_is_that_of_the_signed_one() -> None:
    from solders.hash import Hash
    from solders.message import Message
    from solders.transaction import Transaction

    made = DIRECT.change(CHANGES[1])
    message = Message.new_with_blockhash(made, OPERATOR.pubkey(), Hash.default())
    assert transaction_bytes(OPERATOR.pubkey(), made) == len(bytes(Transaction([OPERATOR], message, Hash.default())))
    assert isinstance(OPERATOR, Keypair)


# -- what differs ------------------------------------------------------------------------------------------------------


def account(**changed: object) -> CoordinatorAccount:
    made = CoordinatorTwin().account
    state = replace(made.state, coordinator=replace(dummy_run(), **changed), client_version="v1")  # type: ignore[arg-type]
    return replace(made, state=state)


def test_only_what_differs_is_sent() -> None:
    before = account()
    same = Settings(config=before.state.coordinator.config, model=before.state.coordinator.model, client_version="v1")
    assert changes_of(before, same) == []
    assert changes_of(before, replace(same, client_version="v2")) == [RunUpdate(client_version="v2")]
    (change,) = changes_of(before, Settings(description="about birds"))
    assert change.metadata == replace(before.state.metadata, description="about birds")


def test_a_step_to_go_on_with_names_its_data_too() -> None:
    (change,) = changes_of(account(), Settings(restart_from_step=4))
    assert change.progress is not None
    assert (change.progress.step, change.progress.epoch_start_data_index) == (
        4,
        3 * DUMMY_CONFIG.global_batch_size_start,
    )
    with pytest.raises(ConfigurationError, match="the steps 1 to 1000, and cannot go on with 0"):
        changes_of(account(), Settings(restart_from_step=0))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (P2P(HubRepo("a/b")), Hub(HubRepo("a/b"))),
        (DummyCheckpoint(HubRepo("a/b")), Hub(HubRepo("a/b"))),
        (P2PGcs(GcsRepo("a")), Gcs(GcsRepo("a"))),
    ],
)
def test_the_model_is_loaded_from_the_hub_again(before: Checkpoint, after: Checkpoint) -> None:
    held = account(model=replace(dummy_run().model, checkpoint=before))
    (change,) = changes_of(held, Settings(switch_to_hub=True))
    assert change.model == replace(dummy_run().model, checkpoint=after)
    assert changes_of(account(model=change.model), Settings(switch_to_hub=True)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(client_version="v" * 97), "at most 96 bytes"),
        (Settings(description="d" * 281), "cannot be said about a run"),
        (Settings(num_parameters=-1), "cannot be said about a run"),
    ],
)
def test_what_has_no_place_in_the_account_is_refused(settings: Settings, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        changes_of(account(), settings)
