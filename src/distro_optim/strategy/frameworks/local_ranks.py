"""Several processes of one machine as one peer: one is in the run, the others do as it does.

All have a session of their own, on their own copy of the model, and all sessions carry out the same actions in the same
order: the leader's access (:func:`leading`) passes on what it gets, and :class:`FollowerPort` takes it from there.
Gradients are averaged among them before they reach the optimizer, so what they compute is the same, and only the
leader's goes out. What a session asks of its run, all of them ask, in the same order; only views may be asked for by
one alone.

They are processes of one script on one machine and trust each other: what passes between them is pickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Self, TypeVar

import torch.distributed as dist
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

__all__ = ["FollowerPort", "LocalRanks", "leading"]

LEADER: Final = 0
"""The rank of the process that is in the run."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What the leader's call returned, or raised."""

    value: T | None
    error: BaseException | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


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


class LocalRanks:
    """The processes of this machine, over their own group: gloo, on whatever device they train.

    Every process makes one, at the same time; there is a process group already.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self.leads = dist.get_rank() == LEADER

    def share(self, ask: Callable[[], T] | None) -> T:
        """What ``ask`` returns or raises on the leader; it is None on the others."""
        said: list[Any] = [None]
        if ask is not None:
            try:
                said = [_Outcome(ask())]
            except BaseException as error:
                said = [_Outcome(None, error)]
                dist.broadcast_object_list([_Outcome(None, _portable(error))], LEADER, group=self._group)
                raise
        dist.broadcast_object_list(said, LEADER, group=self._group)
        outcome: _Outcome[T] = said[0]
        result: T = outcome.result()
        return result


def leading(access: RunAccess, ranks: LocalRanks) -> RunAccess:
    """The access of the process that is in the run, which passes on to the others what it gets."""
    return AccessParts.of(
        access,
        actions=_LeadersActions(access.actions, access.facts, ranks),
        sharing=_LeadersSharing(access.sharing, ranks),
        life=_LeadersLife(access.life, access.facts, ranks),
    )


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
        return self._ranks.share(lambda: self.inner.download_model(providers, **settings))

    @override
    def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors, *, seconds: float) -> FetchedTensors:
        return self._ranks.share(lambda: self.inner.download_tensors(providers, wanted, seconds=seconds))


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


def _portable(error: BaseException) -> BaseException:
    """An error that the other processes can raise; of one that does not survive the way, what it says."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own, to see whether it can be
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")
    return error
