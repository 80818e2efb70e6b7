"""A mistake of a script's is told in one line where the script is a program, without a traceback.

A traceback through the inside of a framework says nothing to those who wrote a wrong setting, and hides the sentence
that does. It is left out only where the error would end the program: who catches it gets an exception as ever, and in
prompts, in notebooks and under ``python -i`` or ``python -X dev`` the traceback is shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from ..errors import ConfigurationError, CoordinatorLinkError, JoinRefusedError, ModelMismatchError

__all__ = ["tell_mistakes_in_one_line"]

_MISTAKES: Final = (ConfigurationError, CoordinatorLinkError, JoinRefusedError, ModelMismatchError)
"""What is wrong is in the script or its surroundings, and the message says what to do."""


def tell_mistakes_in_one_line() -> None:
    """From now on, for this process. Calling it again does nothing."""
    if not isinstance(sys.excepthook, _OneLine):
        sys.excepthook = _OneLine(sys.excepthook)


class _OneLine:
    """An ``excepthook`` that stands before another one."""

    def __init__(self, before: Callable[[type[BaseException], BaseException, TracebackType | None], Any]) -> None:
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        if not isinstance(error, _MISTAKES) or _wants_tracebacks():
            self._before(kind, error, at)
            return
        print("\n".join([f"distro_optim: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)


def _wants_tracebacks() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or sys.flags.dev_mode or "ipykernel" in sys.modules
