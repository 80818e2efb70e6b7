"""The checks that Anchor makes of an instruction's accounts before the program's own code runs.

Anchor 0.30.1 goes through the accounts in the order of their declaration: first it reads them all, then it creates what
is to be created, then it checks the conditions on the others. Each check has a number, and the first that fails is the
answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, TypeVar

from solders.instruction import AccountMeta
from solders.pubkey import Pubkey
from solders.system_program import CreateAccountParams, create_account

from ...coordinator.formats.account import DISCRIMINATOR, CoordinatorAccount
from ...coordinator.solana.arguments import Arguments, decode_arguments
from ...coordinator.solana.program_errors import ANCHOR_ERRORS
from ...coordinator.solana.programs import SYSTEM_PROGRAM, TOKEN_PROGRAM, associated_token_account
from ...coordinator.solana.small_accounts import read_small_account
from ...errors import ProtocolError
from .coordinator_twin import Panic, ProgramError, Refused
from .ledger import Call, Failure, decoded, rent
from .native_programs import TOKEN_ACCOUNT_BYTES, token_owner

__all__ = ["Accounts", "fail", "finish", "instruction_of"]

T = TypeVar("T")

_DISCRIMINATOR: Final = 8


def fail(call: Call, error: ProgramError, account: str | None = None) -> Failure:
    """The failure of a program of Psyche, written into the logs as Anchor does."""
    where = "occurred" if account is None else f"caused by account: {account}"
    call.logs.append(
        f"Program log: AnchorError {where}. Error Code: {error.name}. Error Number: {error.code}. "
        f"Error Message: {error.name}."
    )
    return Failure(error.code)


def finish(call: Call, error: Refused | Panic) -> Failure:
    """The failure that an exception of the rules stands for."""
    if isinstance(error, Refused):
        return fail(call, error.error)
    call.logs.append(f"Program log: panicked at '{error}'")
    return Failure("ProgramFailedToComplete")


def instruction_of(call: Call, table: dict[str, type]) -> tuple[str, Arguments | None]:
    """The instruction that is called, see :func:`~distro_optim.coordinator.solana.arguments.decode_arguments`.

    Raises:
        Failure: the program has no such instruction.
    """
    try:
        return decode_arguments(table, call.data)
    except ProtocolError:
        raise fail(call, ProgramError(101, "InstructionFallbackNotFound")) from None


@dataclass
class Accounts:
    """The accounts of one instruction, taken in the order of their declaration."""

    call: Call
    _next: int = 0
    _names: dict[Pubkey, str] = field(default_factory=dict)

    def refuse(self, code: int, key: Pubkey | None = None) -> Failure:
        """The failure with one of Anchor's numbers, about an account."""
        return fail(
            self.call, ProgramError(code, ANCHOR_ERRORS.get(code, "Error")), self._names.get(key) if key else None
        )

    # -- reading, in the order of declaration --------------------------------------------------------------------------

    def any(self, name: str) -> Pubkey:
        """An account that is not looked at."""
        return self._take(name).pubkey

    def signer(self, name: str) -> Pubkey:
        """An account that must have signed."""
        meta = self._take(name)
        if not meta.is_signer:
            raise self.refuse(3010, meta.pubkey)
        return meta.pubkey

    def program(self, name: str, expected: Pubkey) -> Pubkey:
        """A program that is going to be called."""
        key = self._take(name).pubkey
        if key != expected:
            raise self.refuse(3008, key)
        return key

    def system_account(self, name: str) -> Pubkey:
        """An account that belongs to the system."""
        key = self._take(name).pubkey
        if self.call.account(key).owner != str(SYSTEM_PROGRAM):
            raise self.refuse(3011, key)
        return key

    def small(self, name: str, kind: type[T], owner: Pubkey) -> tuple[Pubkey, T]:
        """A small account and its value."""
        key, data = self._owned(name, owner)
        try:
            return key, read_small_account(kind, data)
        except ProtocolError as error:
            if len(data) < _DISCRIMINATOR:
                raise self.refuse(3001, key) from None
            raise self.refuse(3002 if error.field == "discriminator" else 3003, key) from None

    def run_account(self, name: str) -> Pubkey:
        """The big account of a run; see :meth:`load`."""
        key = self._take(name).pubkey
        account = self.call.account(key)
        if account.owner != str(self.call.layer.programs.coordinator):
            raise self.refuse(3007, key)
        if len(account.data) < _DISCRIMINATOR:
            raise self.refuse(3001, key)
        if account.data[:_DISCRIMINATOR] != DISCRIMINATOR:
            raise self.refuse(3002, key)
        return key

    def token_account(self, name: str) -> Pubkey:
        """An account of tokens."""
        key, data = self._owned(name, TOKEN_PROGRAM)
        if len(data) != TOKEN_ACCOUNT_BYTES:
            raise Failure("InvalidAccountData")
        return key

    def mint(self, name: str, size: int) -> Pubkey:
        """A kind of tokens."""
        key, data = self._owned(name, TOKEN_PROGRAM)
        if len(data) != size:
            raise Failure("InvalidAccountData")
        return key

    def _take(self, name: str) -> AccountMeta:
        if self._next >= len(self.call.metas):
            raise self.refuse(3005)
        meta = self.call.metas[self._next]
        self._next += 1
        self._names.setdefault(meta.pubkey, name)
        return meta

    def _owned(self, name: str, owner: Pubkey) -> tuple[Pubkey, bytes]:
        key = self._take(name).pubkey
        account = self.call.account(key)
        if account.owner == str(SYSTEM_PROGRAM) and not account.lamports:
            raise self.refuse(3012, key)
        if account.owner != str(owner):
            raise self.refuse(3007, key)
        return key, account.data

    # -- creating ------------------------------------------------------------------------------------------------------

    def create(self, key: Pubkey, expected: Pubkey, payer: Pubkey, size: int) -> None:
        """Makes an account of the program at the address that it must have."""
        if key != expected:
            raise self.refuse(2006, key)
        params = CreateAccountParams(
            from_pubkey=payer, to_pubkey=key, lamports=rent(size), space=size, owner=self.call.program
        )
        self.call.invoke(create_account(params), [key])

    # -- conditions, in the order of declaration -----------------------------------------------------------------------

    def must(self, condition: bool, key: Pubkey, code: int = 2003) -> None:
        """A condition that was written for an account."""
        if not condition:
            raise self.refuse(code, key)

    def seeds(self, key: Pubkey, seeds: list[bytes], bump: int) -> None:
        """The account must lie where its seeds and its bump lead."""
        try:
            expected = Pubkey.create_program_address([*seeds, bytes([bump])], self.call.program)
        except ValueError:
            raise self.refuse(2006, key) from None
        self.must(key == expected, key, 2006)

    def writable(self, *keys: Pubkey) -> None:
        """The accounts must have been given for writing."""
        for key in keys:
            self.must(self.call.is_writable(key), key, 2000)

    def associated(self, key: Pubkey, owner: Pubkey, mint: Pubkey) -> None:
        """The account must be where ``owner`` keeps such tokens."""
        self.must(token_owner(self.call.account(key).data) == bytes(owner), key, 2015)
        self.must(key == associated_token_account(owner, mint), key, 2009)

    def load(self, key: Pubkey) -> CoordinatorAccount:
        """The run in a big account, whose version must be known."""
        data, programs = self.call.account(key).data, self.call.layer.programs
        if len(data) < programs.account_size:
            raise Failure("ProgramFailedToComplete")
        version = int.from_bytes(data[_DISCRIMINATOR : _DISCRIMINATOR + 8], "little")
        self.must(version == programs.account_version, key)
        try:
            return decoded(data)
        except ProtocolError:
            raise Failure("ProgramFailedToComplete") from None
