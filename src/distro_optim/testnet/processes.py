"""The processes of a test network: each in a group of its own, with its output in a file, and none left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

__all__ = ["PeerProcess", "end_all", "tail"]

GRACE_SECONDS: Final = 5.0
"""From the polite request to end to the one that cannot be refused; what a session promises to take at most."""

_POLL_SECONDS: Final = 0.05
"""Between two looks at processes that are to end."""

_PR_SET_PDEATHSIG: Final = 1
"""``linux/prctl.h``"""

_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
"""Found here, since little is safe between fork and exec."""

TAIL_LINES: Final = 12
"""Lines of a log that are shown."""

_TAIL_BYTES: Final = 8192
"""Where they are looked for; the end of a file may be one long line."""


class PeerProcess:
    """One process, running from construction on.

    Args:
        command: program and arguments.
        environment: added to that of this process.
        log: file for its output; added to.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                # Ctrl-C in the terminal is for the test network, which ends its peers itself; and whatever a peer
                # starts, as data loaders do, is in its group and ends with it.
                start_new_session=True,
                preexec_fn=_end_with_parent if _LIBC is not None else None,
            )

    @property
    def pid(self) -> int:
        """The number that the system gives it."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """``kill -9`` for the process and all that it started; waits until it is gone."""
        if os.name == "nt":
            self._process.kill()
        else:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):  # the latter on macOS, if only zombies are left of the group
                pass
        self._process.wait()

    def interrupt(self) -> None:
        """Asks it to end, as Ctrl-C in a terminal of its own would."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)


def end_all(processes: Iterable[PeerProcess], *, grace: float = GRACE_SECONDS) -> None:
    """Ends all of them, politely at first; none is left afterwards, nor anything they started.

    Args:
        processes: some may have ended already.
        grace: seconds they have to end by themselves.
    """
    left = list(processes)
    try:
        for process in left:
            process.interrupt()
        deadline = time.monotonic() + grace
        while any(process.poll() is None for process in left) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    finally:  # also after a second Ctrl-C
        for process in left:
            process.kill()


def tail(log: Path) -> str:
    """The last lines of a log, to be shown when its process has failed."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])


def _end_with_parent() -> None:
    """In the child: the kernel kills it if the test network itself is killed."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
