"""A client pays for one join an epoch, one report a round, and its share of about two ticks a phase."""

from __future__ import annotations

import asyncio

import pytest
from solders.pubkey import Pubkey

from distro_optim.coordinator.types import RunState, Witness, WitnessProof
from distro_optim.testing.coordinator import DUMMY_CONFIG, Follower, metadata, report, until_true
from distro_optim.testing.solana.validator import FEE_PER_SIGNATURE
from solana.solana_arena import SOL, SolanaArena

pytestmark = [pytest.mark.waiting]

CLIENTS, ROUNDS = 4, 3


def test_the_wallets_pay_for_joins_reports_and_ticks_and_nothing_else() -> None:
    async def run() -> None:
        async with SolanaArena() as arena:
            clients = [arena.participant(number, ticks=True) for number in range(CLIENTS)]
            followers = [Follower(client) for client in clients]
            for client in clients:
                await client.join()
            arena.validator.advance(DUMMY_CONFIG.waiting_for_members_extra_time + 1)
            for follower in followers:
                await follower.in_phase(RunState.WARMUP)
                index = follower.index()
                await follower.client.warmup_witness(Witness(WitnessProof(index, index, False)))
            for step in range(1, ROUNDS + 1):
                for follower in followers:
                    await follower.until(lambda state, step=step: state.progress.step == step)  # type: ignore[misc]
                    await follower.in_phase(RunState.ROUND_TRAIN)
                    await follower.client.witness(report(follower.proof(), []), metadata(step))
                for follower in followers:
                    await follower.in_phase(RunState.ROUND_WITNESS)
                arena.validator.advance(DUMMY_CONFIG.round_witness_time + 1)
            for follower in followers:
                await follower.until(lambda state: state.progress.step == ROUNDS + 1)
            # The nonce has counted every transaction; the wallets know of theirs once they are confirmed.
            await until_true(lambda: sum(client.fees.transactions for client in clients) == arena.account.nonce - 1)
            taken = arena.account.nonce - 1
            balances = [arena.validator.balance(Pubkey.from_bytes(client.identity.signer)) for client in clients]
            assert CLIENTS * SOL - sum(balances) == taken * FEE_PER_SIGNATURE
            assert sum(client.fees.spent for client in clients) == taken * FEE_PER_SIGNATURE
            ticks = taken - CLIENTS * (2 + ROUNDS)  # beside a join and the reports of the warm-up and the rounds
            phases = 1 + ROUNDS  # that nobody's report has ended
            assert phases <= ticks <= phases * CLIENTS

    asyncio.run(run())
