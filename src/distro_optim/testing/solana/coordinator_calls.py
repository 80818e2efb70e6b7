"""The coordinator program: which accounts each of its instructions names, and what is checked of them.

PsycheFoundation/psyche, ``solana-coordinator/src/{lib.rs,logic}``.
"""

from __future__ import annotations

from solders.pubkey import Pubkey

from ...coordinator.formats.account import fresh_account
from ...coordinator.solana import arguments as args
from ...coordinator.solana.programs import JOIN_SCOPE, SYSTEM_PROGRAM
from ...coordinator.solana.small_accounts import (
    INSTANCE_BYTES,
    Authorization,
    CoordinatorInstance,
    write_small_account,
)
from ...errors import ConfigurationError
from .anchor import Accounts, fail, finish, instruction_of
from .coordinator_twin import Panic, ProgramError, Refused, check_free, run_instruction
from .ledger import Call, Failure, encoded

__all__ = ["coordinator_program"]

_OPERATORS = (args.Update, args.UpdateClientVersion, args.SetFutureEpochRates, args.SetPaused)


def coordinator_program(call: Call) -> None:
    """Runs one instruction."""
    name, arguments = instruction_of(call, args.coordinator_instructions(call.layer.programs.account_version))
    call.logs.append(f"Program log: Instruction: {''.join(part.title() for part in name.split('_'))}")
    if arguments is None:
        raise fail(call, ProgramError(102, "InstructionDidNotDeserialize"))
    accounts = Accounts(call)
    try:
        match arguments:
            case args.InitCoordinator():
                _init(call, accounts, arguments)
            case args.FreeCoordinator():
                _free(call, accounts)
            case args.JoinRun() | args.JoinRunV2():
                _join(call, accounts, arguments)
            case _:
                _change(call, accounts, arguments)
    except (Refused, Panic) as error:
        raise finish(call, error) from None


def _seeds(instance: CoordinatorInstance) -> list[bytes]:
    return [b"coordinator", instance.run_id.encode()]


def _init(call: Call, accounts: Accounts, arguments: args.InitCoordinator) -> None:
    payer = accounts.signer("payer")
    instance = accounts.any("coordinator_instance")
    account = accounts.any("coordinator_account")
    accounts.program("system_program", SYSTEM_PROGRAM)
    try:
        address, bump = call.layer.programs.instance_and_bump(arguments.run_id)
    except ConfigurationError:
        if arguments.run_id:
            raise Panic("Length of the seed is too long for address generation") from None
        address, bump = Pubkey.find_program_address([b"coordinator", b""], call.program)
    accounts.create(instance, address, payer, INSTANCE_BYTES)
    accounts.writable(payer, account)
    held = call.account(account)
    accounts.must(held.owner == str(call.program), account, 2004)
    programs = call.layer.programs
    if len(held.data) != programs.account_size:
        raise Refused.by_name("CoordinatorAccountIncorrectSize")
    if any(held.data[:8]):
        raise Refused.by_anchor(3000)
    made = run_instruction(fresh_account(programs.account_version), bytes(payer), arguments, call.layer.clock)
    value = CoordinatorInstance(
        bump, arguments.main_authority, arguments.join_authority, bytes(account), arguments.run_id
    )
    call.write(instance, write_small_account(value, INSTANCE_BYTES))
    call.write(account, encoded(made))


def _free(call: Call, accounts: Accounts) -> None:
    authority = accounts.signer("authority")
    spill = accounts.system_account("spill")
    key, instance = accounts.small("coordinator_instance", CoordinatorInstance, call.program)
    account = accounts.run_account("coordinator_account")
    accounts.writable(spill)
    accounts.seeds(key, _seeds(instance), instance.bump)
    accounts.writable(key)
    accounts.must(instance.main_authority == bytes(authority), key)
    accounts.writable(account)
    accounts.must(instance.coordinator_account == bytes(account), account)
    check_free(accounts.load(account))
    call.close(key, spill)
    call.close(account, spill)


def _join(call: Call, accounts: Accounts, arguments: args.JoinRun | args.JoinRunV2) -> None:
    user = accounts.signer("user")
    authorization, value = accounts.small("authorization", Authorization, call.layer.programs.authorizer)
    key, instance = accounts.small("coordinator_instance", CoordinatorInstance, call.program)
    account = accounts.run_account("coordinator_account")
    accounts.must(value.is_valid_for(instance.join_authority, bytes(user), JOIN_SCOPE), authorization)
    _run(call, accounts, user, key, instance, account, arguments)


def _change(call: Call, accounts: Accounts, arguments: args.Arguments) -> None:
    operates = isinstance(arguments, _OPERATORS)
    user = accounts.signer("authority" if operates else "user")
    key, instance = accounts.small("coordinator_instance", CoordinatorInstance, call.program)
    account = accounts.run_account("coordinator_account")
    _run(call, accounts, user, key, instance, account, arguments, operates=operates)


def _run(
    call: Call,
    accounts: Accounts,
    user: Pubkey,
    key: Pubkey,
    instance: CoordinatorInstance,
    account: Pubkey,
    arguments: args.Arguments,
    *,
    operates: bool = False,
) -> None:
    accounts.seeds(key, _seeds(instance), instance.bump)
    if operates:
        accounts.must(instance.main_authority == bytes(user), key)
    accounts.writable(account)
    accounts.must(instance.coordinator_account == bytes(account), account)
    before = accounts.load(account)
    after = run_instruction(before, bytes(user), arguments, call.layer.clock)
    call.logs.append(f"Program log: Nonce: {after.nonce}")
    try:
        data = encoded(after)
    except ConfigurationError:
        raise Failure("ProgramFailedToComplete") from None
    call.write(account, data)
