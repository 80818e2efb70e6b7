"""The small accounts around a run, in borsh behind the 8 bytes that name their kind.

PsycheFoundation/psyche: ``CoordinatorInstance`` in ``solana-coordinator``, ``Authorization`` in ``solana-authorizer``,
``Run`` and ``Participant`` in ``solana-treasurer``. An account may be larger than its value; the rest is zero and has
no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

from ...comm.postcard import I64, U8, U64, Bytes32
from ...errors import ProtocolError
from ..formats import borsh
from .programs import EVERYBODY, account_discriminator

__all__ = [
    "AUTHORIZATION_BYTES",
    "INSTANCE_BYTES",
    "MINT_BYTES",
    "PARTICIPANT_BYTES",
    "PROGRAM_DATA_HEAD",
    "TOKEN_ACCOUNT_BYTES",
    "TREASURY_BYTES",
    "Authorization",
    "CoordinatorInstance",
    "Participant",
    "TokenAccount",
    "Treasury",
    "authorization_bytes",
    "deployment_slot",
    "discriminator_of",
    "has_delegate",
    "mint_decimals",
    "program_data_of",
    "read_clock",
    "read_small_account",
    "write_small_account",
]

T = TypeVar("T")

INSTANCE_BYTES: Final = 173
TREASURY_BYTES: Final = 200
PARTICIPANT_BYTES: Final = 32
AUTHORIZATION_BYTES: Final = 90
"""Of an authorization without its scope and its delegates."""

MAX_SMALL_ACCOUNT: Final = 1 << 20
"""Bytes of a small account that are read at most. An authorization of 256 delegates has 8 300; chosen arbitrarily."""

TOKEN_ACCOUNT_BYTES: Final = 165
MINT_BYTES: Final = 82

_DELEGATE_TAG: Final = slice(72, 76)
_DECIMALS_AT: Final = 44
_CLOCK_BYTES: Final = 40
_KEY: Final = 32


def authorization_bytes(scope_length: int, delegates: int) -> int:
    """Bytes of an authorization."""
    return AUTHORIZATION_BYTES + scope_length + _KEY * delegates


@dataclass(frozen=True)
class CoordinatorInstance:
    """What a run is and who may change it.

    Attributes:
        bump: belongs to its address.
        main_authority: key of the operator, or the treasury that speaks for it.
        join_authority: key that grants authorizations to join.
        coordinator_account: address of the big account.
        run_id: name of the run.
    """

    bump: U8
    main_authority: Bytes32
    join_authority: Bytes32
    coordinator_account: Bytes32
    run_id: str


@dataclass(frozen=True)
class Authorization:
    """What a key allows another.

    Attributes:
        grantee: who may; 32 zero bytes stand for everybody.
        scope: what it is for.
        active: an authorization is inactive at first.
        delegates: keys that the grantee lets in.
        grantor_update_unix_timestamp: when the grantor last changed ``active``.
    """

    bump: U8
    grantor: Bytes32
    grantee: Bytes32
    scope: bytes
    active: bool
    delegates: tuple[Bytes32, ...]
    grantor_update_unix_timestamp: I64

    def is_valid_for(self, grantor: bytes, grantee: bytes, scope: bytes) -> bool:
        """Whether ``grantor`` lets ``grantee`` do what ``scope`` names, as the program decides it."""
        if not self.active or self.grantor != grantor or self.scope != scope:
            return False
        return self.grantee in (bytes(EVERYBODY), grantee) or grantee in self.delegates


@dataclass(frozen=True)
class Treasury:
    """The treasurer's ``Run``: it owns the tokens that pay for a run's points, and stands for the run's operator."""

    bump: U8
    index: U64
    main_authority: Bytes32
    join_authority: Bytes32
    coordinator_account: Bytes32
    coordinator_instance: Bytes32
    collateral_mint: Bytes32
    total_claimed_collateral_amount: U64
    total_claimed_earned_points: U64


@dataclass(frozen=True)
class Participant:
    """What one wallet has been paid by a treasury."""

    bump: U8
    claimed_collateral_amount: U64
    claimed_earned_points: U64


_KINDS: Final[dict[type, bytes]] = {
    CoordinatorInstance: account_discriminator("CoordinatorInstance"),
    Authorization: account_discriminator("Authorization"),
    Treasury: account_discriminator("Run"),
    Participant: account_discriminator("Participant"),
}


def discriminator_of(kind: type) -> bytes:
    """The 8 bytes that name a kind of account."""
    return _KINDS[kind]


def read_small_account(kind: type[T], data: bytes) -> T:
    """The value of a small account.

    Raises:
        ProtocolError: it is too large, of another kind, or not readable.
    """
    if len(data) > MAX_SMALL_ACCOUNT:
        raise ProtocolError(f"an account of {len(data)} bytes is no {kind.__name__}: that has at most a few thousand")
    discriminator = _KINDS[kind]
    if data[: len(discriminator)] != discriminator:
        raise ProtocolError(f"the account is no {kind.__name__}", field="discriminator", offset=0)
    return borsh.decode(kind, data[len(discriminator) :], allow_trailing=True)


def write_small_account(value: CoordinatorInstance | Authorization | Treasury | Participant, size: int) -> bytes:
    """The bytes of an account, filled up with zeros to ``size``."""
    return (_KINDS[type(value)] + borsh.encode(value)).ljust(size, b"\0")


def read_clock(data: bytes) -> tuple[int, int]:
    """Slot and Unix time in seconds from the cluster's clock.

    Raises:
        ProtocolError: it is no clock.
    """
    if len(data) != _CLOCK_BYTES:
        raise ProtocolError(f"the cluster's clock has {_CLOCK_BYTES} bytes, not {len(data)}")
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[32:], "little", signed=True)


# -- programs ----------------------------------------------------------------------------------------------------------

PROGRAM_DATA_HEAD: Final = 12
"""Bytes before the code and its authority: the kind, and the slot of the last deployment."""

_PROGRAM: Final = 2
_PROGRAM_DATA: Final = 3
_PROGRAM_BYTES: Final = 36


def program_data_of(data: bytes) -> bytes:
    """The address of the account that holds the code of a program that can be deployed again (32 bytes).

    Solana's ``UpgradeableLoaderState`` in bincode: the kind as u32, then its values.

    Raises:
        ProtocolError: the account is no such program.
    """
    if len(data) < _PROGRAM_BYTES or int.from_bytes(data[:4], "little") != _PROGRAM:
        raise ProtocolError("the account is no program that can be deployed again")
    return data[4:_PROGRAM_BYTES]


def deployment_slot(data: bytes) -> int:
    """The slot in which the code was last deployed, from the head of the account that holds it.

    Raises:
        ProtocolError: it holds no code.
    """
    if len(data) < PROGRAM_DATA_HEAD or int.from_bytes(data[:4], "little") != _PROGRAM_DATA:
        raise ProtocolError("the account holds no code of a program")
    return int.from_bytes(data[4:PROGRAM_DATA_HEAD], "little")


# -- tokens ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenAccount:
    """The start of an account of the token program; it names no kind of its own."""

    mint: Bytes32
    owner: Bytes32
    amount: U64

    @classmethod
    def read(cls, data: bytes) -> TokenAccount:
        """Raises ProtocolError if the bytes are not those of such an account."""
        if len(data) != TOKEN_ACCOUNT_BYTES:
            raise ProtocolError(f"a token account has {TOKEN_ACCOUNT_BYTES} bytes, not {len(data)}")
        return borsh.decode(cls, data, allow_trailing=True)


def has_delegate(data: bytes) -> bool:
    """Whether somebody beside its owner may spend what a token account holds."""
    return any(data[_DELEGATE_TAG])


def mint_decimals(data: bytes) -> int:
    """How many digits after the point people write of these tokens.

    Raises:
        ProtocolError: it is no mint.
    """
    if len(data) != MINT_BYTES:
        raise ProtocolError(f"a mint has {MINT_BYTES} bytes, not {len(data)}")
    return data[_DECIMALS_AT]
