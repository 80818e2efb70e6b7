"""A peer's ``config.json`` of a family that multiplies numbers or repeats patterns: tried in a process with limits.

Bounds on numbers (:mod:`.strangers`) do not say what such a family makes of them. So the model is made in a process of
its own first (:mod:`.trial_process`), which may use so much memory and so many seconds of a core, and whose end, of
whatever kind, is not ours. What that process has made in its limits we then make here, in the same.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, SubprocessError, TimeoutExpired
from typing import Any, Final

from ..errors import ModelConfigError
from ..words import shown

__all__ = ["TrialLimits", "try_to_build"]

_PROGRAM: Final = (
    "import sys; sys.path.append(sys.argv[1]); from distro_optim.models.trial_process import main; main()"  # at the end
)
_MAX_ANSWER: Final = 4096
_MAX_REASON: Final = 300

_ADVICE: Final = "get the run's model from its host, and join with --model and its folder"


@dataclass(frozen=True, kw_only=True)
class TrialLimits:
    """What the process may use.

    Attributes:
        cpu_seconds: of a core, after libraries are loaded. The largest known take a minute.
        wall_seconds: in all; a machine that does much else may need ten times the CPU seconds.
        memory_bytes: beyond what the libraries take; None: half of what is free, at most 16 GiB.
    """

    cpu_seconds: int = 120
    wall_seconds: float = 600.0
    memory_bytes: int | None = None


def try_to_build(config_json: str, architecture: str, limits: TrialLimits = TrialLimits()) -> None:
    """Makes the model, without memory for its parameters, in a process with limits; what was made once is not again.

    Args:
        config_json: checked by :func:`~.strangers.check_strangers_config`.
        architecture: of the run.
        limits: of the process.

    Raises:
        ModelConfigError: it cannot be made within them, or this machine cannot limit a process.
    """
    _tried(config_json, architecture, limits)


@functools.lru_cache(maxsize=4)
def _tried(config_json: str, architecture: str, limits: TrialLimits) -> None:
    if importlib.util.find_spec("resource") is None or not sys.executable or getattr(sys, "frozen", False):
        raise _refused("is of a family that is built only in a process with limits, which this system does not have")
    request = json.dumps({"config": config_json, "architecture": architecture, **asdict(limits)}).encode()
    try:
        process = Popen(
            [sys.executable, "-c", _PROGRAM, str(Path(__file__).parents[2])],
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env={**os.environ, **_QUIET},
        )
        with process:
            try:
                written, _ = process.communicate(request, timeout=limits.wall_seconds)
            except BaseException:
                process.kill()
                raise
    except TimeoutExpired:
        raise _refused(f"could not be built in {limits.wall_seconds:g} seconds") from None
    except (OSError, SubprocessError) as error:
        raise _refused(f"could not be tried ({shown(str(error), _MAX_REASON)})") from error
    problem = _problem(process.returncode, written[:_MAX_ANSWER], limits)
    if problem is not None:
        raise _refused(problem)


_QUIET: Final = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
"""No device, nothing fetched, and nothing imported from the folder where we happen to be."""


def _problem(code: int, written: bytes, limits: TrialLimits) -> str | None:
    """What kept the model from being made, as the end of a sentence about it."""
    if code < 0:
        import signal

        if -code in (signal.SIGXCPU, signal.SIGKILL):
            return f"takes more than {limits.cpu_seconds} seconds of a core to build"
        return f"ends the process that builds it (signal {-code})"
    try:
        answer: Any = json.loads(written)
        reason = answer["problem"]
    except (ValueError, KeyError, TypeError):
        return f"could not be built (a process ended with {code})"
    return None if reason is None else shown(str(reason), _MAX_REASON)


def _refused(problem: str) -> ModelConfigError:
    return ModelConfigError(f"a peer's model {problem}: {_ADVICE}", name="config.json")
