"""``distro-optim run show`` and ``list``: what they print."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..coordinator.solana.programs import Programs, parse_key
from ..coordinator.solana.rpc import RpcClient
from ..coordinator.solana.viewing import as_json, as_text, list_runs, printable, see_run
from ..coordinator.solana_clusters import cluster_of

__all__ = ["LookOptions", "look"]


@dataclass(frozen=True)
class LookOptions:
    """What to look at.

    Attributes:
        run_id: the run; None lists all.
        cluster: a preset.
        rpc: addresses in place of it.
        program: id of the coordinator program in base58, if not Psyche's.
        as_json: for programs rather than for people.
    """

    run_id: str | None
    cluster: str
    rpc: tuple[str, ...]
    program: str | None
    as_json: bool


async def look(options: LookOptions) -> list[str]:
    """What is to be printed.

    Raises:
        ConfigurationError: an option cannot work.
        CoordinatorLinkError, ProtocolError: there is no such run, or it cannot be read.
    """
    programs = Programs()
    if options.program is not None:
        programs = Programs(coordinator=parse_key(options.program, "--program"))
    rpc = RpcClient(cluster_of(options.cluster, options.rpc).rpc)
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
