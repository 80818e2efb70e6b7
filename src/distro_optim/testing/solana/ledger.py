"""Accounts, and what an instruction may do with them.

An instruction sees the accounts that it names through a :class:`Call`. What it changes lies in a layer of its own until
the whole transaction has gone well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from ...coordinator.formats.account import CoordinatorAccount, read_account, write_account
from ...coordinator.solana.programs import SYSTEM_PROGRAM, Programs
from .coordinator_twin import Clock

__all__ = ["Account", "Call", "Failure", "Layer", "rent"]

LAMPORTS_PER_BYTE: Final = 6960
BYTES_OF_EVERY_ACCOUNT: Final = 128

MAX_CALL_DEPTH: Final = 5
MAX_ACCOUNT_BYTES: Final = 10 * 1024 * 1024
MAX_DECODED: Final = 64
"""Big accounts whose decoded form is remembered. A run has one at a time, with a few copies of the past."""


def rent(size: int) -> int:
    """Lamports that an account of ``size`` bytes must hold."""
    return (BYTES_OF_EVERY_ACCOUNT + size) * LAMPORTS_PER_BYTE


@dataclass(frozen=True)
class Account:
    """An account.

    Attributes:
        lamports: what it holds.
        data: its bytes.
        owner: the program that may change them, in base58.
        executable: whether it is a program.
    """

    lamports: int
    data: bytes = b""
    owner: str = str(SYSTEM_PROGRAM)
    executable: bool = False


class Failure(Exception):
    """An instruction failed.

    Attributes:
        detail: number of a program's own error, or the name of one of the cluster's.
    """

    def __init__(self, detail: int | str) -> None:
        super().__init__(str(detail))
        self.detail = detail


class Layer:
    """Accounts as one transaction has them: those of the ledger, and on top what has changed so far."""

    def __init__(self, below: Mapping[str, Account], programs: Programs, clock: Clock) -> None:
        self._below = below
        self.programs = programs
        self.clock = clock
        self.changed: dict[str, Account | None] = {}
        self.logs: list[str] = []

    def get(self, key: Pubkey) -> Account | None:
        """The account at ``key``, if there is one."""
        name = str(key)
        return self.changed[name] if name in self.changed else self._below.get(name)

    def put(self, key: Pubkey, account: Account) -> None:
        """Changes an account; one without lamports is gone."""
        self.changed[str(key)] = account if account.lamports else None


_DECODED: dict[int, tuple[bytes, CoordinatorAccount]] = {}


def decoded(data: bytes) -> CoordinatorAccount:
    """The run in the bytes of a big account; the same bytes are read once."""
    known = _DECODED.get(id(data))
    if known is None or known[0] is not data:
        known = _remember(data, read_account(data))
    return known[1]


def encoded(account: CoordinatorAccount) -> bytes:
    """The bytes of a big account."""
    return _remember(write_account(account), account)[0]


def _remember(data: bytes, account: CoordinatorAccount) -> tuple[bytes, CoordinatorAccount]:
    if len(_DECODED) >= MAX_DECODED:
        _DECODED.pop(next(iter(_DECODED)))
    known = _DECODED[id(data)] = (data, account)
    return known


Program = Callable[["Call"], None]


@dataclass
class Call:
    """One instruction under way.

    Attributes:
        layer: the accounts.
        program: that runs.
        data: what it is told.
        metas: the accounts it was given, with their rights.
        table: the programs there are.
        depth: 1 for an instruction of the transaction, more for what programs call.
    """

    layer: Layer
    program: Pubkey
    data: bytes
    metas: Sequence[AccountMeta]
    table: Mapping[str, Program]
    depth: int = 1
    logs: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.logs = self.layer.logs

    def account(self, key: Pubkey) -> Account:
        """The account at ``key``; one that does not exist is empty and belongs to the system."""
        return self.layer.get(key) or Account(0)

    def is_signer(self, key: Pubkey) -> bool:
        """Whether ``key`` has signed."""
        return any(meta.pubkey == key and meta.is_signer for meta in self.metas)

    def is_writable(self, key: Pubkey) -> bool:
        """Whether the instruction may change the account."""
        return any(meta.pubkey == key and meta.is_writable for meta in self.metas)

    def write(self, key: Pubkey, data: bytes) -> None:
        """Replaces the bytes of an account that the program owns."""
        account = self.account(key)
        if not self.is_writable(key):
            raise Failure("ReadonlyDataModified")
        self.layer.put(key, replace(account, data=data))

    def move(self, source: Pubkey, target: Pubkey, lamports: int) -> None:
        """Moves lamports out of an account that the program owns."""
        if not (self.is_writable(source) and self.is_writable(target)):
            raise Failure("ReadonlyLamportChange")
        if source == target or not lamports:
            return
        giver, taker = self.account(source), self.account(target)
        self.layer.put(source, replace(giver, lamports=giver.lamports - lamports))
        self.layer.put(target, replace(taker, lamports=taker.lamports + lamports))

    def close(self, key: Pubkey, spill: Pubkey) -> None:
        """Removes an account; its lamports go to ``spill``."""
        self.move(key, spill, self.account(key).lamports)

    def invoke(self, instruction: Instruction, signers: Sequence[Pubkey] = ()) -> None:
        """Calls another program.

        Args:
            instruction: what to do. It gets no right that this instruction does not have.
            signers: addresses of this program for which it signs.

        Raises:
            Failure: the other program failed, or there is none.
        """
        for meta in instruction.accounts:
            if meta.is_signer and not (self.is_signer(meta.pubkey) or meta.pubkey in signers):
                raise Failure("PrivilegeEscalation")
            if meta.is_writable and not self.is_writable(meta.pubkey):
                raise Failure("PrivilegeEscalation")
        run(
            Call(self.layer, instruction.program_id, instruction.data, instruction.accounts, self.table, self.depth + 1)
        )


def run(call: Call) -> None:
    """Runs a program.

    Raises:
        Failure: it failed.
    """
    name = str(call.program)
    program = call.table.get(name)
    if program is None:
        raise Failure("UnsupportedProgramId")
    if call.depth > MAX_CALL_DEPTH:
        raise Failure("CallDepth")
    call.logs.append(f"Program {name} invoke [{call.depth}]")
    try:
        program(call)
    except Failure as failure:
        detail = failure.detail
        call.logs.append(
            f"Program {name} failed: "
            + (f"custom program error: {hex(detail)}" if isinstance(detail, int) else str(detail))
        )
        raise
    call.logs.append(f"Program {name} success")
