"""A cluster that loses, delays, doubles and takes back: the run goes on, or says in one sentence why not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from solders.pubkey import Pubkey

from distro_optim.coordinator.solana.client import SolanaCoordinator
from distro_optim.coordinator.solana.feed import AccountFeed
from distro_optim.coordinator.solana.fees import KEPT_IN_A_WALLET, NEEDED_TO_BEGIN
from distro_optim.coordinator.types import RunState, Witness, WitnessProof
from distro_optim.errors import PaymentError
from distro_optim.strategy.network.runtime import _lost
from distro_optim.testing.coordinator import Follower, joined, metadata, report, training, until_true, witnessed_round
from distro_optim.testing.solana.ledger import Account
from distro_optim.testing.solana.validator import BLOCKHASHES
from solana.solana_arena import SolanaArena, in_arena, wallet

pytestmark = [pytest.mark.waiting]


async def one_round(arena: SolanaArena) -> list[Follower]:
    """Three clients from their join to the second round."""
    followers = await training(arena)
    await witnessed_round(arena, followers, [follower.client.identity for follower in followers])
    return followers


def test_answers_that_are_lost_after_the_transaction_was_taken() -> None:
    async def check(arena: SolanaArena) -> None:
        arena.server.faults.lost_answers = 4
        arena.server.faults.lost_methods = frozenset({"sendTransaction", "getSignatureStatuses"})
        followers = await joined(arena, 1)
        (client,) = arena.clients
        assert arena.server.faults.happened == ["lost"] * 4
        assert arena.account.nonce == 2  # it was taken once
        assert client.fees.transactions == 1
        await followers[0].client.close()

    in_arena(check)


@pytest.mark.parametrize("fault", ["too_many_requests", "server_errors", "unknown_blockhashes"])
def test_a_node_that_is_busy_or_behind(fault: str) -> None:
    async def check(arena: SolanaArena) -> None:
        setattr(arena.server.faults, fault, 3)
        await joined(arena, 1)
        assert len(arena.server.faults.happened) == 3
        assert len(arena.account.state.clients_state.clients) == 1

    in_arena(check)


def test_slow_confirmation() -> None:
    async def check(arena: SolanaArena) -> None:
        arena.server.methods.unconfirmed_polls = 6
        await joined(arena, 1)
        assert arena.server.requests["getSignatureStatuses"] == 7
        assert arena.server.requests["sendTransaction"] == 2  # the same bytes again, which were taken already
        assert arena.account.nonce == 2

    in_arena(check)


def test_a_blockhash_that_grows_old_on_the_way() -> None:
    """The transaction is signed with another one, and the cluster takes it once."""

    async def check(arena: SolanaArena) -> None:
        followers = await training(arena)
        client = arena.clients[0]
        arena.validator.advance_blocks(BLOCKHASHES)
        await followers[0].client.witness(report(followers[0].proof(), []), metadata(1))
        await until_true(lambda: len(arena.state.current_round.witnesses) == 1)
        await until_true(lambda: client.fees.transactions == 3)

    in_arena(check)


@pytest.mark.parametrize("fault", ["doubled", "reversed_pairs", "silent"])
def test_notifications_that_are_doubled_out_of_order_or_missing(fault: str) -> None:
    async def check(arena: SolanaArena) -> None:
        arena.ticks = False
        setattr(arena.server.faults, fault, True)
        clients = [arena.participant(number, poll_seconds=0.05) for number in range(3)]
        followers = [Follower(client) for client in clients]
        for client in clients:
            await client.join()
        await arena.advance(3)
        heights: list[int] = []
        for follower in followers:
            await follower.in_phase(RunState.WARMUP)
            index = follower.index()
            await follower.client.warmup_witness(Witness(WitnessProof(index, index, False)))
        for follower in followers:
            state = await follower.in_phase(RunState.ROUND_TRAIN)
            heights.append(state.current_round.height)
        assert heights == [0, 0, 0]

    in_arena(check)


def test_a_phase_that_was_never_seen() -> None:
    """A reader that was away sees the newest state alone."""

    async def check(arena: SolanaArena) -> None:
        followers = await training(arena)
        arena.server.faults.held = True
        for follower in followers:
            await follower.client.witness(report(follower.proof(), []), metadata(1))
        await until_true(lambda: arena.state.run_state is RunState.ROUND_WITNESS)
        await arena.advance(3)
        client = arena.clients[0]
        await until_true(lambda: client.fees.transactions == 3)
        arena.server.release()
        state = await followers[0].until(lambda state: state.progress.step == 2)
        assert state.run_state is RunState.ROUND_TRAIN

    in_arena(check)


def test_websockets_that_drop_are_opened_again_and_the_account_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.client(1)
        await client.join()
        feed = client._feed
        assert feed is not None
        feed._first_pause = 0.01
        await until_true(lambda: feed.subscribed == 1)
        opened: list[str] = []
        listen = feed._listen

        def noted(url: str) -> AsyncIterator[None]:
            opened.append(url)
            return listen(url)

        monkeypatch.setattr(feed, "_listen", noted)
        await arena.server.drop_websockets()
        arena.process(arena.instructions.tick(Pubkey.from_bytes(client.identity.signer)))
        await until_true(lambda: bool(opened) and feed.subscribed == 1)
        await until_true(lambda: client.account is not None and client.account.nonce == arena.account.nonce)

    in_arena(check)


def test_a_node_that_lags_behind_does_not_turn_back_the_time() -> None:
    async def check(arena: SolanaArena) -> None:
        (follower,) = await joined(arena, 1)
        client = arena.clients[0]
        feed = client._feed
        assert feed is not None
        await until_true(lambda: feed.subscribed == 1)  # what came before would be read only, and reads lag
        arena.server.lag()
        arena.validator.advance(1)
        arena.process(arena.instructions.tick(Pubkey.from_bytes(client.identity.signer)))
        await until_true(lambda: client.account is not None and client.account.nonce == 3)
        await client._read()
        assert client.account is not None
        assert client.account.nonce == 3
        assert follower.client.state == arena.state

    in_arena(check)


def test_what_happens_before_the_subscription_at_a_node_that_lags_is_seen_once_the_node_has_caught_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check(arena: SolanaArena) -> None:
        may_subscribe = asyncio.Event()
        listen = AccountFeed._listen

        async def late(feed: AccountFeed, url: str) -> AsyncIterator[None]:
            await may_subscribe.wait()
            async for part in listen(feed, url):
                yield part

        monkeypatch.setattr(AccountFeed, "_listen", late)
        arena.poll_seconds = 0.02
        (follower,) = await joined(arena, 1)
        client = arena.clients[0]
        feed = client._feed
        assert feed is not None
        arena.server.lag()
        arena.validator.advance(1)
        arena.process(arena.instructions.tick(Pubkey.from_bytes(client.identity.signer)))
        may_subscribe.set()
        await until_true(lambda: feed.subscribed == 1)
        await client._read()
        assert client.account is not None
        assert client.account.nonce == 2
        arena.server.catch_up()
        await until_true(lambda: client.account is not None and client.account.nonce == 3)
        assert follower.client.state == arena.state

    in_arena(check)


def test_what_was_confirmed_and_is_taken_back() -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.client(1)
        before = arena.validator.snapshot()
        await client.join()
        assert client.account is not None
        assert client.account.nonce == 2
        arena.validator.restore(before)
        arena.validator.advance(1)
        await client._read()
        # It sees that the run does not count on it any more, and joins again.
        await until_true(lambda: arena.account.state.clients_state.pending() == (client.identity,))

    in_arena(check)


def test_who_is_cut_short_while_it_closes_leaves_no_connection_behind() -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.client(1)
        await client.join()
        session = await client._rpc.session()
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert session.closed

    in_arena(check)


def test_a_wallet_that_runs_out_of_money() -> None:
    async def check(arena: SolanaArena) -> None:
        followers = await training(arena)
        client = arena.clients[0]
        key = str(Pubkey.from_bytes(client.identity.signer))
        del arena.validator.accounts[key]
        await client.witness(report(followers[0].proof(), []), metadata(1))
        with pytest.raises(PaymentError, match=f"the wallet {key} cannot pay any more") as caught:
            await followers[0].until(lambda state: False)
        assert str(_lost(caught.value, is_host=False)).startswith(
            f"money has run out: the wallet {key} cannot pay any more: put at least 0.00091088 SOL into it, then start "
            "again with the same run"
        )

    in_arena(check)


def test_a_wallet_that_does_not_last_for_the_next_epoch_is_told_when_this_one_begins() -> None:
    async def check(arena: SolanaArena) -> None:
        notes: list[str] = []
        client = arena.participant(0, lamports=NEEDED_TO_BEGIN, on_note=notes.append)
        others = [arena.client(number) for number in (1, 2)]
        for each in (client, *others):
            await each.join()
        assert not notes
        arena.validator.accounts[str(wallet(1).pubkey())] = Account(KEPT_IN_A_WALLET + 9_000)
        await arena.advance(4)
        assert arena.state.run_state is RunState.WARMUP
        await until_true(lambda: bool(notes))
        assert notes == [
            "the wallet holds 0.00089988 SOL, of which 0.00089088 SOL must stay in it, and an epoch costs about "
            "0.000005 SOL: it does not last for the next one"
        ]

    in_arena(check)


def test_fees_end_at_their_limit() -> None:
    async def check(arena: SolanaArena) -> None:
        client = arena.participant(0, max_fees=9_000)
        await client.join()
        await client.warmup_witness(Witness(WitnessProof(0, 0, False)))
        with pytest.raises(PaymentError, match=r"has cost 0\.000005 SOL") as caught:
            async for _ in client.states():
                pass
        assert "raise max_fees, then start again" in str(_lost(caught.value, is_host=False))

    in_arena(check)


def test_the_clients_are_the_clock_of_the_run() -> None:
    """Nobody else sends a tick."""

    async def check(arena: SolanaArena) -> None:
        clients: list[SolanaCoordinator] = [arena.participant(number, ticks=True) for number in range(3)]
        followers = [Follower(client) for client in clients]
        for client in clients:
            await client.join()
        arena.validator.advance(4)
        for follower in followers:
            await follower.in_phase(RunState.WARMUP)
        arena.validator.advance(11)
        for follower in followers:
            await follower.in_phase(RunState.ROUND_TRAIN)
        ticks = arena.account.nonce - 1 - len(clients)
        assert 2 <= ticks <= 2 * len(clients)  # one of them in each phase, or several at once

    in_arena(check)
