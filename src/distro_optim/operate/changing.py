"""``distro-optim run create``, ``pause`` and the like: what is planned is printed, and sent if that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..coordinator.solana.clusters import cluster_of
from ..coordinator.solana.fees import shown_sol
from ..coordinator.solana.operating import Operator, Step, read_run_file
from ..coordinator.solana.participation import programs_of
from ..coordinator.solana.programs import EVERYBODY, parse_key
from ..coordinator.solana.rpc import RpcClient
from ..coordinator.solana.wallet import find_wallet
from ..coordinator.solana_options import SolanaOptions
from ..errors import ConfigurationError

__all__ = ["ChangeOptions", "change"]


@dataclass(frozen=True, kw_only=True)
class ChangeOptions:
    """What to do with a run.

    Attributes:
        action: name of the subcommand.
        run_id: the run.
        options: cluster, wallet and programs.
        send: whether to do it, and not only to say what would be done.
        file: of ``configure``.
        key: of ``authorize``, in base58 or ``everybody``.
        revoke: no longer, in place of from now on.
        client_version: of ``create``.
        points: of ``rates``.
    """

    action: str
    run_id: str
    options: SolanaOptions
    send: bool = False
    file: Path | None = None
    key: str | None = None
    revoke: bool = False
    client_version: str = "distro-optim"
    points: int = 0


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
        lines = [str(step) for step in steps]
        if not steps:
            return ["nothing is to be done: it is so already"]
        if not asked.send:
            return [*lines, "nothing was sent: add --yes to do it"]
        fees = await operator.send(steps)
        return [*lines, f"done, for {shown_sol(fees.spent)}"]
    finally:
        await rpc.close()


async def _plan(operator: Operator, asked: ChangeOptions) -> list[Step]:
    match asked.action:
        case "create":
            return await operator.create(asked.client_version)
        case "configure" if asked.file is not None:
            try:
                text = asked.file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{asked.file} cannot be read: {error}", name="file") from None
            return await operator.configure(read_run_file(text))
        case "pause" | "resume":
            return await operator.pause(asked.action == "pause")
        case "rates":
            return await operator.rates(asked.points)
        case "tick":
            return await operator.tick()
        case "authorize" if asked.key is not None:
            key = EVERYBODY if asked.key == "everybody" else parse_key(asked.key, "key")
            return await operator.authorize(key, not asked.revoke)
        case "close":
            return await operator.close()
    raise ConfigurationError(f"there is no action {asked.action!r}", name="action")
