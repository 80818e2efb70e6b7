"""The treasurer program. PsycheFoundation/psyche, ``solana-treasurer/src/logic``.

Where accounts of runs have version 2, the wallet that signs a claim is the one that was named for it, not the one that
has trained; some errors have other names and numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from ...coordinator.solana import arguments as args
from ...coordinator.solana.program_errors import FIRST_CUSTOM, TREASURER_ERRORS, TREASURER_ERRORS_V2
from ...coordinator.solana.programs import (
    ASSOCIATED_TOKEN_PROGRAM,
    SYSTEM_PROGRAM,
    TOKEN_PROGRAM,
)
from ...coordinator.solana.small_accounts import (
    MINT_BYTES,
    PARTICIPANT_BYTES,
    TREASURY_BYTES,
    CoordinatorInstance,
    Participant,
    Treasury,
    has_delegate,
    write_small_account,
)
from ...coordinator.types import RUN_ID_MAX_LEN
from .anchor import Accounts, fail, instruction_of
from .coordinator_twin import ProgramError
from .ledger import Call, Failure
from .native_programs import token_mint, token_owner, transfer_tokens

__all__ = ["treasurer_program"]

_U64: Final = 1 << 64


def treasurer_program(call: Call) -> None:
    """Runs one instruction."""
    _, arguments = instruction_of(call, args.treasurer_instructions(call.layer.programs.account_version))
    accounts = Accounts(call)
    match arguments:
        case args.RunCreate():
            _create(call, accounts, arguments)
        case args.RunUpdate():
            _update(call, accounts, arguments)
        case args.ParticipantCreate():
            _create_participant(call, accounts, None)
        case args.ParticipantCreateV2():
            _create_participant(call, accounts, arguments.user)
        case args.ParticipantClaim():
            _claim(call, accounts, arguments.claim_earned_points, None)
        case args.ParticipantClaimV2():
            _claim(call, accounts, arguments.claim_earned_points, arguments.user)
        case _:
            raise fail(call, ProgramError(102, "InstructionDidNotDeserialize"))


def _create(call: Call, accounts: Accounts, arguments: args.RunCreate) -> None:
    payer = accounts.signer("payer")
    treasury = accounts.any("run")
    collateral = accounts.any("run_collateral")
    mint = accounts.mint("collateral_mint", MINT_BYTES)
    instance = accounts.any("coordinator_instance")
    account = accounts.any("coordinator_account")
    coordinator = accounts.program("coordinator_program", call.layer.programs.coordinator)
    accounts.program("associated_token_program", ASSOCIATED_TOKEN_PROGRAM)
    accounts.program("token_program", TOKEN_PROGRAM)
    accounts.program("system_program", SYSTEM_PROGRAM)

    seeds = [b"Run", arguments.index.to_bytes(8, "little")]
    address, bump = Pubkey.find_program_address(seeds, call.program)
    accounts.create(treasury, address, payer, TREASURY_BYTES)
    metas = [
        AccountMeta(payer, is_signer=True, is_writable=True),
        AccountMeta(collateral, is_signer=False, is_writable=True),
        *(AccountMeta(key, False, False) for key in (treasury, mint, SYSTEM_PROGRAM, TOKEN_PROGRAM)),
    ]
    call.invoke(Instruction(ASSOCIATED_TOKEN_PROGRAM, b"\0", metas))
    accounts.writable(payer, instance, account)
    if len(arguments.run_id.encode()) > RUN_ID_MAX_LEN:
        raise _refuse(call, "RunIdInvalidLength")
    value = Treasury(
        bump,
        arguments.index,
        arguments.main_authority,
        arguments.join_authority,
        bytes(account),
        bytes(instance),
        bytes(mint),
        0,
        0,
    )
    given = args.InitCoordinator(bytes(treasury), arguments.join_authority, arguments.run_id, arguments.client_version)
    metas = [
        AccountMeta(payer, is_signer=True, is_writable=True),
        AccountMeta(instance, is_signer=False, is_writable=True),
        AccountMeta(account, is_signer=False, is_writable=True),
        AccountMeta(SYSTEM_PROGRAM, is_signer=False, is_writable=False),
    ]
    call.invoke(Instruction(coordinator, args.encode_arguments(given), metas), [treasury])
    call.write(treasury, write_small_account(value, TREASURY_BYTES))


def _update(call: Call, accounts: Accounts, arguments: args.RunUpdate) -> None:
    authority = accounts.signer("authority")
    treasury, value = accounts.small("run", Treasury, call.program)
    instance, _ = accounts.small("coordinator_instance", CoordinatorInstance, call.layer.programs.coordinator)
    account = accounts.run_account("coordinator_account")
    coordinator = accounts.program("coordinator_program", call.layer.programs.coordinator)
    accounts.must(value.main_authority == bytes(authority), treasury)
    accounts.must(value.coordinator_instance == bytes(instance), treasury)
    accounts.must(value.coordinator_account == bytes(account), treasury)
    accounts.writable(account)
    metas = [
        AccountMeta(treasury, is_signer=True, is_writable=False),
        AccountMeta(instance, is_signer=False, is_writable=False),
        AccountMeta(account, is_signer=False, is_writable=True),
    ]
    for given in _parts(arguments):
        call.invoke(Instruction(coordinator, args.encode_arguments(given), metas), [treasury])


def _parts(given: args.RunUpdate) -> list[args.Arguments]:
    """What the coordinator is asked to do, in this order."""
    parts: list[args.Arguments] = []
    state = (given.metadata, given.config, given.model, given.progress)
    rates = (given.epoch_earning_rate_total_shared, given.epoch_slashing_rate_per_client)
    if any(part is not None for part in state):
        parts.append(args.Update(*state))
    if any(rate is not None for rate in rates):
        parts.append(args.SetFutureEpochRates(*rates))
    if given.paused is not None:
        parts.append(args.SetPaused(given.paused))
    if given.client_version is not None:
        parts.append(args.UpdateClientVersion(given.client_version))
    return parts


def _create_participant(call: Call, accounts: Accounts, named: bytes | None) -> None:
    payer = accounts.signer("payer")
    user = bytes(accounts.signer("user")) if named is None else named
    treasury, _ = accounts.small("run", Treasury, call.program)
    key = accounts.any("participant")
    accounts.program("system_program", SYSTEM_PROGRAM)
    address, bump = Pubkey.find_program_address([b"Participant", bytes(treasury), user], call.program)
    accounts.create(key, address, payer, PARTICIPANT_BYTES)
    accounts.writable(payer)
    call.write(key, write_small_account(Participant(bump, 0, 0), PARTICIPANT_BYTES))


def _claim(call: Call, accounts: Accounts, points: int, named: bytes | None) -> None:
    who = "user" if named is None else "claimer"
    signer = accounts.signer(who)
    user = bytes(signer) if named is None else named
    target = accounts.token_account(f"{who}_collateral")
    treasury, value = accounts.small("run", Treasury, call.program)
    collateral = accounts.token_account("run_collateral")
    account = accounts.run_account("coordinator_account")
    key, paid = accounts.small("participant", Participant, call.program)
    accounts.program("token_program", TOKEN_PROGRAM)

    held = call.account(target).data
    accounts.writable(target)
    accounts.must(token_mint(held) == value.collateral_mint, target)
    accounts.must(token_owner(held) == bytes(signer), target)
    accounts.must(not has_delegate(held), target)
    accounts.writable(treasury)
    accounts.must(value.coordinator_account == bytes(account), treasury)
    accounts.associated(collateral, treasury, Pubkey.from_bytes(value.collateral_mint))
    accounts.writable(collateral)
    run = accounts.load(account)
    accounts.seeds(key, [b"Participant", bytes(treasury), user], paid.bump)
    accounts.writable(key)

    client = next((client for client in run.state.clients_state.clients if client.id.signer == user), None)
    if named is not None and client is None:
        raise _refuse(call, "ParticipantClientNotFound")
    if named is not None and client is not None and client.claimer != bytes(signer):
        raise _refuse(call, "ClaimerSignerMismatch")
    earned = 0 if client is None else client.earned
    if earned < paid.claimed_earned_points:
        raise Failure("ProgramFailedToComplete")
    if points > earned - paid.claimed_earned_points:
        raise _refuse(call, "InvalidParameter" if named is None else "ClaimedPointsExceedEarnedPoints")
    if max(value.total_claimed_earned_points, value.total_claimed_collateral_amount) + points >= _U64:
        raise Failure("ProgramFailedToComplete")
    transfer_tokens(call, collateral, target, treasury, points)
    total = replace(
        value,
        total_claimed_collateral_amount=value.total_claimed_collateral_amount + points,
        total_claimed_earned_points=value.total_claimed_earned_points + points,
    )
    claimed = replace(
        paid,
        claimed_collateral_amount=paid.claimed_collateral_amount + points,
        claimed_earned_points=paid.claimed_earned_points + points,
    )
    call.write(treasury, write_small_account(total, TREASURY_BYTES))
    call.write(key, write_small_account(claimed, PARTICIPANT_BYTES))


def _refuse(call: Call, name: str) -> Failure:
    errors = TREASURER_ERRORS_V2 if call.layer.programs.has_claimers else TREASURER_ERRORS
    return fail(call, ProgramError(FIRST_CUSTOM + errors.index(name), name))
