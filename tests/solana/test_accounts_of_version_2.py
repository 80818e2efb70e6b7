"""Accounts in which each client has named the wallet that is paid, as Psyche's source had them for a day."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from typing_extensions import override

from distro_optim.coordinator.formats.account import (
    ClientsEpochRates,
    ClientsStateV2,
    CoordinatorAccountV2,
    SolanaClientV2,
    account_size,
    fresh_account,
    nonce_of,
    read_account,
    write_account,
)
from distro_optim.coordinator.solana.arguments import RunUpdate
from distro_optim.coordinator.solana.client import SolanaCoordinator
from distro_optim.coordinator.solana.instructions import RunInstructions, TreasurerInstructions
from distro_optim.coordinator.solana.participation import Participation
from distro_optim.coordinator.solana.program_errors import TREASURER_ERRORS_V2
from distro_optim.coordinator.solana.programs import (
    EVERYBODY,
    Programs,
    associated_token_account,
    default_treasurer_index,
)
from distro_optim.coordinator.solana.small_accounts import TokenAccount
from distro_optim.coordinator.solana_options import SolanaOptions
from distro_optim.coordinator.types import NodeIdentity, RunState
from distro_optim.errors import ConfigurationError, DistroError, ProtocolError
from distro_optim.operate.changing import ChangeOptions, change
from distro_optim.operate.localnet import LocalnetOptions, lines_to_type, make_cluster
from distro_optim.operate.looking import LookOptions, look
from distro_optim.testing.coordinator import DUMMY_CONFIG, close_all, training, witnessed_round
from distro_optim.testing.solana.transactions import Transaction
from solana.solana_arena import ANYBODY, OPERATOR, RUN, SOL, SolanaArena, in_arena, wallet

VERSION_2 = Programs(account_version=2)
MINT, CLAIMER = wallet(4000).pubkey(), wallet(4001)
CLIENTS_AT = 94424
"""Offset of what the chain keeps around the run; what is before is as in version 1."""

AROUND_SHA256 = "6113bf57a3f9a00d6213018da90607e85011077c2649ea2358a85a9e7295a5c8"
"""Of the bytes from there on in the account that PsycheFoundation/psyche kept for its own test,
``memnet_coordinator_data_layout.rs`` of commit baae0128 (2026-03-05)."""


def account_of_psyches_test() -> CoordinatorAccountV2:
    fresh = fresh_account(2)
    assert isinstance(fresh, CoordinatorAccountV2)
    client = SolanaClientV2(NodeIdentity(b"!" * 32, b"!" * 32), b"X" * 32, 424_242, 7_878, 63_473_857_845)
    rates = ClientsEpochRates(727_272, 7_272), ClientsEpochRates(424_242, 4_242)
    state = replace(
        fresh.state,
        clients_state=ClientsStateV2((client,) * 256, 63_473_857_845, *rates),
        is_warmup_first_tick=True,
        is_training_first_tick=True,
        client_version="my-client-version",
    )
    return replace(fresh, version=2, state=state, nonce=78_787_878)


def test_our_account_is_that_of_psyches_own_test() -> None:
    data = write_account(account_of_psyches_test())
    assert (len(data), account_size(2), nonce_of(data)) == (125_304, 125_304, 78_787_878)
    assert hashlib.sha256(data[CLIENTS_AT:]).hexdigest() == AROUND_SHA256
    assert read_account(data) == account_of_psyches_test()


def test_a_version_and_a_size_that_do_not_belong_together_are_refused() -> None:
    data = write_account(account_of_psyches_test())
    with pytest.raises(ProtocolError, match="version 1 and 125304 bytes"):
        read_account(data[:8] + b"\1" + data[9:])
    with pytest.raises(ConfigurationError, match="of version 3 are not known, only of 1 and 2"):
        account_size(3)


class ClaimedArena(SolanaArena):
    """Whose points a treasury pays; the third client has named another wallet for its own."""

    def __init__(self) -> None:
        super().__init__(None, VERSION_2, MINT)

    @override
    def client(self, number: int, run_id: str | None = None) -> SolanaCoordinator:
        return self.participant(number, run_id=run_id, claimer=CLAIMER.pubkey() if number == 2 else None)


# -- a run -------------------------------------------------------------------------------------------------------------


def treasury_of(arena: SolanaArena) -> TreasurerInstructions:
    index = default_treasurer_index(arena.run_id)
    return TreasurerInstructions(arena.validator.programs, index, MINT, arena.run_id, RUN.pubkey())


def tokens(arena: SolanaArena, owner: Pubkey) -> int:
    return TokenAccount.read(arena.validator.accounts[str(associated_token_account(owner, MINT))].data).amount


async def claim(arena: SolanaArena, folder: Path, keys: Keypair, user: Pubkey | None = None, version: int = 2) -> str:
    """What ``distro-optim run claim --yes`` says."""
    file = folder / "wallet.json"
    file.write_text(json.dumps(list(bytes(keys))))
    file.chmod(0o600)
    options = SolanaOptions(wallet=file, rpc=[arena.server.url], account_version=version)
    given = ChangeOptions(
        action="claim", run_id=arena.run_id, options=options, send=True, user=None if user is None else str(user)
    )
    return "\n".join(await change(given))


@pytest.mark.slow
@pytest.mark.waiting
def test_a_run_from_joining_to_claims(tmp_path: Path) -> None:
    """Two clients are paid themselves, the third has named another wallet."""

    async def check(arena: SolanaArena) -> None:
        treasury = treasury_of(arena)
        arena.process(
            treasury.update(OPERATOR.pubkey(), RunUpdate(epoch_earning_rate_total_shared=900)), payer=OPERATOR
        )
        arena.validator.give_tokens(MINT, treasury.treasury, 10_000)
        arena.validator.fund(CLAIMER.pubkey(), SOL)
        followers = await training(arena)
        arena.validator.advance(DUMMY_CONFIG.epoch_time)
        while arena.state.run_state is not RunState.COOLDOWN:
            await witnessed_round(arena, followers, [follower.client.identity for follower in followers])
        await arena.advance(DUMMY_CONFIG.cooldown_time)
        await close_all(followers)

        first, _, last = (Pubkey.from_bytes(client.identity.signer) for client in arena.clients)
        known = arena.account.state.clients_state.clients
        assert [(client.earned, client.claimer) for client in known] == [
            (300, known[0].id.signer),
            (300, known[1].id.signer),
            (300, bytes(CLAIMER.pubkey())),
        ]
        with pytest.raises(DistroError, match="has version 2, and version 1 is selected: give --account-version 2"):
            await claim(arena, tmp_path, wallet(1), version=1)
        assert "claim 300 of 300 points" in await claim(arena, tmp_path, wallet(1))
        assert tokens(arena, first) == 300
        with pytest.raises(ConfigurationError, match=f"paid to {CLAIMER.pubkey()}, and this wallet is {last}"):
            await claim(arena, tmp_path, wallet(3))
        with pytest.raises(ConfigurationError, match=f"it is paid for the points of {last}: name one with --user"):
            await claim(arena, tmp_path, CLAIMER)
        assert "claim 300 of 300 points" in await claim(arena, tmp_path, CLAIMER, last)
        assert tokens(arena, CLAIMER.pubkey()) == 300
        assert "nothing is to be done" in await claim(arena, tmp_path, CLAIMER, last)

        notes: list[str] = []
        await arena.participant(2, on_note=notes.append).join()
        assert notes == [
            f"the points of {last} in the run dummy are paid to {CLAIMER.pubkey()}, as when it first joined, not to "
            f"{last}"
        ]
        entry = arena.account.state.clients_state.clients[2]
        assert entry.id in arena.account.state.clients_state.pending()
        assert entry.claimer == bytes(CLAIMER.pubkey())

    in_arena(check, ClaimedArena())


def test_the_treasurer_refuses_what_the_claimer_did_not_sign() -> None:
    arena = ClaimedArena()
    treasury, run, payer = treasury_of(arena), arena.instructions, ANYBODY.pubkey()
    mine, other, stranger = wallet(3), CLAIMER, wallet(77)
    everybody = arena.validator.programs.authorization(OPERATOR.pubkey(), EVERYBODY)
    for keys in (mine, other, stranger):
        arena.validator.fund(keys.pubkey(), SOL)
        arena.validator.give_tokens(MINT, keys.pubkey(), 1)
    join = run.join(NodeIdentity(bytes(mine.pubkey()), bytes(32)), everybody, claimer=other.pubkey())
    arena.process(join, payer=mine)
    for user in (mine, stranger):
        arena.process(treasury.create_participant(payer, user.pubkey()))

    def refusal(claim: Instruction, payer: Keypair) -> str | None:
        return arena.validator.process(Transaction(payer.pubkey(), [claim])).error

    names = "ParticipantClientNotFound", "ClaimerSignerMismatch", "ClaimedPointsExceedEarnedPoints"
    assert [6000 + TREASURER_ERRORS_V2.index(name) for name in names] == [6001, 6002, 6003]
    assert refusal(treasury.claim(stranger.pubkey(), 1), stranger) == "InstructionError(0, Custom(6001))"
    assert refusal(treasury.claim(mine.pubkey(), 0), mine) == "InstructionError(0, Custom(6002))"
    assert (
        refusal(treasury.claim(mine.pubkey(), 1, claimer=other.pubkey()), other) == "InstructionError(0, Custom(6003))"
    )
    assert refusal(treasury.claim(mine.pubkey(), 0, claimer=other.pubkey()), other) is None


def test_programs_of_the_other_version_do_not_take_a_join() -> None:
    for selected, actual in ((Programs(), VERSION_2), (VERSION_2, Programs())):
        arena = SolanaArena(None, actual)
        run = RunInstructions(selected, arena.run_id, RUN.pubkey())
        arena.validator.fund(wallet(3).pubkey(), SOL)
        everybody = actual.authorization(OPERATOR.pubkey(), EVERYBODY)
        join = run.join(NodeIdentity(bytes(wallet(3).pubkey()), bytes(32)), everybody)
        outcome = arena.validator.process(Transaction(wallet(3).pubkey(), [join]))
        # A program of version 1 passes over what follows the arguments that it knows.
        assert outcome.error == ("InstructionError(0, Custom(102))" if actual is VERSION_2 else None)


@pytest.mark.waiting
@pytest.mark.parametrize(("selected", "actual"), [(1, 2), (2, 1)])
def test_an_account_of_the_version_that_was_not_selected_is_refused_before_anything_is_paid(
    selected: int, actual: int
) -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.participant(1)
        client.programs = replace(client.programs, account_version=selected)
        words = f"has version {actual}, and version {selected} is selected: give --account-version {actual}, or"
        with pytest.raises(ProtocolError, match=words) as caught:
            await client.join()
        assert "\n" not in str(caught.value)
        assert client.fees.spent == 0
        (shown,) = await look(LookOptions(arena.run_id, SolanaOptions(rpc=[arena.server.url])))
        assert f"account version      {actual}" in shown

    in_arena(check, SolanaArena(None, Programs(account_version=actual)))


@pytest.mark.waiting
def test_a_run_is_made_in_the_version_that_is_selected(tmp_path: Path) -> None:
    async def check(arena: SolanaArena) -> None:
        file = tmp_path / "wallet.json"
        file.write_text(json.dumps(list(bytes(OPERATOR))))
        file.chmod(0o600)
        options = SolanaOptions(wallet=file, rpc=[arena.server.url], programs="psyche-claimers")
        said = await change(ChangeOptions(action="create", run_id="mine", options=options, send=True))
        assert "0.87510168 SOL stay in it" in said[0]
        assert arena.validator.run("mine").version == 2
        with pytest.raises(ConfigurationError, match="of version 0 are not known, only of 1 and 2"):
            await change(ChangeOptions(action="create", run_id="old", options=replace(options, programs="psyche-2025")))

    in_arena(check, SolanaArena(None, VERSION_2))


def test_a_claimer_needs_version_2(tmp_path: Path) -> None:
    file = tmp_path / "wallet.json"
    file.write_text(json.dumps(list(bytes(OPERATOR))))
    file.chmod(0o600)
    claimer = str(CLAIMER.pubkey())
    with pytest.raises(ConfigurationError, match="only in runs whose account has version 2, and version 1 is selected"):
        Participation("run", SolanaOptions(wallet=file, claimer=claimer))
    with pytest.raises(ConfigurationError, match="claimer is 'me'"):
        Participation("run", SolanaOptions(wallet=file, claimer="me", account_version=2))
    Participation("run", SolanaOptions(wallet=file, claimer=claimer, programs="psyche-claimers"))


def test_a_cluster_to_try_has_either_version(tmp_path: Path) -> None:
    options = LocalnetOptions(folder=tmp_path, account_version=2)
    made = make_cluster(options)
    assert made.validator.run("local").version == 2
    typed = [line for line in lines_to_type(options, "http://127.0.0.1:1", made) if "--account-version 2" in line]
    assert [word for line in typed for word in ("join", "claim", "create") if f" {word} " in line] == [
        *("join", "join", "claim", "create")
    ]
    with pytest.raises(ConfigurationError, match="of version 3 are not known"):
        make_cluster(LocalnetOptions(folder=tmp_path / "other", account_version=3))
