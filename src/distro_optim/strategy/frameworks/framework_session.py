"""A session inside of a framework's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from ...comm.signing import SecretKey
from ...coordinator.types import Coordinator
from ...errors import ConfigurationError
from ..config import RunConfig
from ..environment import RunEnvironment
from ..forwarding import InterruptiblePort
from ..model.resuming import StartingPoint
from ..news import News
from ..port import RunPort
from ..session import SwarmSession
from .local_ranks import FollowerPort, LeaderPort, LocalRanks

__all__ = ["FrameworkSession", "arguments_of_session"]


def arguments_of_session(ours: Mapping[str, Any], more: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a strategy will make its session with. Can be pickled; a key, which cannot, is kept as its bytes.

    Raises:
        ConfigurationError: something is given twice, or is for the strategy to give.
    """
    reserved = {*ours, "model", "optimizer", "dataset_size", "port"}
    if twice := sorted(reserved & set(more or {})):
        raise ConfigurationError(
            f"session_arguments has {', '.join(twice)}, which is an argument of the strategy, or its own business",
            name="session_arguments",
            value=more,
        )
    arguments = {**ours, **(more or {})}
    if isinstance(arguments["secret_key"], SecretKey):
        arguments["secret_key"] = arguments["secret_key"].to_bytes()
    return arguments


class FrameworkSession(SwarmSession):
    """A :class:`~.session.SwarmSession` that a framework can interrupt, and whose momentum it may have restored.

    Args:
        interrupt: asked several times a second while the session waits; raises if the wait is to end.
        complete: fills in what the settings of a hosted run leave open.
        ranks: the processes of this machine, if they are several: only the leader is in the run, and saves and reports.
        begin_at: where a hosted run goes on, whose weights and momentum a checkpoint of the framework's had; None
            begins anew.
        kwargs: of the session.
    """

    def __init__(
        self,
        *args: Any,
        interrupt: Callable[[], None],
        complete: Callable[[RunConfig], RunConfig],
        ranks: LocalRanks | None = None,
        begin_at: StartingPoint | None = None,
        on_event: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._follows = ranks is not None and not ranks.leads
        super().__init__(*args, on_event=None if self._follows else on_event, **kwargs)
        if self._follows:
            self._environment = RunEnvironment()
            self._news = News(None, self._environment, quiet=True)
        self._ranks = ranks
        self._interrupt = interrupt
        self._complete = complete
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
    def start(self) -> None:
        super().start()
        if self._follows:
            self._keeper = None  # what was to be resumed is read; it is the leader that saves

    @override
    def _connect(self) -> RunPort:
        if self._ranks is not None and self._follows:
            return FollowerPort(self._ranks)
        port: RunPort = InterruptiblePort(super()._connect(), self._interrupt)
        return port if self._ranks is None else LeaderPort(port, self._ranks)

    @override
    def _hosting_config(self) -> RunConfig:
        return self._complete(super()._hosting_config())
