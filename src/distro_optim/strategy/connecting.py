"""The way into a run, as the arguments and the environment say together."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Final

from ..coordinator.types import Coordinator
from ..errors import ConfigurationError
from ..verify.recompute import Evidence
from .config import RunConfig
from .environment import RUN, WATCH, RunEnvironment
from .options import SessionOptions, fill_in
from .port import RunAccess
from .rounds.trust.saved_step import SavedStep

__all__ = ["connect_to_run", "settings_to_host"]

WATCHERS_KEY: Final = "observer.key"
"""File with the key of one that watches, if its script names none."""


def connect_to_run(
    run: str | None,
    options: SessionOptions,
    environment: RunEnvironment,
    *,
    config: RunConfig | None = None,
    state: Coordinator | None = None,
    folder: Path | None = None,
    saved: SavedStep | None = None,
) -> RunAccess:
    """An access to a run, not started.

    Args:
        run: a ticket, ``host:port/run-id`` or ``solana:run-id``; None hosts.
        options: complete; what they leave at its default, ``environment`` may say.
        config: of a run that is hosted.
        state: where that begins; None starts at its beginning.
        folder: of our checkpoints, for one that joins, and may come to host.
        saved: what the checkpoint that we resume from says of the run.

    Raises:
        ConfigurationError: an argument is wrong.
    """
    from .network.runtime import Runtime

    options = fill_in(options, environment.connection)
    if environment.watch and options["secret_key"] is None:
        options = {**options, "secret_key": WATCHERS_KEY}  # the host has to know it
    runtime = Runtime.connect(
        run,
        config=config,
        state=state,
        home=options["checkpoint_dir"] if run is None else None,
        folder=folder,
        saved=saved,
        resume=options["resume"],
        secret_key=options["secret_key"],
        relay=options["relay"],
        discovery=options["discovery"],
        external_addr=options["external_addr"],
        bind_addr=options["bind_addr"],
        tcp=options["tcp"],
        peers=options["peers"],
        allow=options["allow"],
        solana=options["solana"],
        give_up_seconds=options["give_up_seconds"],
        watch=environment.watch and run is not None,
    )
    if environment.watch:
        if run is None:
            raise ConfigurationError(f"{WATCH} looks at a run that others train: name it, by {RUN}", name=WATCH)
        runtime.audit_alone = 1.0
        runtime.on_audited = _tell_audit
    return runtime


def _tell_audit(step: int, peer: bytes, found: Evidence) -> None:
    assigned = found.assigned
    print(
        f"step {step}: peer {peer.hex()[:8]}: {assigned.total} signs, {assigned.share:.3f} agree with its batch, "
        f"{found.control.share:.3f} with another (+- {assigned.error:.3f})",
        flush=True,
    )


def settings_to_host(config: RunConfig | None, environment: RunEnvironment) -> RunConfig:
    """The settings of a hosted run: the script's, and where those are the defaults, the environment's.

    Raises:
        ConfigurationError: the environment has a setting that no run has.
    """
    config = config or RunConfig()
    untouched = RunConfig()
    known = {field.name for field in fields(RunConfig)}
    for name, value in environment.config.items():
        if name not in known:
            raise ConfigurationError(f"a run has no setting {name!r}; it has {', '.join(sorted(known))}", name=name)
        if getattr(config, name) == getattr(untouched, name):
            config = replace(config, **{name: value})
    return config
