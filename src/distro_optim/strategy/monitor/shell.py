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
        # Others have it in another folder.
        what = shlex.quote(os.path.basename(file)) if file is not None else ANY_SCRIPT
    return f"{RUN}={ticket} python {what}"
