"""The line for a shell with which others join a run with this script."""

from __future__ import annotations

import os
import shlex
import sys
from types import ModuleType
from typing import Final

from ..environment import RUN

__all__ = ["shell_line"]

ANY_SCRIPT: Final = "script.py"
"""In the place of a name, where the host is no script: a notebook, or a prompt."""


def shell_line(ticket: str, main: ModuleType | None = None) -> str:
    """What others type to run this script as a peer of the run.

    Args:
        ticket: the way in.
        main: the module that the script is; by default that of this process.
    """
    main = sys.modules.get("__main__") if main is None else main
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        what = f"-m {spec.name.removesuffix('.__main__')}"
    else:
        what = shlex.quote(_path_of_others(file)) if file is not None else ANY_SCRIPT
    return f"{RUN}={ticket} python {what}"


def _path_of_others(file: str) -> str:
    """Below the folder in which we are, as those type it who have the same folder; else the name, as theirs is another.

    On this machine's other terminals it is right as well.
    """
    here, path = os.getcwd(), os.path.abspath(file)
    try:
        is_below = os.path.commonpath([here, path]) == here
    except ValueError:  # on another drive of Windows
        is_below = False
    return os.path.relpath(path, here).replace(os.sep, "/") if is_below else os.path.basename(path)
