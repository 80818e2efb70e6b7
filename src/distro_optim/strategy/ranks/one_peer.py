"""The access to a run of several processes that are one peer: one is in the run, the others do as it does.

All have a session of their own, on their own copy of the model or on their shards of it, and all sessions carry out the
same actions in the same order: the leader's access (:func:`leading`) passes on what it gets, and :class:`FollowerPort`
takes it from there. Gradients are averaged among them before they reach the optimizer, so what they compute is the
same, and only the leader's goes out. What a session asks of its run, all of them ask, in the same order; only views may
be asked for by one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from typing_extensions import override

from ...comm.live_weights import FetchedTensors, WantedTensors
from ...comm.model_exchange import SharedModel
from ...compress import CompressedUpdate, TilePlan
from ...coordinator.types import Coordinator, NodeIdentity
from ...errors import RunError
from ..forwarding import AccessParts, ForwardingActions, ForwardingLife, ForwardingSharing
from ..port import (
    ModelSharing,
    RunAccess,
    RunActions,
    RunEvent,
    RunFacts,
    RunLife,
    RunPort,
    RunView,
    TrainerAction,
)
from .holders import stand_ins
from .local_ranks import LocalRanks

__all__ = ["FollowerPort", "is_shared", "leading"]


@dataclass(frozen=True)
class _Facts:
    """What is known once the run is looked at."""

    identity: NodeIdentity
    run_id: str
    ticket: str | None
    is_host: bool
    state: Coordinator | None
    view: RunView

    @classmethod
    def of(cls, facts: RunFacts) -> Self:
        return cls(facts.identity, facts.run_id, facts.ticket, facts.is_host, facts.state, facts.view())


def leading(access: RunAccess, ranks: LocalRanks) -> RunAccess:
    """The access of the process that is in the run, which passes on to the others what it gets."""
    return AccessParts.of(
        access,
        actions=_LeadersActions(access.actions, access.facts, ranks),
        sharing=_LeadersSharing(access.sharing, ranks),
        life=_LeadersLife(access.life, access.facts, ranks),
    )


def is_shared(access: RunAccess) -> bool:
    """Whether it is one that :func:`leading` has made, or a :class:`FollowerPort`."""
    return isinstance(access, FollowerPort) or isinstance(access.actions, _LeadersActions)


class _LeadersActions(ForwardingActions):
    def __init__(self, inner: RunActions, facts: RunFacts, ranks: LocalRanks) -> None:
        super().__init__(inner)
        self._facts = facts
        self._ranks = ranks

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        # Never wait for long: the others wait with us, and their group has a timeout.
        action, _ = self._ranks.share(lambda: (self.inner.next_action(timeout), _Facts.of(self._facts)))
        return action

    @override
    def is_cancelled(self, step: int) -> bool:
        return self._ranks.share(lambda: self.inner.is_cancelled(step))

    @override
    def take_events(self) -> list[RunEvent]:
        return self._ranks.share(self.inner.take_events)


class _LeadersSharing(ForwardingSharing):
    def __init__(self, inner: ModelSharing, ranks: LocalRanks) -> None:
        super().__init__(inner)
        self._ranks = ranks

    @override
    def download_model(self, providers: Iterable[bytes], **settings: Any) -> SharedModel:
        got: list[SharedModel] = []

        def download() -> SharedModel:
            got.append(self.inner.download_model(providers, **settings))
            if self._ranks.hold_together:  # each gets its part when the model is loaded
                return replace(got[0], parameters=stand_ins(got[0].parameters))
            return got[0]

        self._ranks.share(download)
        return got[0]

    @override
    def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors, *, seconds: float) -> FetchedTensors:
        got: list[FetchedTensors] = []

        def download() -> FetchedTensors:
            got.append(self.inner.download_tensors(providers, wanted, seconds=seconds))
            return replace(got[0], tensors=stand_ins(got[0].tensors)) if self._ranks.hold_together else got[0]

        self._ranks.share(download)
        return got[0]


class _LeadersLife(ForwardingLife):
    def __init__(self, inner: RunLife, facts: RunFacts, ranks: LocalRanks) -> None:
        super().__init__(inner)
        self._facts = facts
        self._ranks = ranks

    @override
    def look(self) -> None:
        self._all(self.inner.look)

    @override
    def start(self) -> None:
        self._all(self.inner.start)

    def _all(self, step: Callable[[], None]) -> None:
        def take_it() -> _Facts:
            step()
            return _Facts.of(self._facts)

        self._ranks.share(take_it)


class FollowerPort(RunPort):
    """The access of another process of the same machine. Answers are dropped: the leader's count."""

    def __init__(self, ranks: LocalRanks) -> None:
        self._ranks = ranks
        self._facts: _Facts | None = None

    def _known(self) -> _Facts:
        if self._facts is None:
            raise RunError("nothing is known of the run before start()")
        return self._facts

    @property
    @override
    def identity(self) -> NodeIdentity:
        return self._known().identity

    @property
    @override
    def run_id(self) -> str:
        return self._known().run_id

    @property
    @override
    def ticket(self) -> str | None:
        return self._facts.ticket if self._facts is not None else None

    @property
    @override
    def is_host(self) -> bool:
        return self._known().is_host

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._facts.state if self._facts is not None else None

    @override
    def look(self) -> None:
        self._facts = self._ranks.share(None)

    @override
    def start(self) -> None:
        self._facts = self._ranks.share(None)

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        told: tuple[TrainerAction | None, _Facts] = self._ranks.share(None)
        action, self._facts = told
        return action

    @override
    def is_cancelled(self, step: int) -> bool:
        return bool(self._ranks.share(None))

    @override
    def take_events(self) -> list[RunEvent]:
        events: list[RunEvent] = self._ranks.share(None)
        return events

    @override
    def download_model(self, providers: Iterable[bytes], **settings: Any) -> SharedModel:
        model: SharedModel = self._ranks.share(None)
        return model

    @override
    def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors, *, seconds: float) -> FetchedTensors:
        fetched: FetchedTensors = self._ranks.share(None)
        return fetched

    @override
    def initialized(self, plan: TilePlan, names: Sequence[str]) -> None:
        pass

    @override
    def initialization_failed(self, reason: str) -> None:
        pass

    @override
    def trained(self, step: int, update: CompressedUpdate, own: object, *, loss: float | None = None) -> None:
        pass

    @override
    def cancelled(self, step: int) -> None:
        pass

    @override
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        pass

    @override
    def offer_model(self, model: SharedModel) -> None:
        pass

    @override
    def withdraw_model(self) -> None:
        pass

    @override
    def view(self) -> RunView:
        return self._known().view

    @override
    def close(self, timeout: float = 5.0) -> None:
        pass
