"""Where copies of what a peer saves go: a command of the user's own, or a store that fsspec knows. No I/O.

::

    Upload("rclone copy {path} remote:bucket/{name}")
    Upload("s3://bucket/my-run")
    Upload(["scp", "-r", "{path}", "host:/backup"], timeout_seconds=600)

A command is started without a shell. It gets the checkpoint in its arguments: ``{path}`` is the absolute path,
``{name}`` the last part of it, ``{step}`` the step that comes next, ``{run}`` the run's name. A run's name may come
from strangers. So what is not a letter, a digit, a dot, a line or a dash is an underline in ``{name}`` and ``{run}``,
and nothing of either may stand in a script: whoever needs a shell calls one, with the path as an argument of its own,
``sh -c 'tar c "$1" | ssh host "cat > last.tar"' sh {path}``.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import ConfigurationError

__all__ = ["Saved", "Upload", "filled_in", "read_upload"]

TRY_SECONDS: Final = 3600.0
"""For one attempt: ten gigabytes at three megabytes a second."""

TRIES: Final = 5
"""With the waits between them, most outages of a store are over within them."""

WAIT_SECONDS: Final = 600.0
"""For what is under way when the run ends. Chosen arbitrarily."""

_PLACEHOLDER: Final = re.compile(r"(?<!\$)\{([a-z]+)\}")
"""``${home}`` is a shell's."""

_KNOWN: Final = ("path", "name", "step", "run")

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)

_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish", "cmd", "powershell", "pwsh"})

_SCRIPT_FOLLOWS: Final = re.compile(r"-[a-z]*c|/[ck]|-command", re.IGNORECASE)
"""Options of shells after which comes a script."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Something whole on the disk, to be copied.

    Attributes:
        path: a folder or a file; absolute.
        step: the run's step that comes next.
        run_id: the run.
    """

    path: Path
    step: int
    run_id: str

    @property
    def name(self) -> str:
        """What the copy is called."""
        return _harmless(self.path.name)


@dataclass(frozen=True)
class Upload:
    """See the module.

    Attributes:
        to: a command, as text or as its arguments, or a URL.
        timeout_seconds: for one attempt.
        tries: attempts for each checkpoint, with growing waits between them.
        wait_seconds: at the end of the run, for what is not done yet.

    Raises:
        ConfigurationError: it cannot work; the message says what can.
    """

    to: str | Sequence[str]
    timeout_seconds: float = TRY_SECONDS
    tries: int = TRIES
    wait_seconds: float = WAIT_SECONDS

    def __post_init__(self) -> None:
        if not self.timeout_seconds > 0:
            raise ConfigurationError(
                f"timeout_seconds of an upload must be above 0, got {self.timeout_seconds}", name="upload"
            )
        if self.tries < 1:
            raise ConfigurationError(f"tries of an upload must be at least 1, got {self.tries}", name="upload")
        if not self.wait_seconds >= 0:
            raise ConfigurationError(
                f"wait_seconds of an upload must be at least 0, got {self.wait_seconds}", name="upload"
            )
        if self.url is None:
            _check(self.command)

    @property
    def url(self) -> str | None:
        """Of the store, without a slash at its end; None if a command copies."""
        if isinstance(self.to, str) and _URL.fullmatch(self.to.strip()):
            return self.to.strip().rstrip("/")
        return None

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments, placeholders and all.

        Raises:
            ConfigurationError: quotes are open.
        """
        if not isinstance(self.to, str):
            return tuple(map(str, self.to))
        try:
            if os.name == "nt":  # where a backslash stands in every path
                return tuple(word.strip("\"'") for word in shlex.split(self.to, posix=False))
            return tuple(shlex.split(self.to))
        except ValueError as error:
            raise ConfigurationError(f"upload={self.to!r} is not a command: {error}", name="upload") from None


def read_upload(given: object) -> Upload | None:
    """What an option or an argument says.

    Args:
        given: an :class:`Upload`, what its ``to`` may be, or None.

    Raises:
        ConfigurationError: it cannot work.
    """
    if given is None or isinstance(given, Upload):
        return given
    if isinstance(given, str) or (isinstance(given, Sequence) and all(isinstance(word, str) for word in given)):
        return Upload(given)
    raise ConfigurationError(
        f"upload={given!r}: give a command with {{path}} in it, a URL such as s3://bucket/run, or an Upload",
        name="upload",
        value=given,
    )


def filled_in(command: Sequence[str], saved: Saved) -> list[str]:
    """The arguments for one checkpoint."""
    values: Mapping[str, str] = {
        "path": str(saved.path),
        "name": saved.name,
        "step": str(saved.step),
        "run": _harmless(saved.run_id),
    }
    return [_PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in command]


def _harmless(name: str) -> str:
    """A name that is no option, no other folder and no pattern, wherever it is put."""
    return re.sub(r"[^A-Za-z0-9._-]|^[.-]", "_", name) or "_"


def _check(command: Sequence[str]) -> None:
    if not command:
        raise ConfigurationError("upload is empty: give a command with {path} in it, or a URL", name="upload")
    found = [(place, name) for place, word in enumerate(command) for name in _PLACEHOLDER.findall(word)]
    for _, name in found:
        if name not in _KNOWN:
            raise ConfigurationError(
                f"upload: there is no {{{name}}} to fill in; there are {', '.join(f'{{{k}}}' for k in _KNOWN)}",
                name="upload",
            )
    if not any(name in ("path", "name") for _, name in found):
        raise ConfigurationError(
            f"upload={' '.join(command)!r} does not say what is to be copied: write {{path}} where the checkpoint goes",
            name="upload",
        )
    if Path(command[0]).stem.lower() not in _SHELLS:
        return
    scripts = {place + 1 for place, word in enumerate(command[1:], 1) if _SCRIPT_FOLLOWS.fullmatch(word)}
    if any(place in scripts for place, _ in found):
        raise ConfigurationError(
            "upload: a run's name comes from strangers, so nothing of it may stand in a script; hand it over as an "
            f"argument: {command[0]} -c 'cp -r \"$1\" /backup' {command[0]} {{path}}",
            name="upload",
        )
