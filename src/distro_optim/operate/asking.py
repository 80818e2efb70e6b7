"""``distro-optim run pause``, ``resume`` and ``set``: asks the server of a run, and waits for its answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from ..coordinator.server.control import ControlFolder, Request
from ..errors import ConfigurationError, RunError

__all__ = ["ask"]

ANSWER_SECONDS: Final = 30.0
"""A server looks twice a second. Chosen arbitrarily above what a busy machine takes."""

LOOK_SECONDS: Final = 0.1
"""Between two looks for the answer."""


def ask(
    folder: Path,
    run_id: str,
    action: str,
    settings: Mapping[str, int],
    *,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """What the server says it has done.

    Args:
        folder: in which the server keeps the run.
        run_id: the run.
        action: one of :data:`~distro_optim.coordinator.server.control.ACTIONS`.
        settings: for ``"set"``.
        wait: waits for so many seconds.

    Raises:
        ConfigurationError: no server keeps this run there, or it refused.
        RunError: it did not answer.
    """
    control = ControlFolder(folder, run_id)
    request = Request(number=secrets.token_hex(8), action=action, settings=settings)
    control.ask(request)
    for _ in range(int(ANSWER_SECONDS / LOOK_SECONDS)):
        if (answer := control.answer_to(request)) is not None:
            if not answer.done:
                raise ConfigurationError(answer.text, name=action)
            return f"run {run_id}: {answer.text}"
        wait(LOOK_SECONDS)
    raise RunError(
        f"the server that keeps run {run_id!r} has not answered within {ANSWER_SECONDS:g} s: look at what it prints"
    )
