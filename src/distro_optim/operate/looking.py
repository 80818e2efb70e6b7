"""``distro-optim run show`` and ``list``: what they print."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..console import Display
from ..coordinator.solana.participation import programs_of
from ..coordinator.solana.rpc import RpcClient
from ..coordinator.solana.viewing import as_json, as_text, list_runs, printable, see_run
from ..coordinator.solana_clusters import cluster_of
from ..coordinator.solana_options import SolanaOptions
from ..errors import ConfigurationError
from .following import Following, follow

__all__ = ["LookOptions", "look", "watch"]


@dataclass(frozen=True)
class LookOptions:
    """What to look at.

    Attributes:
        run_id: the run; None lists all.
        options: cluster and programs. Accounts of any version that is known are read.
        as_json: for programs rather than for people.
    """

    run_id: str | None
    options: SolanaOptions
    as_json: bool = False


async def watch(options: LookOptions, display: Display[Following]) -> None:
    """Shows a run until it is finished; see :func:`~.following.follow` for what it raises."""
    if options.run_id is None:
        raise ConfigurationError("only one run can be followed: name it", name="run_id")
    given = options.options
    programs = programs_of(given)
    cluster = cluster_of(given.cluster, given.rpc, given.websockets)
    rpc = RpcClient(cluster.rpc)
    try:
        with display:
            await follow(rpc, cluster.websockets, programs, options.run_id, display)
    finally:
        await rpc.close()


async def look(options: LookOptions) -> list[str]:
    """What is to be printed.

    Raises:
        ConfigurationError: an option cannot work.
        CoordinatorLinkError, ProtocolError: there is no such run, or it cannot be read.
    """
    programs = programs_of(options.options)
    rpc = RpcClient(cluster_of(options.options.cluster, options.options.rpc).rpc)
    try:
        if options.run_id is not None:
            seen = await see_run(rpc, programs, options.run_id)
            return [as_json(seen) if options.as_json else as_text(seen)]
        runs = await list_runs(rpc, programs)
    finally:
        await rpc.close()
    if options.as_json:
        return [
            json.dumps(
                {
                    "run_id": run.run_id,
                    "account": str(run.account),
                    "main_authority": str(run.main_authority),
                    "join_authority": str(run.join_authority),
                }
            )
            for run in runs
        ]
    if not runs:
        return [f"there is no run at {rpc.name} under the program {programs.coordinator}"]
    width = max(len(printable(run.run_id)) for run in runs)
    return [f"{printable(run.run_id):<{width}}  let in by {run.join_authority}" for run in runs]
