"""A run that is a list of actions, and peers that share what they are told to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from typing_extensions import override

from distro_optim.comm.model_exchange import Patience, SharedModel
from distro_optim.coordinator.types import Coordinator, NodeIdentity
from distro_optim.errors import ExchangeError, ProtocolError
from distro_optim.strategy.port import RunPort, RunView, TrainerAction


class ScriptedPort(RunPort):
    """Gives ``actions`` in turn; a download takes the next of ``models``."""

    def __init__(self, actions: Iterable[TrainerAction], models: Iterable[SharedModel | Exception] = ()) -> None:
        self.coming = list(actions)
        self.models = list(models)
        self.said: list[tuple[Any, ...]] = []
        self.bounds: list[int | Mapping[str, int] | None] = []
        self.closed = False

    identity = NodeIdentity.from_single_key(bytes(32))
    run_id = "scripted"
    ticket = None
    is_host = False
    state: Coordinator | None = None

    @override
    def start(self) -> None:
        self.said.append(("start",))

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        return self.coming.pop(0) if self.coming else None

    @override
    def is_cancelled(self, step: int) -> bool:
        return False

    @override
    def initialized(self, plan: Any, names: Sequence[str]) -> None:
        self.said.append(("initialized", tuple(names)))

    @override
    def initialization_failed(self, reason: str) -> None:
        self.said.append(("initialization_failed", reason))

    @override
    def trained(self, step: int, update: Any, own: object, *, loss: float | None = None) -> None:
        self.said.append(("trained", step, loss))

    @override
    def cancelled(self, step: int) -> None:
        self.said.append(("cancelled", step))

    @override
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        self.said.append(("weights_hashed", step, len(digests)))

    @override
    def download_model(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Callable[[bytes, str, Sequence[str]], int | Mapping[str, int] | None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.LONG,
    ) -> SharedModel:
        for peer in itertools.cycle(list(providers)):
            if not self.models:
                break
            model = self.models.pop(0)
            if isinstance(model, Exception):
                raise model
            try:
                self.bounds.append(check(peer, model.config, list(model.parameters)) if check is not None else None)
            except ProtocolError as error:
                self.said.append(("refused", str(error)))
                continue
            if progress is not None:
                progress(len(model.parameters), len(model.parameters))
            return model
        raise ExchangeError("nobody shared the model")

    @override
    def offer_model(self, model: SharedModel) -> None:
        self.said.append(("offered", model))

    @override
    def withdraw_model(self) -> None:
        self.said.append(("withdrawn",))

    @override
    def take_events(self) -> list[Any]:
        return []

    @override
    def view(self) -> RunView:
        return RunView(run_id=self.run_id)

    @override
    def close(self, timeout: float = 5.0) -> None:
        self.closed = True
