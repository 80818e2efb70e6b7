"""A run without a network: the actions that a peer gets when nothing goes wrong, for tests of training loops.

Everybody's results are those of this one peer. What a loop answers is kept for the test to look at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import override

from distro_optim.comm.model_exchange import SharedModel
from distro_optim.compress import CompressedUpdate, TilePlan
from distro_optim.coordinator.rules.steps import last_trained_step, with_round
from distro_optim.coordinator.types import BatchId, Coordinator, NodeIdentity
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.port import RunEvent, RunPort, RunView, TrainerAction
from distro_optim.strategy.rounds.actions import (
    ApplyResults,
    FinishEpoch,
    HashWeights,
    Initialize,
    RunEnded,
    TrainBatch,
)


class QuietRun(RunPort):
    """One peer's run from ``first_step`` on, in ``share_of`` equal shares of which it gets the first.

    Args:
        config: complete.
        first_step: where the peer joins.
        begins_with: the state that a host was given.
        is_host: what the port says of itself.
        cancelled: steps whose training is stopped.
        skipped: steps that the peer does not see: it was not in the epoch.
        error: raised in place of the action for ``error_at``.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        first_step: int = 1,
        begins_with: Coordinator | None = None,
        is_host: bool = True,
        share_of: int = 1,
        cancelled: Iterable[int] = (),
        skipped: Iterable[int] = (),
        error: BaseException | None = None,
        error_at: int = 0,
        before_round: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config = config
        self._state = config.coordinator_state("quiet")
        self.begins_with = begins_with
        self._is_host = is_host
        self.first_step, self.share_of = first_step, share_of
        self.cancelled_steps, self.skipped = set(cancelled), set(skipped)
        self.error, self.error_at = error, error_at
        self.before_round = before_round
        self.started = self.closed = 0
        self.looked_at = False
        self.ended = False
        self.updates: dict[int, CompressedUpdate] = {}
        self.own: dict[int, object] = {}
        self.losses: dict[int, float | None] = {}
        self.stopped: list[int] = []
        self.batches: dict[int, BatchId] = {}
        self.digests: dict[int, list[bytes]] = {}
        self.applied: list[int] = []
        self._actions: deque[TrainerAction] = deque()

    @property
    @override
    def identity(self) -> NodeIdentity:
        return NodeIdentity(bytes(32), bytes(32))

    @property
    @override
    def run_id(self) -> str:
        return self._state.run_id

    @property
    @override
    def ticket(self) -> str | None:
        return "psyche1quiet" if self.started else None

    @property
    @override
    def is_host(self) -> bool:
        return self._is_host

    @property
    @override
    def state(self) -> Coordinator | None:
        return self._state if self.started or self.looked_at else None

    @override
    def look(self) -> None:
        self.looked_at = True

    @override
    def start(self) -> None:
        self.started += 1
        self._checkpoint = self._state.model.checkpoint
        self._actions.append(Initialize(epoch=0, step=self.first_step, checkpoint=self._checkpoint, providers=()))
        self._step = self.first_step - 1
        self._seen: list[int] = []

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        assert self.started, "start() comes first"
        assert not self.closed, "nothing follows close()"
        while not self._actions:
            self._begin_round()
        return self._actions.popleft()

    def _begin_round(self) -> None:
        self._step += 1
        while self._step in self.skipped:
            self._step += 1
        step, last = self._step, self._state.config.total_steps - 1
        trains = step <= last_trained_step(self._state.config)
        if self.error is not None and step >= self.error_at:
            raise self.error
        if step > last:
            self._actions += [FinishEpoch(step=last), RunEnded(step=step)]
            self.ended = True
            return
        if trains:
            self.before_round(step)
        rates: dict[str, Any] = {"lr": 1e-3, "bounds": None}
        if step - 2 in self.updates:
            self._actions.append(ApplyResults(step=step, updates=(self.updates[step - 2],), **rates))
            self.applied.append(step - 2)
        self._actions.append(HashWeights(step))
        if not trains:
            return
        size = self._state.config.global_batch_size_end
        start = (step - 1) * size
        self._state = with_round(self._state, replace(self._state.current_round, data_index=start))
        self.batches[step] = BatchId(start, start + max(1, size // self.share_of) - 1)
        self._actions.append(
            TrainBatch(
                step=step,
                batch=self.batches[step],
                previous_lr=1e-3,
                zero_optim=False,
                own_previous=self.own.get(step - 1),
                **rates,
            )
        )

    @override
    def is_cancelled(self, step: int) -> bool:
        return step in self.cancelled_steps

    @override
    def initialized(self, plan: TilePlan, names: Sequence[str]) -> None:
        self.names = list(names)

    @override
    def initialization_failed(self, reason: str) -> None:
        raise AssertionError(reason)

    @override
    def trained(self, step: int, update: CompressedUpdate, own: object, *, loss: float | None = None) -> None:
        assert step == self._step
        self.updates[step], self.own[step], self.losses[step] = update, own, loss

    @override
    def cancelled(self, step: int) -> None:
        self.stopped.append(step)

    @override
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        self.digests[step] = list(digests)

    @override
    def download_model(self, *args: Any, **kwargs: Any) -> SharedModel:
        raise AssertionError("nobody has a model here")

    @override
    def offer_model(self, model: SharedModel) -> None:
        pass

    @override
    def withdraw_model(self) -> None:
        pass

    @override
    def take_events(self) -> list[RunEvent]:
        return []

    @override
    def view(self) -> RunView:
        return RunView(
            run_id=self.run_id, num_peers=self.share_of, peer_index=0, total_steps=self._state.config.total_steps
        )

    @override
    def close(self, timeout: float = 5.0) -> None:
        self.closed += 1
