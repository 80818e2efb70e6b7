"""How an operator reaches a run that a server keeps in a folder: pause, resume, other settings.

Whoever can write to the folder may ask. A request and its answer are files in it, each written whole, so this works on
every system and while nobody but the server listens anywhere. The server looks with every tick, twice a second.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from ...errors import ConfigurationError, DistroError
from ..rules.steps import DRAIN_ROUNDS
from ..rules.validation import check_run
from ..types import CoordinatorConfig, RunState
from .host import Event, RunHost
from .store import lock_file, write_whole

__all__ = ["ACTIONS", "Answer", "ControlFolder", "Request", "changed_config"]

ACTIONS: Final = ("pause", "resume", "set")
"""What can be asked."""

MAX_BYTES: Final = 64 * 1024
"""Of a request or an answer; they have a few hundred. Chosen arbitrarily."""

_BOTH_BATCH_SIZES: Final = "global_batch_size"
"""Sets the first and the last size of a batch alike."""

_MAX_VALUE: Final = (1 << 32) - 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an operator asks.

    Attributes:
        number: drawn at random, by which the answer is known.
        action: one of :data:`ACTIONS`.
        settings: for ``"set"``: names of the run's settings, as in state files, and their new values.
    """

    number: str
    action: str
    settings: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a request.

    Attributes:
        number: of the request.
        done: whether it was carried out.
        text: one sentence.
    """

    number: str
    done: bool
    text: str


class ControlFolder:
    """The files of one run.

    Args:
        folder: in which a :class:`~.store.StateStore` keeps the run.
        run_id: the run.
    """

    def __init__(self, folder: str | os.PathLike[str], run_id: str) -> None:
        stem = quote(run_id, safe="")
        self._run_id = run_id
        self._request = Path(folder) / f".{stem}.request.json"
        self._answer = Path(folder) / f".{stem}.answer.json"
        self._lock = Path(folder) / f".{stem}.lock"

    # -- the operator's side -------------------------------------------------------------------------------------------

    def ask(self, request: Request) -> None:
        """Leaves a request.

        Raises:
            ConfigurationError: no server keeps this run here, or the folder cannot be written to.
        """
        try:
            held = self._lock.exists() and lock_file(self._lock)
            if held is not None:
                if held:
                    held.close()
                raise ConfigurationError(
                    f"no server keeps the run {self._run_id!r} in {self._lock.parent}: name the --save-dir of the one "
                    "that hosts it, on the machine where it runs",
                    name="save_dir",
                    value=self._lock.parent,
                )
            document = {"number": request.number, "action": request.action, "settings": dict(request.settings)}
            write_whole(self._request, json.dumps(document).encode())
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to {self._lock.parent}: {error.strerror or error}; ask as the user who runs the server",
                name="save_dir",
                value=self._lock.parent,
            ) from None

    def answer_to(self, request: Request) -> Answer | None:
        """The server's answer; None if there is none yet."""
        document = _read(self._answer)
        if document.get("number") != request.number:
            return None
        return Answer(number=request.number, done=document.get("done") is True, text=str(document.get("text", "")))

    # -- the server's side ---------------------------------------------------------------------------------------------

    def carry_out(self, host: RunHost, now: int) -> list[Event] | None:
        """Does what was asked since the last call, and answers it.

        Args:
            host: of the run.
            now: Unix time in seconds.

        Returns:
            What happened; None if nothing was asked, or it was refused.
        """
        if not self._request.exists():
            return None
        document = _read(self._request)
        self._request.unlink(missing_ok=True)
        events: list[Event] | None = None
        try:
            events, text = _done(host, document, now)
        except DistroError as error:
            text = str(error)
        answer = {"number": document.get("number"), "done": events is not None, "text": text}
        try:
            write_whole(self._answer, json.dumps(answer).encode())
        except OSError:
            pass  # it is done all the same, and the server goes on
        return events


def changed_config(config: CoordinatorConfig, settings: Mapping[str, Any]) -> CoordinatorConfig:
    """``config`` with other settings.

    Args:
        config: of the run.
        settings: by their names in state files. ``total_steps`` is as in
            :class:`~distro_optim.strategy.config.RunConfig`, and ``global_batch_size`` is the first and the last.

    Raises:
        ConfigurationError: there is no such setting, or it cannot have this value.
    """
    known = {field.name for field in fields(CoordinatorConfig)} - {"verification_percent"}
    changes: dict[str, int] = {}
    for name, value in settings.items():
        if name not in known and name != _BOTH_BATCH_SIZES:
            raise ConfigurationError(
                f"a run has no setting {name!r}: there are {', '.join(sorted({*known, _BOTH_BATCH_SIZES}))}", name=name
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_VALUE:
            raise ConfigurationError(f"{name} must be a whole number of at least 0, got {value!r}", name=name)
        if name == _BOTH_BATCH_SIZES:
            changes["global_batch_size_start"] = changes["global_batch_size_end"] = value
        else:
            changes[name] = value
    prompt = config.round_witness_time == 0
    if "total_steps" in changes and prompt:
        changes["total_steps"] += 1 + DRAIN_ROUNDS
    if "round_witness_time" in changes and (changes["round_witness_time"] == 0) != prompt:
        raise ConfigurationError(
            "round_witness_time decides what kind of run it is, and that stays: host a new run for the other kind",
            name="round_witness_time",
        )
    return replace(config, **changes)


def _done(host: RunHost, document: Mapping[str, Any], now: int) -> tuple[list[Event], str]:
    action, settings = document.get("action"), document.get("settings")
    if action == "pause":
        events = host.pause(now)
        return events, "pausing after the present epoch" if host.state.pending_pause else "paused"
    if action == "resume":
        return host.resume(now), "the run goes on"
    if action != "set" or not isinstance(settings, dict) or not settings:
        raise ConfigurationError(
            f"cannot {action!r}: ask for one of {', '.join(ACTIONS)}, the last with settings", name="action"
        )
    if host.state.run_state is not RunState.PAUSED:
        raise ConfigurationError(
            f"the run is in {host.state.run_state.name}, and settings change only while it is paused: pause it first",
            name="action",
        )
    config = changed_config(host.state.config, settings)
    state = replace(host.state, config=config)
    check_run(state, prompt=config.round_witness_time == 0)
    host.state = state
    return [], ", ".join(f"{name} is {value}" for name, value in settings.items())


def _read(path: Path) -> Mapping[str, Any]:
    """An object in a file; empty if there is none, or something else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
