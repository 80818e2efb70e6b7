"""``distro-optim run create --treasurer-collateral-mint`` to ``claim``: points become tokens, one for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from client.processes import DISTRO, write_state
from distro_optim.coordinator.formats.account import SolanaClient
from distro_optim.coordinator.solana.programs import associated_token_account
from distro_optim.coordinator.solana.small_accounts import (
    INSTANCE_BYTES,
    PARTICIPANT_BYTES,
    TOKEN_ACCOUNT_BYTES,
    TREASURY_BYTES,
    CoordinatorInstance,
    TokenAccount,
    read_small_account,
)
from distro_optim.coordinator.solana.treasury import shown_tokens
from distro_optim.coordinator.types import NodeIdentity, RunState
from distro_optim.testing import Validator, dummy_run
from distro_optim.testing.solana.ledger import encoded, rent
from solana.cluster import Cluster, Command
from solana.solana_arena import ANYBODY, OPERATOR, SOL, wallet

pytestmark = pytest.mark.waiting

MINT, WORKER = wallet(4000).pubkey(), wallet(4001)
ACCOUNT_BYTES = 119_160


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """A run with a treasury, of which the wallet of OPERATOR has the tokens."""
    validator = Validator()
    for key in (OPERATOR, ANYBODY, WORKER):
        validator.fund(key.pubkey(), 2 * SOL)
    validator.give_tokens(MINT, OPERATOR.pubkey(), 5_000_000)
    with Cluster(validator) as cluster:
        command = Command(cluster, tmp_path, capsys)
        command("create", "--treasurer-collateral-mint", str(MINT), "--yes")
        yield command


def treasury_of(validator: Validator) -> Pubkey:
    data = validator.accounts[str(validator.programs.instance("mine"))].data
    return Pubkey.from_bytes(read_small_account(CoordinatorInstance, data).main_authority)


def tokens(validator: Validator, owner: Pubkey) -> int:
    return TokenAccount.read(validator.accounts[str(associated_token_account(owner, MINT))].data).amount


def earn(validator: Validator, keys: Keypair, points: int) -> None:
    """As if the wallet had trained."""
    instance = read_small_account(
        CoordinatorInstance, validator.accounts[str(validator.programs.instance("mine"))].data
    )
    address = str(Pubkey.from_bytes(instance.coordinator_account))
    account = validator.run("mine")
    member = SolanaClient(NodeIdentity(bytes(keys.pubkey()), bytes(32)), bytes(8), points, 0, 0)
    clients = replace(account.state.clients_state, clients=(member,))
    data = encoded(replace(account, state=replace(account.state, clients_state=clients)))
    validator.accounts[address] = replace(validator.accounts[address], data=data)


def test_what_a_treasury_costs_is_said_before(run: Command) -> None:
    made = sum(rent(size) for size in (ACCOUNT_BYTES, INSTANCE_BYTES, TREASURY_BYTES, TOKEN_ACCOUNT_BYTES))
    validator = run.cluster.validator
    assert validator.balance(OPERATOR.pubkey()) == 2 * SOL - made - 10_000
    mint = ("--treasurer-collateral-mint", str(MINT))
    assert "there is a run 'mine' already" in run("create", *mint, status=2)
    assert "costs 0.00001 SOL, and 0.8366616 SOL stay in it for good" in run("create", *mint, name="other")
    assert made == 836_661_600
    index = str(2**64 - 1)
    assert "with the treasury" in run("create", *mint, "--treasurer-index", index, "--yes", name="other")
    assert f"a treasury with the number {index} already" in run(
        "create", *mint, "--treasurer-index", index, name="third", status=2
    )
    assert "only if there is one" in run("create", "--treasurer-index", "3", name="third", status=2)
    worthless = str(ANYBODY.pubkey())
    said = run("create", "--treasurer-collateral-mint", worthless, name="third", status=2)
    assert f"{worthless} is no mint of tokens at http://127.0.0.1" in said


@pytest.mark.slow
def test_its_operator_changes_the_run_through_the_treasury(run: Command, tmp_path: Path) -> None:
    validator = run.cluster.validator
    treasury = treasury_of(validator)
    toml = write_state(tmp_path / "state.toml", checkpoint='{ Hub = { repo_id = "a/b" } }', optimizer=DISTRO)
    assert "the operator of the run 'mine' is" in run("pause", "--yes", status=2, keys=ANYBODY)
    said = run("configure", str(toml), "--name", "Mine", "--client-version", "v2", "--yes")
    assert "set metadata, config, model, client version: costs 0.000005 SOL" in said.replace(
        "what people read about it", "metadata"
    )
    assert "nothing is to be done" in run("configure", str(toml), "--name", "Mine", "--client-version", "v2", "--yes")
    run("rates", "1000", "--slashing", "10", "--yes")
    run("resume", "--yes")
    state = validator.run("mine").state
    assert state.coordinator.run_state is RunState.WAITING_FOR_MEMBERS
    assert (state.metadata.name, state.client_version) == ("Mine", "v2")
    rates = state.clients_state.future_epoch_rates
    assert (rates.earning_rate_total_shared, rates.slashing_rate_per_client) == (1000, 10)
    run("pause", "--yes")
    said = run("close", "--yes", status=2)
    assert f"the run 'mine' has a treasury, {treasury}, and no program of Psyche's closes such a run" in said


@pytest.mark.slow
def test_points_are_claimed_as_far_as_the_tokens_go(run: Command) -> None:
    validator = run.cluster.validator
    assert f"the wallet {WORKER.pubkey()} has never joined the run 'mine'" in run("claim", keys=WORKER, status=2)
    earn(validator, WORKER, 1_777)
    said = run("claim", keys=WORKER, status=2)
    assert "has earned 1777 points and claimed 0 of them, and the treasury has tokens for 0: 0 can be claimed" in said

    assert "give 0.001 tokens" in run("fund", "1000")
    run("fund", "1000", "--yes")
    assert tokens(validator, treasury_of(validator)) == 1000
    before = validator.balance(WORKER.pubkey())
    planned = run("claim", keys=WORKER)
    assert f"claim 1000 of 1777 points, for 0.001 tokens of {MINT}: costs 0.000005 SOL, and" in planned
    assert "in all 0.00315788 SOL of the 2 SOL in the wallet, where 0.00089088 SOL must stay" in planned
    assert validator.balance(WORKER.pubkey()) == before
    run("claim", "--yes", keys=WORKER)
    assert tokens(validator, WORKER.pubkey()) == 1000
    made = rent(TOKEN_ACCOUNT_BYTES) + rent(PARTICIPANT_BYTES)
    assert validator.balance(WORKER.pubkey()) == before - made - 5000

    run("fund", "4000", "--yes")
    assert "777 can be claimed now" in run("claim", "--points", "778", keys=WORKER, status=2)
    assert "cost" in run("claim", "--points", "77", "--yes", keys=WORKER)
    run("claim", "--yes", keys=WORKER)
    assert tokens(validator, WORKER.pubkey()) == 1777
    assert tokens(validator, treasury_of(validator)) == 5000 - 1777
    assert "nothing is to be done" in run("claim", "--yes", keys=WORKER)
    assert "with tokens for 3223 points" in run("show", wallet=False)


def test_a_wallet_that_shares_its_tokens_is_not_paid(run: Command) -> None:
    validator = run.cluster.validator
    earn(validator, WORKER, 5)
    run("fund", "5", "--yes")
    validator.give_tokens(MINT, WORKER.pubkey(), 1)
    key = str(associated_token_account(WORKER.pubkey(), MINT))
    data = validator.accounts[key].data
    validator.accounts[key] = replace(validator.accounts[key], data=data[:72] + b"\1" + data[73:])
    assert "has another owner or a delegate: revoke that first" in run("claim", keys=WORKER, status=2)


def test_a_run_that_names_the_treasury_of_another_is_refused(run: Command) -> None:
    validator = run.cluster.validator
    account = wallet(4002).pubkey()
    validator.host(dummy_run("false"), account, main_authority=treasury_of(validator), join_authority=account)
    assert "that the run 'false' names is that of another" in run("claim", keys=WORKER, name="false", status=1)


def test_who_has_no_tokens_gives_none(run: Command) -> None:
    assert "holds 0 base units" in run("fund", "1", keys=ANYBODY, status=2)
    assert "cannot give 0" in run("fund", "0", status=2)


def test_a_run_without_a_treasury_pays_nobody(run: Command) -> None:
    run("create", "--yes", name="free")
    for action in (["claim"], ["fund", "1"]):
        assert "the run 'free' has no treasury: its points are counted" in run(*action, name="free", status=2)


@pytest.mark.parametrize(
    ("units", "decimals", "text"), [(0, 6, "0"), (1_500_000, 6, "1.5"), (7, 0, "7"), (10, 6, "0.00001")]
)
def test_tokens_are_shown_without_rounding(units: int, decimals: int, text: str) -> None:
    assert shown_tokens(units, decimals) == text
