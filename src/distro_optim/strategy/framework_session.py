"""A session inside of a framework's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import override

from ..coordinator.types import Coordinator
from .checkpoint import Checkpoint
from .config import RunConfig
from .forwarding import InterruptiblePort
from .model_identity import ModelIdentity
from .port import RunPort
from .resuming import StartingPoint
from .session import SwarmSession

__all__ = ["FrameworkSession"]


class FrameworkSession(SwarmSession):
    """A :class:`~.session.SwarmSession` that a framework can interrupt, and whose momentum it may have restored.

    Args:
        interrupt: asked several times a second while the session waits; raises if the wait is to end.
        begin_at: where a hosted run goes on, whose weights and momentum a checkpoint of the framework's had; None
            begins anew.
        kwargs: of the session.
    """

    def __init__(
        self, *args: Any, interrupt: Callable[[], None], begin_at: StartingPoint | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._interrupt = interrupt
        self._begin_at = begin_at

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
    def _state_to_host(self, config: RunConfig) -> Coordinator | None:
        state = super()._state_to_host(config)
        return self._begin_at.state(config) if state is None and self._begin_at is not None else state

    @override
    def _begin_momentum(self, restored: Checkpoint | None, identity: ModelIdentity) -> None:
        begin_at, self._begin_at = self._begin_at, None
        if begin_at is None or restored is not None or not self.is_host:
            super()._begin_momentum(restored, identity)
