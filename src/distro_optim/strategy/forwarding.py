"""An access to a run that stands before another one and changes what goes through some of its seams."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from typing_extensions import override

from ..comm.live_weights import FetchedTensors, LiveWeights, WantedTensors
from ..comm.model_exchange import SharedModel
from ..coordinator.server.acting import HostActs
from ..verify.calibrate import Limits
from .polling import POLL_SECONDS
from .port import (
    AuditAnswers,
    ModelSharing,
    RunAccess,
    RunActions,
    RunAnswers,
    RunEvent,
    RunFacts,
    RunLife,
    TrainerAction,
)

__all__ = [
    "AccessParts",
    "ForwardingActions",
    "ForwardingLife",
    "ForwardingSharing",
    "interruptible",
]


@dataclass(frozen=True, kw_only=True)
class AccessParts:
    """A :class:`~.port.RunAccess` put together from its seams."""

    facts: RunFacts
    actions: RunActions
    answers: RunAnswers
    audit_answers: AuditAnswers
    sharing: ModelSharing
    life: RunLife

    @classmethod
    def of(
        cls,
        access: RunAccess,
        *,
        actions: RunActions | None = None,
        sharing: ModelSharing | None = None,
        life: RunLife | None = None,
    ) -> Self:
        """Those of ``access``, but for the ones that are given."""
        return cls(
            facts=access.facts,
            actions=actions or access.actions,
            answers=access.answers,
            audit_answers=access.audit_answers,
            sharing=sharing or access.sharing,
            life=life or access.life,
        )


class ForwardingActions(RunActions):
    """Those of ``inner``. A base class: override what is to be different."""

    def __init__(self, inner: RunActions) -> None:
        self.inner = inner

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        return self.inner.next_action(timeout)

    @override
    def is_cancelled(self, step: int) -> bool:
        return self.inner.is_cancelled(step)

    @override
    def take_events(self) -> list[RunEvent]:
        return self.inner.take_events()


class ForwardingSharing(ModelSharing):
    """That of ``inner``. A base class: override what is to be different."""

    def __init__(self, inner: ModelSharing) -> None:
        self.inner = inner

    @override
    def download_model(self, providers: Iterable[bytes], **settings: Any) -> SharedModel:
        return self.inner.download_model(providers, **settings)

    @override
    def offer_model(self, model: SharedModel) -> None:
        self.inner.offer_model(model)

    @override
    def withdraw_model(self) -> None:
        self.inner.withdraw_model()

    @override
    def offer_live(self, live: LiveWeights | None) -> None:
        self.inner.offer_live(live)

    @override
    def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors, *, seconds: float) -> FetchedTensors:
        return self.inner.download_tensors(providers, wanted, seconds=seconds)


class ForwardingLife(RunLife):
    """That of ``inner``. A base class: override what is to be different."""

    def __init__(self, inner: RunLife) -> None:
        self.inner = inner

    @property
    @override
    def acts(self) -> HostActs | None:
        return self.inner.acts

    @override
    def look(self) -> None:
        self.inner.look()

    @override
    def judge_by(self, limits: Limits | None) -> None:
        self.inner.judge_by(limits)

    @override
    def start(self) -> None:
        self.inner.start()

    @override
    def close(self, timeout: float = 5.0) -> None:
        self.inner.close(timeout)


def interruptible(access: RunAccess, interrupt: Callable[[], None]) -> RunAccess:
    """``access``, which asks ``interrupt`` several times a second while it waits whether to go on.

    Args:
        access: to the run.
        interrupt: raises if the wait is to end; an action that was waited for is not lost.
    """
    access.life.interrupt = interrupt
    return AccessParts.of(access, actions=_InterruptibleActions(access.actions, interrupt))


class _InterruptibleActions(ForwardingActions):
    def __init__(self, inner: RunActions, interrupt: Callable[[], None]) -> None:
        super().__init__(inner)
        self._interrupt = interrupt

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        left = float("inf") if timeout is None else timeout
        while True:
            self._interrupt()
            action = self.inner.next_action(min(left, POLL_SECONDS))
            left -= POLL_SECONDS
            if action is not None or left <= 0:
                return action
