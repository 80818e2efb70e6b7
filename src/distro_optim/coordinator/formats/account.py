"""The account in which Psyche's Solana program keeps a run.

PsycheFoundation/psyche, ``architectures/decentralized/solana-coordinator/programs/solana-coordinator/src/{lib,
instance_state,clients_state,client}.rs``. The account is 8 bytes that name its kind and then one struct as it lies in
memory (:mod:`.raw`): 119160 bytes in version 1. In version 2, which Psyche's source had for a day in March 2026, each
client that ever joined has the key of a wallet that is paid for its points, and the account 125304 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, cast

from ...comm.postcard import U64, Fixed, Limit
from ...errors import ConfigurationError, ProtocolError
from ..types import MAX_NUM_CLIENTS, Coordinator, NodeIdentity, SmallBoolean
from .raw import Layout, layout_of

__all__ = [
    "ACCOUNT_SIZE",
    "DISCRIMINATOR",
    "VERSIONS",
    "ClientsEpochRates",
    "ClientsState",
    "ClientsStateV2",
    "CoordinatorAccount",
    "CoordinatorAccountV2",
    "CoordinatorInstanceState",
    "CoordinatorInstanceStateV2",
    "RunMetadata",
    "SolanaClient",
    "SolanaClientV2",
    "account_size",
    "client_version_bytes",
    "fresh_account",
    "nonce_of",
    "read_account",
    "version_of",
    "write_account",
]

DISCRIMINATOR: Final = bytes.fromhex("ef21b1372c9b562b")
"""The first 8 bytes of sha256("account:CoordinatorAccount")."""

ACCOUNT_SIZE: Final = 119160
"""Of version 1."""

SIZE_BEFORE_VERSIONS: Final = 119072
"""Of accounts from before December 2025, which hold other settings and no number of their version."""


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
        claimer: key of the wallet that may turn the points into tokens, in version 2; 8 unused bytes in version 1,
            where that is the signer.
        earned: points.
        slashed: points.
        active: the epoch it joined for; pending while that equals :attr:`ClientsState.next_active`.
    """

    id: NodeIdentity
    claimer: Annotated[bytes, Fixed(8)]
    earned: U64
    slashed: U64
    active: U64


@dataclass(frozen=True)
class SolanaClientV2(SolanaClient):
    """The same in version 2."""

    claimer: Annotated[bytes, Fixed(32)]


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
class ClientsStateV2(ClientsState):
    """The same in version 2."""

    clients: Annotated[tuple[SolanaClientV2, ...], Limit(MAX_NUM_CLIENTS)]


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
class CoordinatorInstanceStateV2(CoordinatorInstanceState):
    """The same in version 2."""

    clients_state: ClientsStateV2


@dataclass(frozen=True)
class CoordinatorAccount:
    """The whole account.

    Attributes:
        version: of the account; 0 while it was only created.
        nonce: counts changes; of two copies the one with the higher number is newer.
    """

    version: U64
    state: CoordinatorInstanceState
    nonce: U64


@dataclass(frozen=True)
class CoordinatorAccountV2(CoordinatorAccount):
    """The same in version 2."""

    state: CoordinatorInstanceStateV2


_KINDS: Final[dict[int, type[CoordinatorAccount]]] = {1: CoordinatorAccount, 2: CoordinatorAccountV2}
_LAYOUTS: Final[dict[type[CoordinatorAccount], Layout]] = {kind: layout_of(kind) for kind in _KINDS.values()}
_SIZES: Final = {version: len(DISCRIMINATOR) + _LAYOUTS[kind].size for version, kind in _KINDS.items()}

VERSIONS: Final = tuple(_KINDS)
"""Of accounts, that are known."""

_NONCE_BYTES: Final = 8
_CLIENT_VERSION_FROM_END: Final = slice(-110, -14)


def account_size(version: int) -> int:
    """Bytes of an account.

    Raises:
        ConfigurationError: there is no such version.
    """
    size = _SIZES.get(version)
    if size is None:
        known = " and ".join(map(str, VERSIONS))
        raise ConfigurationError(
            f"accounts of runs of version {version} are not known, only of {known}",
            name="account_version",
            value=version,
        )
    return size


def fresh_account(version: int) -> CoordinatorAccount:
    """An account that was created and not initialized: all zeros.

    Raises:
        ConfigurationError: there is no such version.
    """
    zeros = bytes(account_size(version) - len(DISCRIMINATOR))
    return cast(CoordinatorAccount, _LAYOUTS[_KINDS[version]].read(zeros))


def nonce_of(data: bytes | bytearray | memoryview) -> int:
    """The change counter alone, without reading the rest. The bytes must be those of an account."""
    return int.from_bytes(data[-_NONCE_BYTES:], "little")


def client_version_bytes(data: bytes) -> bytes:
    """Where the client version stands (96 bytes), likewise."""
    return data[_CLIENT_VERSION_FROM_END]


def version_of(data: bytes | bytearray | memoryview) -> int:
    """The version of an account, from its size and its first bytes.

    Raises:
        ProtocolError: of a size, kind or version that is not known.
    """
    if len(data) not in _SIZES.values():
        old = ", as before December 2025," if len(data) == SIZE_BEFORE_VERSIONS else ","
        known = " or ".join(f"{size} (version {version})" for version, size in _SIZES.items())
        raise ProtocolError(f"the account of a run has {len(data)} bytes{old} not {known}")
    if bytes(data[: len(DISCRIMINATOR)]) != DISCRIMINATOR:
        raise ProtocolError("the account is not a coordinator account", field="discriminator", offset=0)
    version = int.from_bytes(data[len(DISCRIMINATOR) : len(DISCRIMINATOR) + 8], "little")
    if _SIZES.get(version) != len(data):
        known = ", ".join(f"{number} with {size} bytes" for number, size in _SIZES.items())
        raise ProtocolError(
            f"the account has version {version} and {len(data)} bytes, known is {known}", field="version", offset=8
        )
    return version


def write_account(account: CoordinatorAccount) -> bytes:
    """The bytes of an account, :func:`account_size` of them; padding and unused slots are zero.

    Raises:
        ConfigurationError: a value does not fit its field.
    """
    return DISCRIMINATOR + _LAYOUTS[type(account)].write(account)


def read_account(data: bytes | bytearray | memoryview) -> CoordinatorAccount:
    """Reads the bytes of an account of any known version, with the checks of the program in its order.

    Raises:
        ProtocolError: of another size, kind or version, or a field does not hold a value of its type.
    """
    layout = _LAYOUTS[_KINDS[version_of(data)]]
    return cast(CoordinatorAccount, layout.read(data, len(DISCRIMINATOR)))
