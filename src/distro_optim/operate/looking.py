"""``distro-optim run show`` and ``list``: what they print."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..console import Display
from ..coordinator.solana.programs import Programs, parse_key
from ..coordinator.solana.rpc import RpcClient
from ..coordinator.solana.viewing import as_json, as_text, list_runs, printable, see_run
from ..coordinator.solana_clusters import cluster_of
from ..errors import ConfigurationError
from .following import Following, follow

__all__ = ["LookOptions", "look", "watch"]


@dataclass(frozen=True)
class LookOptions:
    """What to look at.

    Attributes:
        run_id: the run; None lists all.
        cluster: a preset.
        rpc: addresses in place of it.
        program: id of the coordinator program in base58, if not Psyche's.
        as_json: for programs rather than for people.
        treasurer_program: id of the treasurer, likewise.
        websockets: addresses for subscriptions; by default those of ``rpc`` with the other scheme.
    """

    run_id: str | None
    cluster: str
    rpc: tuple[str, ...]
    program: str | None
    as_json: bool
    treasurer_program: str | None = None
    websockets: tuple[str, ...] = ()

    def programs(self) -> Programs:
        """The deployment.

        Raises:
            ConfigurationError: an id is no key.
        """
        given = {"coordinator": self.program, "treasurer": self.treasurer_program}
        return Programs(
            **{name: parse_key(text, f"the id of the {name}") for name, text in given.items() if text is not None}
        )


async def watch(options: LookOptions, display: Display[Following]) -> None:
    """Shows a run until it is finished; see :func:`~.following.follow` for what it raises."""
    if options.run_id is None:
        raise ConfigurationError("only one run can be followed: name it", name="run_id")
    cluster = cluster_of(options.cluster, options.rpc, options.websockets)
    rpc = RpcClient(cluster.rpc)
    try:
        with display:
            await follow(rpc, cluster.websockets, options.programs(), options.run_id, display)
    finally:
        await rpc.close()


async def look(options: LookOptions) -> list[str]:
    """What is to be printed.

    Raises:
        ConfigurationError: an option cannot work.
        CoordinatorLinkError, ProtocolError: there is no such run, or it cannot be read.
    """
    programs = options.programs()
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
