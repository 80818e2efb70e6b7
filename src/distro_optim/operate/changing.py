"""``distro-optim run create``, ``pause`` and the like: what is planned is printed, and sent if that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ..coordinator.model import Gcs, GcsRepo, Hub, HubRepo
from ..coordinator.solana.fees import KEPT_IN_A_WALLET, shown_sol
from ..coordinator.solana.operating import Operator
from ..coordinator.solana.participation import programs_of
from ..coordinator.solana.programs import EVERYBODY, optional_key, parse_key
from ..coordinator.solana.rpc import RpcClient
from ..coordinator.solana.settings import Settings
from ..coordinator.solana.steps import Step, needed_for
from ..coordinator.solana.wallet import find_wallet
from ..coordinator.solana_clusters import cluster_of
from ..coordinator.solana_options import SolanaOptions
from ..errors import ConfigurationError
from .run_file import read_run_file

__all__ = ["ChangeOptions", "change"]


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """What to do with a run. Keys are in base58.

    Attributes:
        action: name of the subcommand.
        run_id: the run.
        options: cluster, wallet and programs.
        send: whether to do it, and not only to say what would be done.
        client_version: of ``create`` and ``configure``.
        join_authority: of ``create``; None takes the wallet.
        treasurer_collateral_mint: of ``create``, the tokens that pay for points.
        treasurer_index: of ``create``, the number of the treasury.
        file: of ``configure``.
        settings: of ``configure``, besides those in the file.
        key: of ``authorize``, or ``everybody``.
        keys: of ``delegate``.
        clear: of ``delegate``.
        revoke: of ``authorize``: no longer, in place of from now on.
        close: of ``authorize``: remove the authorization.
        repo, revision, bucket, prefix: of ``checkpoint``.
        unchecked_format: of ``checkpoint``: do not look whether the program knows its present form.
        points: of ``rates`` and ``claim``.
        user: of ``claim``: whose points, if not the wallet's own.
        slashing: of ``rates``.
        tokens: of ``fund``, in base units.
    """

    action: str
    run_id: str
    options: SolanaOptions
    send: bool = False
    client_version: str | None = None
    join_authority: str | None = None
    treasurer_collateral_mint: str | None = None
    treasurer_index: int | None = None
    file: Path | None = None
    settings: Settings = field(default_factory=Settings)
    key: str | None = None
    keys: Sequence[str] = ()
    clear: bool = False
    revoke: bool = False
    close: bool = False
    repo: str | None = None
    revision: str | None = None
    bucket: str | None = None
    prefix: str | None = None
    unchecked_format: bool = False
    points: int | None = None
    user: str | None = None
    slashing: int | None = None
    tokens: int = 0


DEFAULT_VERSION: Final = "distro-optim"
"""Which client a new run is for, if nothing is said."""


async def change(asked: ChangeOptions) -> list[str]:
    """Plans, and sends if that was asked for; returns what is to be printed.

    Raises:
        ConfigurationError: an option cannot work, or the wallet is not the one that may.
        DistroError: there is no such run, or the cluster refuses.
    """
    wallet = find_wallet(str(asked.options.wallet))
    rpc = RpcClient(cluster_of(asked.options.cluster, asked.options.rpc).rpc)
    try:
        operator = Operator(rpc, programs_of(asked.options), wallet, asked.run_id)
        steps = await _plan(operator, asked)
        if not steps:
            return ["nothing is to be done: it is so already"]
        lines = [str(step) for step in steps]
        if asked.send:
            fees = await operator.send(steps)
            return [*lines, f"done, for {shown_sol(fees.spent)}"]
        return [*lines, _enough(steps, await operator.balance()), "nothing was sent: add --yes to do it"]
    finally:
        await rpc.close()


def _enough(steps: Sequence[Step], balance: int) -> str:
    """Whether the wallet pays for all of it, in words."""
    needed = needed_for(steps)
    text = (
        f"in all {shown_sol(needed - KEPT_IN_A_WALLET)} of the {shown_sol(balance)} in the wallet, where "
        f"{shown_sol(KEPT_IN_A_WALLET)} must stay"
    )
    return text if balance >= needed else f"{text}: {shown_sol(needed - balance)} are missing"


async def _plan(operator: Operator, asked: ChangeOptions) -> list[Step]:
    match asked.action:
        case "create":
            return await operator.create(
                asked.client_version or DEFAULT_VERSION,
                join_authority=optional_key(asked.join_authority, "join-authority"),
                mint=optional_key(asked.treasurer_collateral_mint, "treasurer-collateral-mint"),
                treasurer_index=asked.treasurer_index,
            )
        case "configure":
            return await operator.configure(_settings(asked))
        case "pause" | "resume":
            return await operator.pause(asked.action == "pause")
        case "rates":
            return await operator.rates(asked.points, asked.slashing)
        case "tick":
            return await operator.tick()
        case "checkpoint":
            return await operator.checkpoint(_checkpoint(asked), check_format=not asked.unchecked_format)
        case "authorize" if asked.key is not None:
            key = EVERYBODY if asked.key == "everybody" else parse_key(asked.key, "key")
            return await (operator.unauthorize(key) if asked.close else operator.authorize(key, not asked.revoke))
        case "delegate":
            keys = [parse_key(text, "key") for text in asked.keys]
            if not keys and not asked.clear:
                raise ConfigurationError("name the wallets to let in, or --clear", name="keys")
            return await operator.delegate(keys, clear=asked.clear)
        case "claim":
            return await operator.claim(asked.points, optional_key(asked.user, "user"))
        case "fund":
            return await operator.fund(asked.tokens)
        case "close":
            return await operator.close()
    raise ConfigurationError(f"there is no action {asked.action!r}", name="action")


def _settings(asked: ChangeOptions) -> Settings:
    settings = replace(asked.settings, client_version=asked.client_version)
    if asked.file is not None:
        described = read_run_file(asked.file)
        settings = replace(settings, config=described.config, model=described.model)
    if settings == Settings():
        raise ConfigurationError(
            "nothing was said that is to change: name a file, or an option such as --name", name="file"
        )
    return settings


def _checkpoint(asked: ChangeOptions) -> Hub | Gcs:
    if not asked.repo and not asked.bucket:
        raise ConfigurationError("name where the model is: --repo for the hub, or --bucket", name="repo")
    if asked.repo and asked.bucket:
        raise ConfigurationError("a model is in one place: name --repo or --bucket, and not both", name="repo")
    if asked.repo is not None and asked.prefix is not None:
        raise ConfigurationError("--prefix is a place in a --bucket: a --repo has a --revision", name="prefix")
    if asked.bucket is not None and asked.revision is not None:
        raise ConfigurationError("--revision is one of a --repo: a --bucket has a --prefix", name="revision")
    if asked.repo is not None:
        return Hub(HubRepo(asked.repo, asked.revision))
    return Gcs(GcsRepo(asked.bucket or "", asked.prefix))
