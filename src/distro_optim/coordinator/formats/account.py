"""The account in which Psyche's Solana program keeps a run.

PsycheFoundation/psyche, ``architectures/decentralized/solana-coordinator/programs/solana-coordinator/src/{lib,
instance_state,clients_state,client}.rs``. The account is 8 bytes that name its kind and then one struct as it lies in
memory (:mod:`.raw`), 119160 bytes in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, cast

from ...comm.postcard import U64, Fixed, Limit
from ...errors import ProtocolError
from ..types import MAX_NUM_CLIENTS, Coordinator, NodeIdentity, SmallBoolean
from .raw import Layout, layout_of

__all__ = [
    "ACCOUNT_SIZE",
    "DISCRIMINATOR",
    "ClientsEpochRates",
    "ClientsState",
    "CoordinatorAccount",
    "CoordinatorInstanceState",
    "RunMetadata",
    "SolanaClient",
    "nonce_of",
    "read_account",
    "write_account",
]

DISCRIMINATOR: Final = bytes.fromhex("ef21b1372c9b562b")
"""The first 8 bytes of sha256("account:CoordinatorAccount")."""

VERSION: Final = 1

ACCOUNT_SIZE: Final = 119160


@dataclass(frozen=True)
class RunMetadata:
    """What people read about a run."""

    name: Annotated[str, Limit(64)]
    description: Annotated[str, Limit(280)]
    num_parameters: U64
    vocab_size: U64


@dataclass(frozen=True)
class SolanaClient:
    """A signer that ever joined.

    Attributes:
        earned: points.
        slashed: points.
        active: the epoch it joined for; pending while that equals :attr:`ClientsState.next_active`.
    """

    id: NodeIdentity
    unused: Annotated[bytes, Fixed(8)]
    earned: U64
    slashed: U64
    active: U64


@dataclass(frozen=True)
class ClientsEpochRates:
    """Points an epoch."""

    earning_rate_total_shared: U64
    slashing_rate_per_client: U64


@dataclass(frozen=True)
class ClientsState:
    """All clients that ever joined."""

    clients: Annotated[tuple[SolanaClient, ...], Limit(MAX_NUM_CLIENTS)]
    next_active: U64
    current_epoch_rates: ClientsEpochRates
    future_epoch_rates: ClientsEpochRates

    def pending(self) -> tuple[NodeIdentity, ...]:
        """The clients that will be in the next epoch, in the order of the program."""
        return tuple(client.id for client in self.clients if client.active == self.next_active)


@dataclass(frozen=True)
class CoordinatorInstanceState:
    """The run, and what the chain keeps around it."""

    metadata: RunMetadata
    coordinator: Coordinator
    clients_state: ClientsState
    is_warmup_first_tick: SmallBoolean
    is_training_first_tick: SmallBoolean
    client_version: Annotated[str, Limit(96)]


@dataclass(frozen=True)
class CoordinatorAccount:
    """The whole account.

    Attributes:
        nonce: counts changes; of two copies the one with the higher number is newer.
    """

    version: U64
    state: CoordinatorInstanceState
    nonce: U64


_LAYOUT: Final[Layout] = layout_of(CoordinatorAccount)

_NONCE_AT: Final = ACCOUNT_SIZE - 8


def nonce_of(data: bytes | bytearray | memoryview) -> int:
    """The change counter alone, without reading the rest. The bytes must be those of an account."""
    return int.from_bytes(data[_NONCE_AT:ACCOUNT_SIZE], "little")


def write_account(account: CoordinatorAccount) -> bytes:
    """The bytes of an account, :data:`ACCOUNT_SIZE` of them; padding and unused slots are zero.

    Raises:
        ConfigurationError: a value does not fit its field.
    """
    return DISCRIMINATOR + _LAYOUT.write(account)


def read_account(data: bytes | bytearray | memoryview) -> CoordinatorAccount:
    """Reads the bytes of an account, with the checks of the program in its order.

    Raises:
        ProtocolError: of another size, kind or version, or a field does not hold a value of its type.
    """
    if len(data) != ACCOUNT_SIZE:
        raise ProtocolError(f"a coordinator account has {ACCOUNT_SIZE} bytes, not {len(data)}")
    if bytes(data[: len(DISCRIMINATOR)]) != DISCRIMINATOR:
        raise ProtocolError("the account is not a coordinator account", field="discriminator", offset=0)
    version = int.from_bytes(data[len(DISCRIMINATOR) : len(DISCRIMINATOR) + 8], "little")
    if version != VERSION:
        raise ProtocolError(f"the account has version {version}, known is {VERSION}", field="version", offset=8)
    return cast(CoordinatorAccount, _LAYOUT.read(data, len(DISCRIMINATOR)))
