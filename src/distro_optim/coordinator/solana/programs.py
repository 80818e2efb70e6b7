"""Which programs a run is coordinated by, and where their accounts are.

PsycheFoundation/psyche, ``architectures/decentralized``. A program knows its own id, and every fork and every
deployment has ids of its own: with a wrong one, all addresses below are those of other accounts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from solders.pubkey import Pubkey

from ...errors import ConfigurationError
from ..formats.account import account_size
from ..types import RUN_ID_MAX_LEN

__all__ = [
    "ASSOCIATED_TOKEN_PROGRAM",
    "CLOCK_SYSVAR",
    "EVERYBODY",
    "FIRST_WITH_CLAIMERS",
    "JOIN_SCOPE",
    "NATIVE_LOADER",
    "SYSTEM_PROGRAM",
    "TOKEN_PROGRAM",
    "UPGRADEABLE_LOADER",
    "Programs",
    "account_discriminator",
    "associated_token_account",
    "default_treasurer_index",
    "instruction_discriminator",
    "optional_key",
    "parse_key",
]

SYSTEM_PROGRAM: Final = Pubkey.default()
TOKEN_PROGRAM: Final = Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA")
ASSOCIATED_TOKEN_PROGRAM: Final = Pubkey.from_string("ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL")
CLOCK_SYSVAR: Final = Pubkey.from_string("SysvarC1ock11111111111111111111111111111111")

NATIVE_LOADER: Final = Pubkey.from_string("NativeLoader1111111111111111111111111111111")
"""Owns the programs that are a part of the node."""

UPGRADEABLE_LOADER: Final = Pubkey.from_string("BPFLoaderUpgradeab1e11111111111111111111111")
"""Owns the programs that can be deployed again, as Anchor's are."""

EVERYBODY: Final = Pubkey.default()
"""The grantee of an authorization that lets any wallet in."""

JOIN_SCOPE: Final = b"CoordinatorJoinRun"
"""What an authorization to join a run is for."""

FIRST_WITH_CLAIMERS: Final = 2
"""The version of accounts since which each client names the wallet that is paid."""

_DISCRIMINATOR: Final = 8


def instruction_discriminator(name: str) -> bytes:
    """The 8 bytes with which the data of an instruction begin, as Anchor derives them from its name."""
    return hashlib.sha256(f"global:{name}".encode()).digest()[:_DISCRIMINATOR]


def account_discriminator(name: str) -> bytes:
    """The 8 bytes with which the data of an account begin."""
    return hashlib.sha256(f"account:{name}".encode()).digest()[:_DISCRIMINATOR]


def parse_key(text: str, name: str = "key") -> Pubkey:
    """A public key in base58.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        return Pubkey.from_string(text)
    except ValueError:
        raise ConfigurationError(
            f"{name} is {text!r}, which is no public key: 32 bytes in base58 are needed", name=name, value=text
        ) from None


def optional_key(text: str | None, name: str) -> Pubkey | None:
    """The same for a key that need not be given."""
    return None if text is None else parse_key(text, name)


def associated_token_account(owner: Pubkey, mint: Pubkey) -> Pubkey:
    """Where ``owner`` keeps its tokens of one kind."""
    return Pubkey.find_program_address([bytes(owner), bytes(TOKEN_PROGRAM), bytes(mint)], ASSOCIATED_TOKEN_PROGRAM)[0]


def default_treasurer_index(run_id: str) -> int:
    """The number of a run's treasury, where nobody chose another."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Programs:
    """The programs of one deployment; those of Psyche's own source by default.

    Args:
        coordinator: keeps the state of runs.
        authorizer: keeps who may join.
        treasurer: pays for points.
        account_version: of the accounts of their runs, see :mod:`~distro_optim.coordinator.formats.account`. What some
            instructions take depends on it.
    """

    coordinator: Pubkey = field(
        default_factory=lambda: Pubkey.from_string("4SHugWqSXwKE5fqDchkJcPEqnoZE22VYKtSTVm7axbT7")
    )
    authorizer: Pubkey = field(
        default_factory=lambda: Pubkey.from_string("PsyAUmhpmiUouWsnJdNGFSX8vZ6rWjXjgDPHsgqPGyw")
    )
    treasurer: Pubkey = field(
        default_factory=lambda: Pubkey.from_string("EnU7DRx5az5YWxaxgqEGbXSYtudcfnjXewyBRRZCjJPw")
    )
    account_version: int = 1

    @property
    def account_size(self) -> int:
        """Bytes of the big account of a run.

        Raises:
            ConfigurationError: accounts of this version are not known.
        """
        return account_size(self.account_version)

    @property
    def has_claimers(self) -> bool:
        """Whether another wallet than the one that trains can be paid for its points: from version 2 on."""
        return self.account_version >= FIRST_WITH_CLAIMERS

    def instance(self, run_id: str) -> Pubkey:
        """The small account that names the run's authorities and its big account.

        Raises:
            ConfigurationError: no run can have this name.
        """
        return self.instance_and_bump(run_id)[0]

    def instance_and_bump(self, run_id: str) -> tuple[Pubkey, int]:
        """The same, and the byte that keeps the address off the curve."""
        data = run_id.encode(errors="surrogateescape")
        if not 0 < len(data) <= RUN_ID_MAX_LEN:
            raise ConfigurationError(
                f"run_id {run_id!r} has {len(data)} bytes, but the name of a run has 1 to {RUN_ID_MAX_LEN}",
                name="run_id",
                value=run_id,
            )
        return Pubkey.find_program_address([b"coordinator", data], self.coordinator)

    def authorization(self, grantor: Pubkey, grantee: Pubkey, scope: bytes = JOIN_SCOPE) -> Pubkey:
        """What ``grantor`` allows ``grantee``, and those it delegates to."""
        return Pubkey.find_program_address([b"Authorization", bytes(grantor), bytes(grantee), scope], self.authorizer)[
            0
        ]

    def treasury(self, index: int) -> Pubkey:
        """The treasury that pays for a run's points; see :func:`default_treasurer_index`."""
        return Pubkey.find_program_address([b"Run", index.to_bytes(8, "little")], self.treasurer)[0]

    def treasury_of(self, run_id: str) -> Pubkey:
        """The treasury of a run whose number nobody chose."""
        return self.treasury(default_treasurer_index(run_id))

    def participant(self, treasury: Pubkey, user: Pubkey) -> Pubkey:
        """What a treasury has paid to ``user``."""
        return Pubkey.find_program_address([b"Participant", bytes(treasury), bytes(user)], self.treasurer)[0]
