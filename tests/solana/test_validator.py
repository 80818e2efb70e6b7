"""Transactions as they travel: signatures, blockhashes, fees and rights are checked as on a cluster."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace

import pytest
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, TransferParams, create_account, transfer
from solders.transaction import Transaction, VersionedTransaction

from distro_optim.coordinator.formats.account import ACCOUNT_SIZE, read_account
from distro_optim.coordinator.solana.fees import FeeMeter
from distro_optim.coordinator.solana.instructions import (
    AuthorizerInstructions,
    RunInstructions,
    create_run_account,
)
from distro_optim.coordinator.solana.programs import (
    ASSOCIATED_TOKEN_PROGRAM,
    EVERYBODY,
    SYSTEM_PROGRAM,
    TOKEN_PROGRAM,
    Programs,
    associated_token_account,
)
from distro_optim.coordinator.solana.rpc import RpcClient
from distro_optim.coordinator.solana.sending import Sender
from distro_optim.coordinator.solana.small_accounts import MINT_BYTES, TokenAccount
from distro_optim.coordinator.types import NodeIdentity
from distro_optim.testing import Validator
from distro_optim.testing.coordinator import until_true
from distro_optim.testing.solana.ledger import rent
from distro_optim.testing.solana.server import ValidatorServer
from distro_optim.testing.solana.validator import BLOCKHASHES, FEE_PER_SIGNATURE

PROGRAMS = Programs()
SOL = 1_000_000_000


def key(number: int) -> Keypair:
    return Keypair.from_seed(number.to_bytes(32, "little"))


PAYER, OTHER, RUN = key(1), key(2), key(3)


def signed(validator: Validator, instructions: list[Instruction], *signers: Keypair) -> Transaction:
    message = Message.new_with_blockhash(instructions, signers[0].pubkey(), validator.blockhash)
    return Transaction(list(signers), message, validator.blockhash)


def pays(amount: int, source: Keypair = PAYER) -> Instruction:
    return transfer(TransferParams(from_pubkey=source.pubkey(), to_pubkey=OTHER.pubkey(), lamports=amount))


@pytest.fixture
def validator() -> Validator:
    made = Validator()
    made.fund(PAYER.pubkey(), 10 * SOL)
    return made


def test_a_transfer_costs_a_fee_for_each_signature(validator: Validator) -> None:
    outcome = validator.process(signed(validator, [pays(SOL)], PAYER))
    assert (outcome.error, outcome.fee) == (None, FEE_PER_SIGNATURE)
    assert validator.balance(OTHER.pubkey()) == SOL
    assert validator.balance(PAYER.pubkey()) == 9 * SOL - FEE_PER_SIGNATURE


def test_bytes_are_taken_as_they_travel(validator: Validator) -> None:
    transaction = signed(validator, [pays(SOL)], PAYER)
    assert validator.process(bytes(transaction)).error is None
    again = VersionedTransaction.from_legacy(transaction)
    assert validator.process(again).error == "AlreadyProcessed"
    with pytest.raises(ValueError, match="too large"):
        validator.process(bytes(1233))
    with pytest.raises(ValueError, match="transaction"):
        validator.process(5)


def test_a_signature_must_be_right(validator: Validator) -> None:
    good = signed(validator, [pays(SOL)], PAYER)
    forged = Transaction.populate(good.message, [key(9).sign_message(bytes(good.message))])
    assert validator.process(forged).error == "SignatureFailure"


def test_a_blockhash_must_be_known_and_young(validator: Validator) -> None:
    message = Message.new_with_blockhash([pays(SOL)], PAYER.pubkey(), Hash.new_unique())
    assert validator.process(Transaction([PAYER], message, message.recent_blockhash)).error == "BlockhashNotFound"
    old = signed(validator, [pays(SOL)], PAYER)
    validator.advance_blocks(BLOCKHASHES - 1)
    assert validator.simulate(old).error is None
    validator.advance_blocks(1)
    assert validator.process(old).error == "BlockhashNotFound"
    assert validator.last_valid_block_height(message.recent_blockhash) is None


@pytest.mark.parametrize(
    ("lamports", "error"),
    [
        (0, "AccountNotFound"),
        (4999, "InsufficientFundsForFee"),
        (5001, "InsufficientFundsForRent(0)"),
        (5000, "InstructionError(0, Custom(1))"),
    ],
)
def test_who_cannot_pay_is_refused(lamports: int, error: str) -> None:
    validator = Validator()
    if lamports:
        validator.fund(PAYER.pubkey(), lamports)
    assert validator.process(signed(validator, [pays(SOL)], PAYER)).error == error


def test_a_failure_costs_the_fee_only_without_a_preflight(validator: Validator) -> None:
    failing = signed(validator, [pays(SOL), pays(99 * SOL)], PAYER)
    before = dict(validator.accounts)
    outcome = validator.process(failing)
    assert (outcome.error, outcome.fee) == ("InstructionError(1, Custom(1))", 0)
    assert validator.accounts == before
    outcome = validator.process(failing, preflight=False)
    assert (outcome.error, outcome.fee) == ("InstructionError(1, Custom(1))", FEE_PER_SIGNATURE)
    assert validator.balance(PAYER.pubkey()) == 10 * SOL - FEE_PER_SIGNATURE
    assert validator.balance(OTHER.pubkey()) == 0


def test_an_account_must_be_able_to_live(validator: Validator) -> None:
    assert str(validator.process(signed(validator, [pays(5)], PAYER)).error).startswith("InsufficientFundsForRent")


def test_nobody_moves_what_is_not_his(validator: Validator) -> None:
    stolen = Instruction(
        SYSTEM_PROGRAM,
        pays(SOL).data,
        [AccountMeta(PAYER.pubkey(), False, True), AccountMeta(OTHER.pubkey(), False, True)],
    )
    validator.fund(key(4).pubkey(), SOL)
    assert (
        validator.process(signed(validator, [stolen], key(4))).error == "InstructionError(0, MissingRequiredSignature)"
    )
    unknown = Instruction(key(8).pubkey(), b"", [])
    assert validator.process(signed(validator, [unknown], PAYER)).error == "InstructionError(0, UnsupportedProgramId)"


@pytest.mark.parametrize("program", [SYSTEM_PROGRAM, TOKEN_PROGRAM, PROGRAMS.coordinator, PROGRAMS.authorizer])
@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\0" * 4, b"\x03" + bytes(8)])
def test_nonsense_fails_and_breaks_nothing(validator: Validator, program: Pubkey, data: bytes) -> None:
    outcome = validator.process(signed(validator, [Instruction(program, data, [])], PAYER))
    assert outcome.error is not None
    assert outcome.error.startswith("InstructionError(0, ")


# -- a run -------------------------------------------------------------------------------------------------------------


def a_run(validator: Validator) -> RunInstructions:
    """A run of which PAYER is the operator, and that lets everybody in."""
    run = RunInstructions(PROGRAMS, "test", RUN.pubkey())
    account = create_run_account(PROGRAMS, PAYER.pubkey(), RUN.pubkey(), rent(ACCOUNT_SIZE))
    init = run.init(PAYER.pubkey(), PAYER.pubkey(), PAYER.pubkey(), "test")
    assert validator.process(signed(validator, [account, init], PAYER, RUN)).error is None
    everybody = AuthorizerInstructions(PROGRAMS, PAYER.pubkey(), EVERYBODY)
    made = [everybody.create(PAYER.pubkey()), everybody.set_active(True)]
    assert validator.process(signed(validator, made, PAYER)).error is None
    return run


def test_a_run_is_made_with_two_signatures_and_joined_with_one(validator: Validator) -> None:
    run = a_run(validator)
    validator.fund(OTHER.pubkey(), SOL)
    me = NodeIdentity(bytes(OTHER.pubkey()), b"p" * 32)
    join = run.join(me, PROGRAMS.authorization(PAYER.pubkey(), EVERYBODY))
    # A run without settings has batches of no sequence, and so no place for anybody.
    outcome = validator.process(signed(validator, [join], OTHER))
    assert outcome.error == "InstructionError(0, Custom(6022))"
    assert any("MoreClientsThanBatches" in line for line in outcome.logs)
    account = read_account(validator.accounts[str(RUN.pubkey())].data)
    assert account.state.coordinator.run_id == "test"
    assert account.state.clients_state.clients == ()


def test_a_run_without_the_authorization_cannot_be_joined(validator: Validator) -> None:
    run = a_run(validator)
    validator.fund(OTHER.pubkey(), SOL)
    join = run.join(NodeIdentity(bytes(OTHER.pubkey()), bytes(32)), PROGRAMS.authorization(OTHER.pubkey(), EVERYBODY))
    outcome = validator.process(signed(validator, [join], OTHER))
    assert outcome.error == "InstructionError(0, Custom(3012))"
    assert "caused by account: authorization" in "".join(outcome.logs)


def test_only_the_operator_changes_a_run(validator: Validator) -> None:
    run = a_run(validator)
    validator.fund(OTHER.pubkey(), SOL)
    by_other = signed(validator, [run.set_future_epoch_rates(OTHER.pubkey(), 5, None)], OTHER)
    assert validator.process(by_other).error == "InstructionError(0, Custom(2003))"
    by_operator = signed(validator, [run.set_future_epoch_rates(PAYER.pubkey(), 5, None)], PAYER)
    assert validator.process(by_operator).error is None


def test_a_run_in_another_program_is_not_found() -> None:
    validator = Validator(replace(PROGRAMS, coordinator=key(77).pubkey()))
    validator.fund(PAYER.pubkey(), SOL)
    tick = RunInstructions(PROGRAMS, "test", RUN.pubkey()).tick(PAYER.pubkey())
    assert validator.process(signed(validator, [tick], PAYER)).error == "InstructionError(0, UnsupportedProgramId)"


def test_time_moves_only_when_it_is_moved() -> None:
    validator = Validator(unix_timestamp=100, slot=7)
    validator.advance(10)
    assert (validator.clock.unix_timestamp, validator.clock.slot) == (110, 32)


# -- tokens ------------------------------------------------------------------------------------------------------------

MINT = key(40)


def mint_instruction(tag: int, amount: int, metas: list[tuple[Pubkey, bool, bool]], more: bytes = b"") -> Instruction:
    data = bytes([tag]) + amount.to_bytes(8, "little") + more
    return Instruction(TOKEN_PROGRAM, data, [AccountMeta(*meta) for meta in metas])


def with_tokens(validator: Validator) -> tuple[Pubkey, Pubkey]:
    """Two accounts of tokens, PAYER's with 100 and OTHER's without any."""
    made = create_account(
        CreateAccountParams(
            from_pubkey=PAYER.pubkey(),
            to_pubkey=MINT.pubkey(),
            lamports=rent(MINT_BYTES),
            space=MINT_BYTES,
            owner=TOKEN_PROGRAM,
        )
    )
    initialized = Instruction(
        TOKEN_PROGRAM, b"\x14\x06" + bytes(PAYER.pubkey()) + b"\0", [AccountMeta(MINT.pubkey(), False, True)]
    )
    assert validator.process(signed(validator, [made, initialized], PAYER, MINT)).error is None
    holders = []
    for owner in (PAYER.pubkey(), OTHER.pubkey()):
        account = associated_token_account(owner, MINT.pubkey())
        metas = [
            AccountMeta(PAYER.pubkey(), True, True),
            AccountMeta(account, False, True),
            *(AccountMeta(other, False, False) for other in (owner, MINT.pubkey(), SYSTEM_PROGRAM, TOKEN_PROGRAM)),
        ]
        for _ in range(2):  # the second time it is there already
            make = Instruction(ASSOCIATED_TOKEN_PROGRAM, b"\1", metas)
            assert validator.process(signed(validator, [make], PAYER)).error is None
            validator.advance_blocks(1)
        holders.append(account)
    minted = mint_instruction(
        7, 100, [(MINT.pubkey(), False, True), (holders[0], False, True), (PAYER.pubkey(), True, False)]
    )
    assert validator.process(signed(validator, [minted], PAYER)).error is None
    return holders[0], holders[1]


def amounts(validator: Validator, *accounts: Pubkey) -> list[int]:
    return [TokenAccount.read(validator.accounts[str(account)].data).amount for account in accounts]


def test_tokens_are_made_and_moved_by_their_owners(validator: Validator) -> None:
    mine, other = with_tokens(validator)
    plain = mint_instruction(3, 30, [(mine, False, True), (other, False, True), (PAYER.pubkey(), True, False)])
    checked = mint_instruction(
        12,
        20,
        [(mine, False, True), (MINT.pubkey(), False, False), (other, False, True), (PAYER.pubkey(), True, False)],
        b"\x06",
    )
    assert validator.process(signed(validator, [plain, checked], PAYER)).error is None
    assert amounts(validator, mine, other) == [50, 50]


@pytest.mark.parametrize(("amount", "owner", "error"), [(101, PAYER, "Custom(1)"), (5, OTHER, "Custom(4)")])
def test_tokens_that_are_not_there_or_not_ours_stay(
    validator: Validator, amount: int, owner: Keypair, error: str
) -> None:
    mine, other = with_tokens(validator)
    validator.fund(OTHER.pubkey(), SOL)
    moved = mint_instruction(3, amount, [(mine, False, True), (other, False, True), (owner.pubkey(), True, False)])
    assert validator.process(signed(validator, [moved], owner)).error == f"InstructionError(0, {error})"
    assert amounts(validator, mine, other) == [100, 0]


def test_what_happens_within_a_slot_is_confirmed_and_told_together() -> None:
    async def check() -> None:
        validator = Validator()
        validator.fund(PAYER.pubkey(), SOL)
        async with ValidatorServer(validator, slot_seconds=60.0) as server:
            rpc = RpcClient([server.url])
            session = await rpc.session()
            async with session.ws_connect(server.websocket_url) as socket:
                options = [str(PAYER.pubkey()), {"encoding": "base64"}]
                await socket.send_json({"id": 1, "method": "accountSubscribe", "params": options})
                await socket.receive_json()
                sent = [signed(validator, [pays(rent(0) + number)], PAYER) for number in range(2)]
                for transaction in sent:
                    text = base64.b64encode(bytes(transaction)).decode()
                    await rpc.call("sendTransaction", [text, {"encoding": "base64"}])

                async def statuses() -> list[str]:
                    asked = [[str(transaction.signatures[0]) for transaction in sent]]
                    found = await rpc.call("getSignatureStatuses", asked)
                    return [status["confirmationStatus"] for status in found["value"]]

                assert await statuses() == ["processed", "processed"]
                assert await rpc.balance(PAYER.pubkey()) == SOL
                server.end_slot()
                assert await statuses() == ["confirmed", "confirmed"]
                left = SOL - 2 * rent(0) - 1 - 2 * FEE_PER_SIGNATURE
                assert await rpc.balance(PAYER.pubkey()) == left
                news = await socket.receive_json()
                assert news["params"]["result"]["value"]["lamports"] == left
                server.end_slot()  # nothing has happened
                await socket.send_json({"id": 2, "method": "nonsense", "params": []})
                assert (await socket.receive_json())["id"] == 2
            await rpc.close()

    asyncio.run(check())


def test_a_transaction_in_a_block_is_waited_for_though_its_blockhash_is_over() -> None:
    async def check() -> None:
        validator = Validator()
        validator.fund(PAYER.pubkey(), SOL)
        async with ValidatorServer(validator, slot_seconds=60.0) as server:
            rpc, fees = RpcClient([server.url]), FeeMeter()
            sender = Sender(rpc, PAYER, fees, poll_seconds=0.001)
            sending = asyncio.create_task(sender.send([pays(rent(0))]))
            await until_true(lambda: validator.balance(OTHER.pubkey()) == rent(0))
            validator.advance_blocks(BLOCKHASHES)
            asked = server.requests.get("getSignatureStatuses", 0)
            await until_true(lambda: server.requests.get("getSignatureStatuses", 0) >= asked + 2)
            assert not sending.done()
            server.end_slot()
            await sending
            assert fees.spent == FEE_PER_SIGNATURE
            await rpc.close()

    asyncio.run(check())
