"""What is planned, as transactions with what they cost, to be shown before anything is sent. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from typing_extensions import override

from .arguments import RunUpdate
from .fees import FEE_PER_SIGNATURE, KEPT_IN_A_WALLET, shown_sol
from .sending import MAX_TRANSACTION_BYTES

__all__ = ["Step", "in_parts", "needed_for", "transaction_bytes"]

_BYTES_OF_SIGNATURE: Final = 64


@dataclass(frozen=True)
class Step:
    """One transaction.

    Attributes:
        what: it does, in words.
        instructions: in it.
        signers: who signs besides the wallet.
        deposit: lamports that stay in the accounts that it makes.
        forever: nobody can close those accounts; else the lamports come back when somebody does.
    """

    what: str
    instructions: Sequence[Instruction]
    signers: Sequence[Keypair] = ()
    deposit: int = 0
    forever: bool = False

    @property
    def fee(self) -> int:
        """Lamports that are gone."""
        return FEE_PER_SIGNATURE * (1 + len(self.signers))

    @override
    def __str__(self) -> str:
        until = "for good" if self.forever else "until it is closed"
        deposit = f", and {shown_sol(self.deposit)} stay in it {until}" if self.deposit else ""
        return f"{self.what}: costs {shown_sol(self.fee)}{deposit}"


def needed_for(steps: Sequence[Step]) -> int:
    """Lamports that a wallet must hold for all of it, with what must always stay there."""
    return sum(step.fee + step.deposit for step in steps) + KEPT_IN_A_WALLET


def transaction_bytes(payer: Pubkey, instructions: Sequence[Instruction]) -> int:
    """How long a signed transaction is."""
    message = Message(list(instructions), payer)
    return 1 + _BYTES_OF_SIGNATURE * message.header.num_required_signatures + len(bytes(message))


def in_parts(
    payer: Pubkey, changes: Sequence[RunUpdate], instructions_of: Callable[[RunUpdate], Sequence[Instruction]]
) -> list[RunUpdate]:
    """Changes of a run, as few as fit in transactions.

    Args:
        payer: who signs and pays.
        changes: what belongs together; no two change the same. Each fits by itself, and the order stays.
        instructions_of: makes the instructions of a change.
    """
    parts: list[RunUpdate] = []
    for change in changes:
        both = _merged(parts[-1], change) if parts else change
        if parts and transaction_bytes(payer, instructions_of(both)) <= MAX_TRANSACTION_BYTES:
            parts[-1] = both
        else:
            parts.append(change)
    return parts


def _merged(first: RunUpdate, second: RunUpdate) -> RunUpdate:
    given = {field.name: value for field in fields(second) if (value := getattr(second, field.name)) is not None}
    return replace(first, **given)
