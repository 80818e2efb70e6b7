"""What a validator takes and what it answers.

A transaction is one of these:

* :class:`Transaction`: who pays and the instructions, without signatures; the quickest for tests.
* solders' ``Transaction`` or ``VersionedTransaction``, or its bytes as they travel: signatures, blockhash and size are
  checked as on a cluster.
* a recorded one: a dict with ``payer``, ``instructions`` (each ``program``, ``data`` in base64 and ``accounts`` as
  lists of key, signs, writable), and perhaps ``slot`` and ``unix_timestamp``, to which the clock is set.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from solders.hash import Hash
from solders.instruction import AccountMeta, CompiledInstruction, Instruction
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import Transaction as LegacyTransaction
from solders.transaction import VersionedTransaction
from typing_extensions import override

__all__ = ["Outcome", "Transaction", "TransactionError", "transaction_of"]

MAX_TRANSACTION_BYTES: Final = 1232
"""What fits in one packet."""


@dataclass(frozen=True)
class TransactionError:
    """Why a transaction failed.

    Attributes:
        kind: ``InstructionError``, or what was wrong with the transaction itself, such as ``BlockhashNotFound``.
        index: of the instruction that failed.
        detail: number of a program's own error, or the name of one of the cluster's.
    """

    kind: str
    index: int = 0
    detail: int | str = ""

    @override
    def __str__(self) -> str:
        if self.kind != "InstructionError":
            return self.kind if self.detail == "" else f"{self.kind}({self.detail})"
        detail = f"Custom({self.detail})" if isinstance(self.detail, int) else self.detail
        return f"InstructionError({self.index}, {detail})"

    @property
    def json(self) -> Any:
        """As the JSON-RPC interface gives it."""
        if self.kind != "InstructionError":
            return self.kind if self.detail == "" else {self.kind: {"account_index": self.detail}}
        return {self.kind: [self.index, {"Custom": self.detail} if isinstance(self.detail, int) else self.detail]}


@dataclass(frozen=True)
class Outcome:
    """What became of a transaction.

    Attributes:
        error: as text, such as ``"InstructionError(0, Custom(6015))"``; None if all went well.
        reason: the same in parts.
        logs: what the programs wrote.
        fee: lamports that were paid.
        signature: of a signed transaction.
        slot: in which it was processed.
    """

    error: str | None
    reason: TransactionError | None
    logs: tuple[str, ...]
    fee: int
    signature: Signature | None
    slot: int


@dataclass(frozen=True)
class Transaction:
    """Instructions that are carried out together, or not at all.

    Attributes:
        payer: pays the fee.
        instructions: in their order.
        slot, unix_timestamp: what the clock is set to before; None leaves it.
        signed: what was signed, and how; None for a transaction whose signers are taken at their word.
        size: bytes on the wire, if it was signed.
    """

    payer: Pubkey
    instructions: Sequence[Instruction]
    slot: int | None = None
    unix_timestamp: int | None = None
    signed: VersionedTransaction | None = None
    size: int = 0

    @property
    def blockhash(self) -> Hash | None:
        """The recent blockhash of a signed transaction."""
        return None if self.signed is None else self.signed.message.recent_blockhash

    @property
    def signers(self) -> set[Pubkey]:
        """Payer included."""
        metas = [meta for instruction in self.instructions for meta in instruction.accounts]
        return {self.payer, *(meta.pubkey for meta in metas if meta.is_signer)}


def transaction_of(given: Any) -> Transaction:
    """Reads any of the forms above.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(given, Transaction):
        return given
    if isinstance(given, Mapping):
        return _recorded(given)
    if isinstance(given, bytes | bytearray | memoryview):
        data = bytes(given)
        if len(data) > MAX_TRANSACTION_BYTES:
            raise ValueError(f"a transaction of {len(data)} bytes is too large, at most {MAX_TRANSACTION_BYTES} fit")
        return _signed(VersionedTransaction.from_bytes(data))
    if isinstance(given, LegacyTransaction):
        return _signed(VersionedTransaction.from_legacy(given))
    if isinstance(given, VersionedTransaction):
        return _signed(given)
    raise ValueError(f"{type(given).__name__} is no transaction")


def _recorded(line: Mapping[str, Any]) -> Transaction:
    instructions = [
        Instruction(
            Pubkey.from_string(plain["program"]),
            base64.b64decode(plain["data"]),
            [AccountMeta(Pubkey.from_string(key), signs, writes) for key, signs, writes in plain["accounts"]],
        )
        for plain in line["instructions"]
    ]
    return Transaction(Pubkey.from_string(line["payer"]), instructions, line.get("slot"), line.get("unix_timestamp"))


def _signed(transaction: VersionedTransaction) -> Transaction:
    message = transaction.message
    if not isinstance(message, Message | MessageV0):
        raise ValueError("a message of this version is not known here")
    if isinstance(message, MessageV0) and message.address_table_lookups:
        raise ValueError("address lookup tables are not known here")
    keys = message.account_keys
    if len(set(keys)) != len(keys) or not keys:
        raise ValueError("the accounts of a transaction are not distinct")
    try:
        instructions = [_expanded(message, keys, compiled) for compiled in message.instructions]
    except IndexError:
        raise ValueError("an instruction names an account that the transaction does not have") from None
    return Transaction(keys[0], instructions, signed=transaction, size=len(bytes(transaction)))


def _expanded(message: Message | MessageV0, keys: Sequence[Pubkey], compiled: CompiledInstruction) -> Instruction:
    header = message.header
    signing = header.num_required_signatures
    metas = []
    for index in compiled.accounts:
        if index < signing:
            writable = index < signing - header.num_readonly_signed_accounts
        else:
            writable = index < len(keys) - header.num_readonly_unsigned_accounts
        metas.append(AccountMeta(keys[index], index < signing, writable))
    return Instruction(keys[compiled.program_id_index], bytes(compiled.data), metas)
