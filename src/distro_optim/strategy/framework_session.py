"""A session inside of a framework's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import override

from ..coordinator.types import Coordinator
from .checkpoint import Checkpoint
from .forwarding import InterruptiblePort
from .model_identity import ModelIdentity
from .port import RunPort
from .session import SwarmSession

__all__ = ["FrameworkSession"]


class FrameworkSession(SwarmSession):
    """A :class:`~.session.SwarmSession` that a framework can interrupt, and whose momentum it may have restored.

    Args:
        interrupt: asked several times a second while the session waits; raises if the wait is to end.
        keep_momentum: the optimizer goes on from a checkpoint of the framework's, if the weights are still those.
        kwargs: of the session.
    """

    def __init__(self, *args: Any, interrupt: Callable[[], None], keep_momentum: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._interrupt = interrupt
        self._keep_momentum = keep_momentum

    @property
    def state(self) -> Coordinator | None:
        """The coordinator's latest state; None before :meth:`start` and after :meth:`close`."""
        return self._port.state if self._port is not None else None

    @property
    def is_host(self) -> bool:
        """Whether the run ends when we leave it."""
        return self._port is not None and self._port.is_host

    @override
    def _connect(self) -> RunPort:
        return InterruptiblePort(super()._connect(), self._interrupt)

    @override
    def _begin_momentum(self, restored: Checkpoint | None, identity: ModelIdentity) -> None:
        keep, self._keep_momentum = self._keep_momentum and self.is_host, False
        if not keep:
            super()._begin_momentum(restored, identity)
