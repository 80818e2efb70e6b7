"""Hooks of a script see its own batches, also where a round is more than one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

from .round_loader import RoundBatch

__all__ = ["BatchHooks"]

_HOOKS: Final = ("on_train_batch_start", "on_train_batch_end")


class BatchHooks:
    """Stands in for the batch hooks of callbacks and modules, until :meth:`remove`.

    Args:
        show: gives the batch that is shown in place of a round.
    """

    def __init__(self, show: Callable[[RoundBatch], Any]) -> None:
        self._show = show
        self._before: list[tuple[Any, str, Any]] = []

    def stand_in(self, owners: Iterable[Any]) -> None:
        """For every hook of theirs that takes a batch."""
        for owner in owners:
            for name in _HOOKS:
                self._before.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, partial(self._call, getattr(owner, name)))

    def within(self, owner: Any, name: str, context: Callable[[], AbstractContextManager[object]]) -> None:
        """Lets a hook of ``owner`` run within a context."""
        self._before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, partial(_within, context, getattr(owner, name)))

    def after(self, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
        """Lets ``change`` have a look at what a method of ``owner`` returns, and return something else."""
        self._before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, partial(_changed, change, getattr(owner, name)))

    def remove(self) -> None:
        """Leaves the owners as they were."""
        while self._before:
            owner, name, before = self._before.pop()
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def _call(self, hook: Callable[..., Any], *args: Any) -> Any:
        return hook(*(self._show(each) if isinstance(each, RoundBatch) else each for each in args))


def _within(context: Callable[[], AbstractContextManager[object]], hook: Callable[..., Any], *args: Any) -> Any:
    with context():
        return hook(*args)


def _changed(change: Callable[[Any], Any], method: Callable[..., Any], *args: Any) -> Any:
    return change(method(*args))
