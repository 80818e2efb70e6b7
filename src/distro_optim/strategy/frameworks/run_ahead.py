"""A run as a script meets it before it is asked for its model, its optimizer and its schedules.

A schedule is made for a number of steps, and a framework that is asked for that number goes by the script: by its batch
size and its epochs. In a run it is the run that has steps and batches, and a peer that joins has to ask it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, cast

from ...coordinator.rules.steps import last_trained_step
from ...coordinator.types import Coordinator
from ..config import RunConfig
from ..connecting import connect_to_run, settings_to_host
from ..environment import RunEnvironment
from ..forwarding import interruptible
from ..options import SESSION_DEFAULTS, SessionOptions, TrainingOptions, complete
from ..port import RunAccess
from ..ranks.local_ranks import LocalRanks
from ..ranks.one_peer import FollowerPort, leading

__all__ = ["RunAhead"]


@dataclass(frozen=True, kw_only=True)
class RunAhead:
    """What is known of a run before we are in it.

    Attributes:
        access: through which we looked at the run, and can join it; None if we host.
        config: of the run, if we host.
        ranks: the processes of this machine, if they are several.
    """

    access: RunAccess | None
    config: RunConfig
    ranks: LocalRanks | None

    @classmethod
    def look(
        cls,
        run: str | None,
        options: TrainingOptions,
        *,
        interrupt: Callable[[], None],
        ranks: LocalRanks | None,
    ) -> Self:
        """Looks at the run that the script or the environment names, without asking to be in it.

        Args:
            run: a ticket or an address; None leaves it to the environment.
            options: of the session.
            interrupt: as for :class:`~.framework_session.FrameworkSession`.
            ranks: every process of this machine calls this, at the same time.

        Raises:
            ConfigurationError: an argument or a variable of the environment is wrong.
            JoinRefusedError, CoordinatorLinkError, ExchangeError: see :meth:`~..session.SwarmSession.start`.
        """

        def said() -> tuple[RunEnvironment, str | None, RunConfig]:
            environment = RunEnvironment.read()
            name = run if run is not None else environment.run
            return environment, name, settings_to_host(options.get("config"), environment)

        if ranks is None:
            environment, name, config = said()
        else:
            environment, name, config = ranks.share(said if ranks.leads else None)
        if name is None:
            return cls(access=None, config=config, ranks=ranks)
        access: RunAccess
        if ranks is not None and not ranks.leads:
            access = FollowerPort(ranks)
        else:
            given = complete(cast(SessionOptions, options), SESSION_DEFAULTS, of="PsycheStrategy")
            access = interruptible(connect_to_run(name, given, environment), interrupt)
            access = access if ranks is None else leading(access, ranks)
        try:
            access.life.look()
        except BaseException:
            access.life.close()
            raise
        return cls(access=access, config=config, ranks=ranks)

    @property
    def state(self) -> Coordinator | None:
        """Of the run that we join, as far as it is known; None if we host."""
        return None if self.access is None else self.access.facts.state

    @property
    def last_step(self) -> int | None:
        """The last step that is trained, counted from 1; None leaves it to the script."""
        if self.access is None:
            return self.config.last_step
        state = self.state
        return None if state is None else last_trained_step(state.config)

    def close(self) -> None:
        """Leaves the run, if we are in it still."""
        if self.access is not None:
            self.access.life.close()
