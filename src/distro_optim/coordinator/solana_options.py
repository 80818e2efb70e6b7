"""How a script takes part in a run on Solana: which cluster, whose wallet, and what may be spent. No I/O.

Plain values, which can be pickled, and no import of anything that only runs on Solana need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from os import PathLike
from typing import Final

from .solana_deployments import DEFAULT_DEPLOYMENT

__all__ = ["DEFAULT_CLUSTER", "DEFAULT_WALLET", "LAMPORTS_PER_SOL", "SolanaOptions", "lamports", "shown_sol"]

LAMPORTS_PER_SOL: Final = 1_000_000_000

DEFAULT_WALLET: Final = "~/.config/solana/id.json"
"""Where ``solana-keygen new`` writes a wallet."""

DEFAULT_CLUSTER: Final = "devnet"
"""Where Psyche's own runs are."""


@dataclass(frozen=True, kw_only=True)
class SolanaOptions:
    """Keys are in base58.

    Attributes:
        wallet: file with the wallet that signs and pays, as ``solana-keygen`` writes it. If none is
            named and ``RAW_WALLET_PRIVATE_KEY`` is set, as in the containers of Psyche's client, the wallet is its
            text.
        cluster: ``"devnet"``, ``"mainnet"`` or ``"localhost"``.
        rpc: http addresses of nodes, in the order in which they are tried; in place of the cluster's public ones.
        websockets: ws addresses of the same; by default those of ``rpc`` with the other scheme.
        authorizer: key that was authorized and has the wallet among its delegates.
        join_authority: key that must let wallets in, to be sure whose run it is: anybody can take any free name.
        main_authority: key that must operate the run, or of a run whose points are paid its treasury; likewise.
        client_version: which client the run must be for; None takes any.
        max_fees: lamports that may be spent in all; None sets no limit.
        compute_unit_price: offered to a busy cluster so that it takes our transactions first, in millionths of a
            lamport for each of 200,000 units: 5,000 make a transaction cost 1,000 lamports more. 0 offers nothing.
        programs: which programs coordinate the run: ``"psyche"``, another of
            :data:`~distro_optim.coordinator.solana_deployments.DEPLOYMENTS`, or a TOML file with ids of one's own.
        account_version: of the run's account, 1 or 2; by default as those programs have it. Another is refused.
        claimer: key of the wallet that may turn the points into tokens, in accounts of version 2; by default ours.
        coordinator_program: id of the coordinator program, in place of that among ``programs``.
        authorizer_program: likewise of the authorizer.
        treasurer_program: likewise of the treasurer.
    """

    wallet: str | PathLike[str] = DEFAULT_WALLET
    cluster: str = DEFAULT_CLUSTER
    rpc: Sequence[str] = ()
    websockets: Sequence[str] = ()
    authorizer: str | None = None
    join_authority: str | None = None
    main_authority: str | None = None
    client_version: str | None = None
    max_fees: int | None = None
    compute_unit_price: int = 0
    programs: str | PathLike[str] = DEFAULT_DEPLOYMENT
    account_version: int | None = None
    claimer: str | None = None
    coordinator_program: str | None = None
    authorizer_program: str | None = None
    treasurer_program: str | None = None


def shown_sol(lamports: int) -> str:
    """An amount as people read it."""
    return f"{lamports / LAMPORTS_PER_SOL:.9f}".rstrip("0").rstrip(".") + " SOL"


def lamports(text: str) -> int:
    """An amount in SOL, as people write it, in lamports.

    Raises:
        ValueError: it is no amount, or has more than nine decimals.
    """
    try:
        amount = Decimal(text.strip()) * LAMPORTS_PER_SOL
    except InvalidOperation:
        raise ValueError(text) from None
    if not amount.is_finite() or amount < 0 or amount != int(amount):
        raise ValueError(text)
    return int(amount)
