"""Whatever speaks against a join is said in one sentence, before anything is paid."""

from __future__ import annotations

from dataclasses import replace

import pytest
from solders.pubkey import Pubkey

from distro_optim.coordinator.formats.account import ACCOUNT_SIZE, CoordinatorAccount, SolanaClient
from distro_optim.coordinator.solana import client as client_module
from distro_optim.coordinator.solana.client import SolanaCoordinator
from distro_optim.coordinator.solana.fees import FEE_PER_SIGNATURE, KEPT_IN_A_WALLET
from distro_optim.coordinator.solana.instructions import AuthorizerInstructions
from distro_optim.coordinator.solana.programs import EVERYBODY, Programs
from distro_optim.coordinator.types import NodeIdentity, RunState
from distro_optim.errors import ConfigurationError, CoordinatorLinkError, JoinRefusedError, PaymentError, ProtocolError
from distro_optim.testing import dummy_run
from distro_optim.testing.coordinator import Follower, until_true
from distro_optim.testing.solana.ledger import encoded, rent
from solana.solana_arena import ANYBODY, OPERATOR, RUN, SOL, SolanaArena, in_arena, wallet

pytestmark = [pytest.mark.waiting]


def change(arena: SolanaArena, account: CoordinatorAccount) -> None:
    """Puts another state into the run's account."""
    key = str(RUN.pubkey())
    arena.validator.accounts[key] = replace(arena.validator.accounts[key], data=encoded(account))


async def refused(arena: SolanaArena, client: SolanaCoordinator, words: str) -> CoordinatorLinkError:
    """The error of a join, which costs nothing."""
    before = arena.validator.balance(Pubkey.from_bytes(client.identity.signer))
    with pytest.raises((CoordinatorLinkError, ProtocolError), match=words) as caught:
        await client.join()
    assert "\n" not in str(caught.value)
    assert arena.validator.balance(Pubkey.from_bytes(client.identity.signer)) == before
    assert not arena.account.state.clients_state.clients
    return caught.value  # type: ignore[return-value]


def test_a_run_that_is_not_there() -> None:
    async def check(arena: SolanaArena) -> None:
        error = await refused(arena, arena.client(1, run_id="nothing"), "there is no run 'nothing' at http://127.0.0.1")
        assert isinstance(error, JoinRefusedError)

    in_arena(check)


def test_the_programs_of_another_deployment() -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.client(1)
        client.programs = Programs(coordinator=wallet(5).pubkey())
        await refused(arena, client, "is this the cluster and the program of the run")

    in_arena(check)


@pytest.mark.parametrize("run_id", ["", "x" * 33])
def test_a_name_that_no_run_can_have(run_id: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 32"):
        SolanaCoordinator(["http://localhost"], [], wallet(1), run_id)


@pytest.mark.parametrize("authority", ["join", "main"])
def test_a_run_of_somebody_else(authority: str) -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.client(1)
        setattr(client, f"_{authority}_authority", wallet(9).pubkey())
        await refused(arena, client, f"belongs to somebody else: its {authority} authority is {OPERATOR.pubkey()}, not")

    in_arena(check)


def test_an_account_of_another_version() -> None:
    async def check(arena: SolanaArena) -> None:
        key = str(RUN.pubkey())
        account = arena.validator.accounts[key]
        arena.validator.accounts[key] = replace(account, data=account.data[:8] + b"\2" + account.data[9:])
        client = arena.client(1)
        with pytest.raises(ProtocolError, match="another version of Psyche's program"):
            await client.join()

    in_arena(check)


@pytest.mark.parametrize("size", [0, 119_072, ACCOUNT_SIZE + 1])
def test_an_account_of_another_size(size: int) -> None:
    """119,072 bytes had it before December 2025."""

    async def check(arena: SolanaArena) -> None:
        key = str(RUN.pubkey())
        account = arena.validator.accounts[key]
        arena.validator.accounts[key] = replace(account, data=account.data.ljust(size, b"\0")[:size])
        client = arena.client(1)
        with pytest.raises(
            ProtocolError, match=f"has {size} bytes,.* not 119160 .*: it is of another version"
        ) as caught:
            await client.join()
        assert "\n" not in str(caught.value)
        assert client.fees.spent == 0

    in_arena(check)


def test_a_run_that_256_wallets_have_joined_is_full_for_good() -> None:
    async def check(arena: SolanaArena) -> None:
        account = arena.account
        wide = replace(account.state.coordinator.config, global_batch_size_start=400, global_batch_size_end=400)
        known = tuple(
            SolanaClient(NodeIdentity(number.to_bytes(32, "little"), bytes(32)), bytes(8), 0, 0, 0)
            for number in range(256)
        )
        clients = replace(account.state.clients_state, clients=known)
        run = replace(account.state.coordinator, config=wide)
        change(arena, replace(account, state=replace(account.state, coordinator=run, clients_state=clients)))
        client = arena.client(1)
        with pytest.raises(JoinRefusedError, match="is full for good: 256 wallets have joined it"):
            await client.join()
        assert client.fees.spent == 0

    in_arena(check)


def test_a_run_that_is_finished() -> None:
    async def check(arena: SolanaArena) -> None:
        await refused(arena, arena.client(1), "is finished")

    in_arena(check, SolanaArena(replace(dummy_run(), run_state=RunState.FINISHED)))


def test_a_run_with_as_many_wallets_as_its_batches_have_sequences() -> None:
    async def check(arena: SolanaArena) -> None:
        authorization = arena.validator.programs.authorization(OPERATOR.pubkey(), EVERYBODY)
        for number in range(8):
            key = wallet(2000 + number)
            arena.validator.fund(key.pubkey(), SOL)
            member = NodeIdentity(bytes(key.pubkey()), bytes(32))
            arena.process(arena.instructions.join(member, authorization), payer=key)
        with pytest.raises(JoinRefusedError, match="as many wallets have joined it as a batch has sequences, 8"):
            await arena.client(1).join()

    in_arena(check)


def test_a_wallet_without_money() -> None:
    async def check(arena: SolanaArena) -> None:
        await refused(arena, arena.participant(1, lamports=0), "holds 0 SOL at http://127.0.0.1")

    in_arena(check)


def test_a_wallet_whose_money_cannot_be_spent() -> None:
    """What must stay in a wallet pays no fee."""

    async def check(arena: SolanaArena) -> None:
        needed = KEPT_IN_A_WALLET + 4 * FEE_PER_SIGNATURE
        poor = arena.participant(1, lamports=needed - 1)
        error = await refused(arena, poor, r"begins with 0\.00091088 SOL: put at least 0\.000000001 SOL into it")
        assert isinstance(error, PaymentError)
        rich_enough = arena.participant(2, lamports=needed)
        await rich_enough.join()
        assert arena.account.state.clients_state.pending() == (rich_enough.identity,)

    assert rent(0) == KEPT_IN_A_WALLET
    in_arena(check)


def close_the_door(arena: SolanaArena) -> AuthorizerInstructions:
    """Nobody is let in but who is authorized from now on."""
    everybody = AuthorizerInstructions(arena.validator.programs, OPERATOR.pubkey(), EVERYBODY)
    arena.process(everybody.set_active(False), payer=OPERATOR)
    return AuthorizerInstructions(arena.validator.programs, OPERATOR.pubkey(), wallet(50).pubkey())


def test_a_wallet_that_nobody_has_authorized() -> None:
    async def check(arena: SolanaArena) -> None:
        close_the_door(arena)
        client = arena.client(1)
        error = await refused(arena, client, "there is no authorization for it")
        assert str(Pubkey.from_bytes(client.identity.signer)) in str(error)

    in_arena(check)


def test_a_wallet_whose_own_authorization_is_not_active() -> None:
    async def check(arena: SolanaArena) -> None:
        close_the_door(arena)
        own = AuthorizerInstructions(arena.validator.programs, OPERATOR.pubkey(), wallet(2).pubkey())
        arena.process(own.create(OPERATOR.pubkey()), payer=OPERATOR)
        client = arena.participant(1)
        assert client.identity.signer == bytes(wallet(2).pubkey())
        await refused(arena, client, "its authorization is not active")

    in_arena(check)


def test_a_delegate_names_the_key_that_has_authorized_it() -> None:
    async def check(arena: SolanaArena) -> None:
        mine = close_the_door(arena)
        arena.process(mine.create(OPERATOR.pubkey()), mine.set_active(True), payer=OPERATOR)
        arena.validator.fund(wallet(50).pubkey(), SOL)
        client = arena.participant(1, authorizer=wallet(50).pubkey())
        await refused(arena, client, "there is no authorization for it")
        me = Pubkey.from_bytes(client.identity.signer)
        arena.process(mine.delegate(wallet(50).pubkey(), [me]), payer=wallet(50))
        again = arena.participant(1, authorizer=wallet(50).pubkey())
        await again.join()
        assert arena.account.state.clients_state.pending() == (again.identity,)

    in_arena(check)


def test_a_paused_run_is_joined_as_soon_as_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.client(1)
        await client.join()
        assert "is paused; we join it as soon as it goes on" in caplog.text
        assert not arena.account.state.clients_state.clients
        account = arena.account
        resumed = replace(account.state.coordinator, run_state=RunState.WAITING_FOR_MEMBERS)
        change(arena, replace(account, state=replace(account.state, coordinator=resumed), nonce=account.nonce + 1))
        arena.process(arena.instructions.tick(ANYBODY.pubkey()))
        await Follower(client).in_phase(RunState.WAITING_FOR_MEMBERS)
        await until_true(lambda: arena.account.state.clients_state.pending() == (client.identity,))

    in_arena(check, SolanaArena(replace(dummy_run(), run_state=RunState.PAUSED)))


def test_who_was_locked_out_is_in_again_when_the_door_opens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing else happens in a run that waits for its members, so that no news would remind the client."""
    monkeypatch.setattr(client_module, "CLOCK_SECONDS", 0.01)

    async def check(arena: SolanaArena) -> None:
        client = arena.client(1)
        await client.join()
        close_the_door(arena)
        account = arena.account
        later = replace(account.state.clients_state, next_active=account.state.clients_state.next_active + 1)
        change(arena, replace(account, state=replace(account.state, clients_state=later), nonce=account.nonce + 1))
        arena.process(arena.instructions.tick(ANYBODY.pubkey()))
        await until_true(lambda: "join was not taken" in caplog.text)
        spent = client.fees.spent
        everybody = AuthorizerInstructions(arena.validator.programs, OPERATOR.pubkey(), EVERYBODY)
        arena.process(everybody.set_active(True), payer=OPERATOR)
        await until_true(lambda: arena.account.state.clients_state.pending() == (client.identity,))
        assert client.fees.spent == spent + FEE_PER_SIGNATURE  # what is refused costs nothing

    in_arena(check)
