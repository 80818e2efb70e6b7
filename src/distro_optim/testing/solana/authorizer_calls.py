"""The authorizer program. PsycheFoundation/psyche, ``solana-authorizer/src/logic``."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer

from ...coordinator.solana import arguments as args
from ...coordinator.solana.program_errors import AUTHORIZER_ERRORS, FIRST_CUSTOM
from ...coordinator.solana.programs import SYSTEM_PROGRAM
from ...coordinator.solana.small_accounts import Authorization, authorization_bytes, write_small_account
from .anchor import Accounts, fail, instruction_of
from .coordinator_twin import ProgramError
from .ledger import Call, Failure, rent

__all__ = ["authorizer_program"]

CLOSING_SECONDS: Final = 30 * 24 * 60 * 60
"""How long an authorization with delegates stays after its grantor's last change."""

MAX_SEED: Final = 32


def authorizer_program(call: Call) -> None:
    """Runs one instruction."""
    _, arguments = instruction_of(call, args.AUTHORIZER_INSTRUCTIONS)
    accounts = Accounts(call)
    match arguments:
        case args.AuthorizationCreate():
            _create(call, accounts, arguments)
        case args.AuthorizationGrantorUpdate():
            _grantor_update(call, accounts, arguments)
        case args.AuthorizationGranteeUpdate():
            _grantee_update(call, accounts, arguments)
        case args.AuthorizationClose():
            _close(call, accounts)
        case _:
            raise fail(call, ProgramError(102, "InstructionDidNotDeserialize"))


def _create(call: Call, accounts: Accounts, arguments: args.AuthorizationCreate) -> None:
    payer, grantor = accounts.signer("payer"), accounts.signer("grantor")
    key = accounts.any("authorization")
    accounts.program("system_program", SYSTEM_PROGRAM)
    if len(arguments.scope) > MAX_SEED:
        raise Failure("ProgramFailedToComplete")
    seeds = [b"Authorization", bytes(grantor), arguments.grantee, arguments.scope]
    address, bump = Pubkey.find_program_address(seeds, call.program)
    size = authorization_bytes(len(arguments.scope), 0)
    accounts.create(key, address, payer, size)
    accounts.writable(payer)
    value = Authorization(bump, bytes(grantor), arguments.grantee, arguments.scope, False, (), 0)
    call.write(key, write_small_account(value, size))


def _grantor_update(call: Call, accounts: Accounts, arguments: args.AuthorizationGrantorUpdate) -> None:
    grantor = accounts.signer("grantor")
    key, value = accounts.small("authorization", Authorization, call.program)
    accounts.writable(key)
    accounts.must(value.grantor == bytes(grantor), key)
    changed = replace(value, active=arguments.active, grantor_update_unix_timestamp=call.layer.clock.unix_timestamp)
    call.write(key, write_small_account(changed, len(call.account(key).data)))


def _grantee_update(call: Call, accounts: Accounts, arguments: args.AuthorizationGranteeUpdate) -> None:
    payer, grantee = accounts.signer("payer"), accounts.signer("grantee")
    key, value = accounts.small("authorization", Authorization, call.program)
    accounts.program("system_program", SYSTEM_PROGRAM)
    accounts.writable(payer)
    kept = () if arguments.delegates_clear else value.delegates
    delegates = (*kept, *arguments.delegates_added)
    size = authorization_bytes(len(value.scope), len(delegates))
    wanted = rent(size) - call.account(key).lamports
    if wanted > 0:
        call.invoke(transfer(TransferParams(from_pubkey=payer, to_pubkey=key, lamports=wanted)))
    elif wanted < 0:
        call.move(key, payer, -wanted)
    accounts.writable(key)
    accounts.must(value.grantee == bytes(grantee), key)
    call.write(key, write_small_account(replace(value, delegates=delegates), size))


def _close(call: Call, accounts: Accounts) -> None:
    grantor = accounts.signer("grantor")
    spill = accounts.system_account("spill")
    key, value = accounts.small("authorization", Authorization, call.program)
    accounts.program("system_program", SYSTEM_PROGRAM)
    accounts.writable(spill, key)
    accounts.must(value.grantor == bytes(grantor), key)
    if value.active:
        raise _refuse(call, "AuthorizationActiveIsTrue")
    due = value.grantor_update_unix_timestamp + CLOSING_SECONDS
    if value.delegates and call.layer.clock.unix_timestamp < due:
        raise _refuse(call, "AuthorizationClosingConditionsNotReachedYet")
    call.close(key, spill)


def _refuse(call: Call, name: str) -> Failure:
    return fail(call, ProgramError(FIRST_CUSTOM + AUTHORIZER_ERRORS.index(name), name))
