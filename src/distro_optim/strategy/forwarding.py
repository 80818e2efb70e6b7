"""Ports that stand before another one: what is asked of them they ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from typing_extensions import override

from ..comm.model_exchange import Check, Patience, SharedModel
from ..compress import CompressedUpdate, TilePlan
from ..coordinator.types import Coordinator, NodeIdentity
from .port import RunEvent, RunPort, RunView, TrainerAction

__all__ = ["ForwardingPort", "InterruptiblePort"]

_SLICE = 0.1
"""Seconds for which a wait is not interrupted. Well below what a person notices."""


class ForwardingPort(RunPort):
    """Hands everything on to ``inner``. A base class: whoever derives from it changes what it wants changed."""

    def __init__(self, inner: RunPort) -> None:
        self.inner = inner

    @property
    @override
    def identity(self) -> NodeIdentity:
        return self.inner.identity

    @property
    @override
    def run_id(self) -> str:
        return self.inner.run_id

    @property
    @override
    def ticket(self) -> str | None:
        return self.inner.ticket

    @property
    @override
    def is_host(self) -> bool:
        return self.inner.is_host

    @property
    @override
    def state(self) -> Coordinator | None:
        return self.inner.state

    @override
    def start(self) -> None:
        self.inner.start()

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        return self.inner.next_action(timeout)

    @override
    def is_cancelled(self, step: int) -> bool:
        return self.inner.is_cancelled(step)

    @override
    def initialized(self, plan: TilePlan, names: Sequence[str]) -> None:
        self.inner.initialized(plan, names)

    @override
    def initialization_failed(self, reason: str) -> None:
        self.inner.initialization_failed(reason)

    @override
    def trained(self, step: int, update: CompressedUpdate, own: object, *, loss: float | None = None) -> None:
        self.inner.trained(step, update, own, loss=loss)

    @override
    def cancelled(self, step: int) -> None:
        self.inner.cancelled(step)

    @override
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        self.inner.weights_hashed(step, digests)

    @override
    def download_model(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.LONG,
    ) -> SharedModel:
        return self.inner.download_model(
            providers, max_parameter_bytes=max_parameter_bytes, check=check, progress=progress, patience=patience
        )

    @override
    def offer_model(self, model: SharedModel) -> None:
        self.inner.offer_model(model)

    @override
    def withdraw_model(self) -> None:
        self.inner.withdraw_model()

    @override
    def take_events(self) -> list[RunEvent]:
        return self.inner.take_events()

    @override
    def view(self) -> RunView:
        return self.inner.view()

    @override
    def close(self, timeout: float = 5.0) -> None:
        self.inner.close(timeout)


class InterruptiblePort(ForwardingPort):
    """Asks ``interrupt`` several times a second, while it waits, whether to go on.

    Args:
        inner: the port.
        interrupt: raises if the wait is to end; an action that was waited for is not lost.
    """

    def __init__(self, inner: RunPort, interrupt: Callable[[], None]) -> None:
        super().__init__(inner)
        inner.interrupt = interrupt
        self._interrupt = interrupt

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        left = float("inf") if timeout is None else timeout
        while True:
            self._interrupt()
            action = self.inner.next_action(min(left, _SLICE))
            left -= _SLICE
            if action is not None or left <= 0:
                return action
