"""Which programs a run on Solana is coordinated by: presets for those of Psyche's source, and files of one's own. No
I/O but reading such a file.

PsycheFoundation/psyche, ``declare_id!`` of each program and its history. A program knows its own id, and every
deployment that is not Psyche's has others.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Final

from ..errors import ConfigurationError

__all__ = ["DEFAULT_DEPLOYMENT", "DEPLOYMENTS", "SolanaDeployment", "deployment_of"]

MAX_FILE_BYTES: Final = 64 * 1024
"""Of a file that names four values; chosen arbitrarily."""


@dataclass(frozen=True)
class SolanaDeployment:
    """Ids in base58, and what runs look like there.

    Attributes:
        coordinator: keeps the state of runs.
        authorizer: keeps who may join.
        treasurer: pays for points.
        account_version: of the accounts of runs; 0 before they had a number, when they held other settings.
    """

    coordinator: str
    authorizer: str
    treasurer: str
    account_version: int = 1


_NEWEST: Final = SolanaDeployment(
    coordinator="4SHugWqSXwKE5fqDchkJcPEqnoZE22VYKtSTVm7axbT7",
    authorizer="PsyAUmhpmiUouWsnJdNGFSX8vZ6rWjXjgDPHsgqPGyw",
    treasurer="EnU7DRx5az5YWxaxgqEGbXSYtudcfnjXewyBRRZCjJPw",
)

DEFAULT_DEPLOYMENT: Final = "psyche"

DEPLOYMENTS: Final = {
    DEFAULT_DEPLOYMENT: _NEWEST,
    "psyche-claimers": replace(_NEWEST, account_version=2),
    "psyche-2025": SolanaDeployment(
        coordinator="HR8RN2TP9E9zsi2kjhvPbirJWA1R6L6ruf4xNNGpjU5Y",
        authorizer="PsyAUmhpmiUouWsnJdNGFSX8vZ6rWjXjgDPHsgqPGyw",
        treasurer="vVeH6Xd43HAScbxjVtvfwDGqBMaMvNDLsAxwM5WK1pG",
        account_version=0,
    ),
}
"""Psyche's source since 2025-12-09, as it was on 2026-03-05, and from 2025-07-31 to 2025-12-05."""


def deployment_of(name: str | PathLike[str]) -> SolanaDeployment:
    """A preset by its name, or what a TOML file says; what the file leaves out is as in Psyche's source.

    Raises:
        ConfigurationError: there is no such preset and no such file, or the file says something else.
    """
    preset = DEPLOYMENTS.get(str(name))
    if preset is not None:
        return preset
    file = Path(name)
    if file.suffix != ".toml" and not file.is_file():
        raise ConfigurationError(
            f"there are no programs {str(name)!r}, only {', '.join(DEPLOYMENTS)}, and those that a TOML file names",
            name="programs",
            value=str(name),
        )
    try:
        with file.open("rb") as handle:
            data = handle.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigurationError(
                f"{file} is too large to name programs: {MAX_FILE_BYTES} bytes at most", name="programs"
            )
        values = tomllib.loads(data.decode())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} names no programs: {error}", name="programs") from None
    known = {field.name: int if field.name == "account_version" else str for field in fields(SolanaDeployment)}
    for key, value in values.items():
        if key not in known:
            raise ConfigurationError(f"{file}: there is no {key!r}, only {', '.join(known)}", name="programs")
        if type(value) is not known[key]:
            expected = "a number" if known[key] is int else "a key in base58, in quotation marks"
            raise ConfigurationError(f"{file}: {key} takes {expected}", name="programs", value=value)
    return replace(_NEWEST, **values)
