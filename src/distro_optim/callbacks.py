"""Calling back somebody who only looks on, in such a way that what is looked at goes on whatever happens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Generic

from typing_extensions import ParamSpec

__all__ = ["SafeCallback"]

P = ParamSpec("P")

_log: Final = logging.getLogger(__name__)


class SafeCallback(Generic[P]):
    """A function that is told something, and whose exceptions stop nobody but itself.

    The first exception of each type is logged with its traceback, later ones of the type are not, so that a function
    that fails every time does not flood the log. KeyboardInterrupt, SystemExit and the cancellation of an asyncio task
    pass: they are not the function's own.

    Args:
        callback: the function; what it returns is not looked at.
        name: what the log calls it, such as ``"on_event"``.
    """

    def __init__(self, callback: Callable[P, object], name: str) -> None:
        self._callback = callback
        self._name = name
        self._logged: set[type[Exception]] = set()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Calls the function."""
        try:
            self._callback(*args, **kwargs)
        except Exception as error:
            kind = type(error)
            if kind in self._logged:
                return
            self._logged.add(kind)
            _log.warning(
                "%s raised %s; that changes nothing for the run. Later ones of this kind are not logged",
                self._name,
                kind.__name__,
                exc_info=error,
            )
