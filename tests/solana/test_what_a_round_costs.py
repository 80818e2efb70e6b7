"""A client pays for one join an epoch, one report a round, and its share of about two ticks a phase."""

from __future__ import annotations

import asyncio

import pytest
from solders.compute_budget import set_compute_unit_price
from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer

from distro_optim.coordinator.solana.fees import KEPT_IN_A_WALLET, FeesSpentError
from distro_optim.coordinator.types import RunState, Witness, WitnessProof
from distro_optim.errors import PaymentError
from distro_optim.testing import Validator
from distro_optim.testing.coordinator import DUMMY_CONFIG, Follower, metadata, report, until_true
from distro_optim.testing.solana.native_programs import COMPUTE_BUDGET
from distro_optim.testing.solana.transactions import Transaction
from distro_optim.testing.solana.validator import FEE_PER_SIGNATURE
from solana.solana_arena import ANYBODY, SOL, SolanaArena, in_arena, wallet

pytestmark = [pytest.mark.waiting]

CLIENTS, ROUNDS = 4, 3


PRICE = 5000  # in millionths of a lamport: 1000 lamports for 200,000 units


def test_a_price_for_computing_is_paid_counted_and_fits_beside_the_largest_report() -> None:
    async def check(arena: SolanaArena) -> None:
        clients = [arena.participant(number, compute_unit_price=PRICE, max_fees=18_000) for number in range(3)]
        followers = [Follower(client) for client in clients]
        for client in clients:
            await client.join()
        await arena.advance(4)
        for follower in followers:
            await follower.in_phase(RunState.WARMUP)
            await follower.client.warmup_witness(Witness(WitnessProof(follower.index(), follower.index(), False)))
        for follower in followers:
            await follower.in_phase(RunState.ROUND_TRAIN)
            await follower.client.witness(report(follower.proof(), []), metadata(1))
        for follower in followers:
            await follower.in_phase(RunState.ROUND_WITNESS)
        for client in clients:
            assert SOL - arena.validator.balance(Pubkey.from_bytes(client.identity.signer)) == 3 * 6000
            assert client.fees.spent == 3 * 6000
            with pytest.raises(FeesSpentError, match=r"has cost 0\.000018 SOL"):
                client.fees.check()

    in_arena(check)


def test_a_wallet_begins_with_what_its_transactions_will_cost() -> None:
    async def check(arena: SolanaArena) -> None:
        needed = KEPT_IN_A_WALLET + 4 * 6000
        client = arena.participant(0, lamports=needed - 1, compute_unit_price=PRICE)
        with pytest.raises(PaymentError, match=r"put at least 0\.000000001 SOL into it"):
            await client.join()

    in_arena(check)


@pytest.mark.parametrize("data", ["", "03", "0301", "05" + "00" * 8, "02" + "00" * 8])
def test_an_offer_that_makes_no_sense_fails(data: str) -> None:
    validator = Validator()
    validator.fund(ANYBODY.pubkey(), SOL)
    offer = Instruction(Pubkey.from_string(COMPUTE_BUDGET), bytes.fromhex(data), [])
    outcome = validator.process(Transaction(ANYBODY.pubkey(), [offer]))
    assert outcome.error == "InstructionError(0, InvalidInstructionData)"


def test_a_price_without_a_limit_counts_for_what_each_call_may_use() -> None:
    gift = transfer(TransferParams(from_pubkey=ANYBODY.pubkey(), to_pubkey=wallet(5).pubkey(), lamports=SOL // 2))
    validator = Validator()
    validator.fund(ANYBODY.pubkey(), SOL)
    outcome = validator.process(Transaction(ANYBODY.pubkey(), [set_compute_unit_price(1), gift, gift]))
    assert outcome.error is not None  # not so much is there
    outcome = validator.process(Transaction(ANYBODY.pubkey(), [set_compute_unit_price(3), gift]))
    assert (outcome.error, outcome.fee) == (None, FEE_PER_SIGNATURE + 1)


@pytest.mark.slow
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
