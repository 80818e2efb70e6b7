"""Which way into a run it is, as the arguments say: hosting it, joining or watching another host's, or a blockchain."""

from __future__ import annotations

import secrets
from os import PathLike
from pathlib import Path
from typing import Final

from ...comm.iroh.endpoint import Node
from ...comm.iroh.home import NodeHome
from ...comm.iroh.reach import parse_discovery, parse_relays
from ...comm.loop import LoopThread
from ...coordinator.types import Coordinator
from ...errors import ConfigurationError
from ..config import RunConfig
from ..options import ConnectionOptions
from ..rounds.trust.saved_step import SavedStep
from .hosting import HostedRun
from .joining import JoinedRun, NodeOptions, parse_peers, parse_run
from .link import RunSource
from .observing import ObservedRun
from .on_solana import SolanaRun, participation_in

__all__ = ["way_into"]

_RUN_ID_BYTES: Final = 4
"""Of randomness in the name of a run that got none."""


def way_into(
    run: str | None,
    given: ConnectionOptions,
    *,
    loop: LoopThread,
    config: RunConfig | None,
    state: Coordinator | None,
    home: str | PathLike[str] | None,
    folder: Path | None,
    saved: SavedStep | None,
    resume: bool,
    watch: bool,
) -> RunSource:
    """The way into a run. Nothing is opened.

    Args:
        run, config, state, home, folder, saved, resume, watch: see :meth:`.runtime.Runtime.connect`.
        given: complete.
        loop: where the network lives.

    Raises:
        ConfigurationError: an argument is wrong; says which, and what to write.
    """
    relays, external = parse_relays(given["relay"]), given["external_addr"]
    bind_addr, give_up_seconds = given["bind_addr"], given["give_up_seconds"]
    if not give_up_seconds > 0:
        raise ConfigurationError(
            f"give_up_seconds must be above 0, got {give_up_seconds}", name="give_up_seconds", value=give_up_seconds
        )
    if run is None and given["solana"] is not None:
        raise ConfigurationError(
            'solana is for a run on Solana, and a run is hosted here: name the one to join, run="solana:RUN-ID"',
            name="solana",
            value=given["solana"],
        )
    on_solana = participation_in(run, given["solana"]) if run is not None else None
    secret_key = given["secret_key"]
    if on_solana is not None and secret_key is None:
        secret_key = on_solana.peer_key
    where = home if home is not None or config is None else config.save_dir
    lives_at = NodeHome(where) if run is None and where is not None else None
    if lives_at is not None and secret_key is None:
        secret_key = lives_at.key()
    # A node that is made checks its arguments and opens nothing.
    key = Node(secret_key=secret_key, external_addr=external, bind_addr=bind_addr, loop=loop).secret_key
    node = NodeOptions(
        key=key,
        relays=relays,
        discovery=parse_discovery(given["discovery"], relays),
        external_addr=external,
        bind_addr=bind_addr,
        peers=parse_peers(given["peers"]),
        home=lives_at,
        folder=folder,
    )
    tcp, allow = given["tcp"], given["allow"]
    if run is not None:
        for name, value in (("config", config), ("state", state), ("home", home), ("tcp", tcp), ("allow", allow)):
            if value is not None:
                raise ConfigurationError(
                    f"{name} is for the host of a run, but run names one to join; leave one of the two out",
                    name=name,
                    value=value,
                )
        if watch:
            if on_solana is not None:
                raise ConfigurationError("a run on Solana is watched as a member: join --audit 1", name="run")
            return ObservedRun(parse_run(run), node, loop=loop, patience=give_up_seconds)
        if on_solana is not None:
            return SolanaRun(on_solana, node, loop=loop)
        return JoinedRun(parse_run(run), node, loop=loop, patience=give_up_seconds, saved=saved)
    config = config if config is not None else RunConfig()
    before = lives_at.run_id() if lives_at is not None and (resume or config.resume) else None
    run_id = config.run_id or (state.run_id if state is not None else before)
    run_id = run_id or f"run-{secrets.token_hex(_RUN_ID_BYTES)}"
    return HostedRun(
        config,
        run_id,
        node,
        loop=loop,
        state=state,
        tcp=tcp,
        allow=allow,
        patience=give_up_seconds,
        saved=saved if saved is not None and saved.run_id == run_id else None,
    )
