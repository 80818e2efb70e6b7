"""A session inside of a framework's loop."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Unpack, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ...comm.signing import SecretKey
from ...errors import ConfigurationError
from ...optimizer import DisTrO
from ..config import RunConfig
from ..forwarding import interruptible
from ..model.resuming import StartingPoint
from ..options import (
    STRATEGY_DEFAULTS,
    SessionOptions,
    StrategyOptions,
    TrainingOptions,
    check_kinds,
    check_reach,
    with_present_names,
)
from ..port import RunAccess, RunView
from ..ranks.local_ranks import LocalRanks
from ..session import SwarmSession
from .invitation import invitation, print_unbroken
from .run_ahead import RunAhead

__all__ = ["Ended", "FrameworkSession", "check_for_ddp", "split_options"]

_NOT_IN_SESSION_ARGUMENTS: Final = frozenset(
    {
        "run",
        "config",
        "secret_key",
        "relay",
        "checkpoint_dir",
        "resume",
        "learning_rates",
        "on_event",
        "model",
        "optimizer",
        "dataset_size",
        "port",
        "audit_loss",
    }
)
"""What the strategies had as arguments of their own from the beginning, or give the session themselves."""


def split_options(options: StrategyOptions, *, of: str) -> tuple[TrainingOptions, dict[str, Any]]:
    """What a strategy was given, as options for its session and arguments for ``DDPStrategy``.

    Those for the session can be pickled; a key, which cannot, is kept as its bytes.

    Args:
        options: as they were given.
        of: name of the strategy, for messages.

    Raises:
        ConfigurationError: something is given twice, or is for the strategy to give, or names no relay server, no
            discovery or no address.
    """
    given = with_present_names(options, of=of)
    more: Mapping[str, Any] = with_present_names(given.pop("session_arguments", None) or {}, of=of)
    if wrong := sorted(more.keys() & (_NOT_IN_SESSION_ARGUMENTS | given.keys())):
        raise ConfigurationError(
            f"session_arguments has {', '.join(wrong)}, which is an argument of the strategy, or its own business",
            name="session_arguments",
            value=more,
        )
    session: dict[str, Any] = dict(more)
    session |= {name: given.pop(name) for name in STRATEGY_DEFAULTS if name in given}
    check_kinds(session)
    check_reach(session)
    if isinstance(key := session.get("secret_key"), SecretKey):
        session["secret_key"] = key.to_bytes()
    return cast(TrainingOptions, session), given


def check_for_ddp(others: Mapping[str, Any], *, of: str, ddp: type) -> None:
    """Looks at what a strategy passes on to ``DDPStrategy``, which takes any name, and with one device uses none.

    Args:
        others: the arguments.
        of: name of the strategy, for messages.
        ddp: the class.

    Raises:
        ConfigurationError: neither it, nor PyTorch's ``DistributedDataParallel`` has an argument of this name.
    """
    known = {name for kind in (*ddp.__mro__, DistributedDataParallel) for name in _arguments(kind)}
    for name in others:
        if name not in known:
            near = difflib.get_close_matches(name, [*STRATEGY_DEFAULTS, "run", *known], n=1)
            hint = f"did you mean {near[0]}?" if near else f"help({of}) lists what there is"
            raise ConfigurationError(f"{of} has no argument {name!r}; {hint}", name=name, value=others[name])


def _arguments(kind: type) -> Iterator[str]:
    """The names that the constructor of ``kind`` itself has."""
    if "__init__" in vars(kind) and kind is not object:
        for name, parameter in inspect.signature(vars(kind)["__init__"]).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                yield name


@dataclass(frozen=True)
class Ended:
    """What a strategy keeps of a run that it has left; nothing but words and numbers, so that it can be pickled.

    Attributes:
        view: the last one.
        summary: see :meth:`.SwarmSession.summary`.
    """

    view: RunView | None = None
    summary: str | None = None


class FrameworkSession(SwarmSession):
    """A :class:`~.session.SwarmSession` that a framework can interrupt, and whose momentum it may have restored.

    Args:
        model: unwrapped.
        optimizer: of its parameters.
        run: a ticket or an address; None hosts.
        interrupt: asked several times a second while the session waits; raises if the wait is to end.
        complete: fills in what the settings of a hosted run leave open.
        ranks: the processes of this machine, if they are several: only the leader is in the run, and saves and reports.
        ahead: what is known of the run already; a run that was looked at is joined through the same access.
        begin_at: where a hosted run goes on, whose weights and momentum a checkpoint of the framework's had; None
            starts at the first step.
        options: of the session.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: DisTrO,
        *,
        run: str | None = None,
        interrupt: Callable[[], None],
        complete: Callable[[RunConfig], RunConfig],
        ranks: LocalRanks | None = None,
        ahead: RunAhead | None = None,
        begin_at: StartingPoint | None = None,
        **options: Unpack[SessionOptions],
    ) -> None:
        self._given_ranks = ranks
        self._ahead = ahead
        self._interrupt = interrupt
        self._complete = complete
        self._peers_to_start = 1
        super().__init__(model, optimizer, run=run, begin_at=begin_at, **options)

    def invite(self, code: str) -> None:
        """Tells people how they can join, see :mod:`.invitation`; those who do not host have nothing to tell.

        Args:
            code: the line of a script that takes a ticket, with ``{ticket!r}`` in it.
        """
        if self.is_host and self.ticket is not None:
            print_unbroken(invitation(self.run_id, self.ticket, code, self._peers_to_start))

    def end(self) -> Ended:
        """Leaves the run, and shows what remains of it."""
        try:
            self.close()
        finally:
            ended = Ended(self.view(), self.summary())
        if self.speaks_for_the_peer and ended.view is not None and ended.view.rounds_trained:
            print_unbroken(str(ended.summary))
        return ended

    @override
    def local_ranks(self) -> LocalRanks | None:
        return self._given_ranks

    @override
    def connect(self) -> RunAccess:
        ahead = self._ahead.access if self._ahead is not None else None
        return super().connect() if ahead is None else ahead

    @override
    def open_access(self) -> RunAccess:
        return interruptible(super().open_access(), self._interrupt)

    @override
    def hosting_config(self) -> RunConfig:
        config = self._complete(super().hosting_config())
        self._peers_to_start = config.peers_to_start or config.min_peers
        return config
