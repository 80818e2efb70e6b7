"""A model that only peers have, downloaded before there is one here to compare it with.

A session compares what peers send with the model it was given. Who joins a run whose model is on no disk of this
machine has none to give: :class:`FirstModel` takes the run's first :class:`~distro_optim.strategy.actions.Initialize`
off the port, downloads, and then puts both back, so that the session finds everything as if nobody had looked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from typing_extensions import override

from ..comm.iroh.sharing import SharedModel
from ..coordinator.model import P2P, P2PGcs
from ..errors import ExchangeError, ProtocolError, RunError
from ..strategy.actions import Initialize, RunEnded
from ..strategy.port import RunPort, TrainerAction

__all__ = ["FirstModel"]

MAX_PARAMETER_BYTES: Final = 8 << 30
"""The largest tensor of the 40B Consilience model has 2 GB in bfloat16; what a configuration makes of it is checked
against the machine's memory before the weights are used."""


class FirstModel(RunPort):
    """A port that has looked ahead; everything else passes through.

    Args:
        port: started, and nothing taken from it yet.
    """

    def __init__(self, port: RunPort) -> None:
        self._port = port
        self._action: TrainerAction | None = None
        self._model: SharedModel | None = None

    def download(self, progress: Callable[[int, int], None] | None = None) -> SharedModel:
        """Waits until the run wants the model loaded, and gets it from peers.

        Raises:
            RunError: the run ended before, or no peer has the model.
        """
        while True:
            action = self._port.next_action(1.0)
            if isinstance(action, RunEnded):
                raise RunError(f"the run ended before its model could be loaded: {action.error or 'it is finished'}")
            if not isinstance(action, Initialize):
                continue
            if not action.providers:
                raise RunError(
                    "the run's model is with no peer: name the folder that has it with --model, or join again once "
                    "others train"
                )
            try:
                self._model = self._port.download_model(
                    action.providers, max_parameter_bytes=MAX_PARAMETER_BYTES, progress=progress
                )
            except (ExchangeError, ProtocolError) as error:
                self._port.initialization_failed(str(error))
                continue
            self._action = action
            return self._model

    @staticmethod
    def is_needed(checkpoint: object) -> bool:
        """Whether a run with such a checkpoint gives its model through peers."""
        return isinstance(checkpoint, P2P | P2PGcs)

    # -- what was looked at --------------------------------------------------------------------------------------------

    @override
    def start(self) -> None:
        """It is started."""

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        action, self._action = self._action, None
        return action if action is not None else self._port.next_action(timeout)

    @override
    def download_model(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Callable[[str, Sequence[str]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SharedModel:
        model, self._model = self._model, None
        if model is None:
            return self._port.download_model(
                providers, max_parameter_bytes=max_parameter_bytes, check=check, progress=progress
            )
        if check is not None:
            check(model.config, list(model.parameters))
        return model

    # -- what passes through -------------------------------------------------------------------------------------------

    @property
    @override
    def identity(self) -> Any:
        return self._port.identity

    @property
    @override
    def run_id(self) -> str:
        return self._port.run_id

    @property
    @override
    def ticket(self) -> str | None:
        return self._port.ticket

    @property
    @override
    def is_host(self) -> bool:
        return self._port.is_host

    @property
    @override
    def state(self) -> Any:
        return self._port.state

    @override
    def is_cancelled(self, step: int) -> bool:
        return self._port.is_cancelled(step)

    @override
    def initialized(self, plan: Any, names: Sequence[str]) -> None:
        self._port.initialized(plan, names)

    @override
    def initialization_failed(self, reason: str) -> None:
        self._port.initialization_failed(reason)

    @override
    def trained(self, step: int, update: Any, own: object, *, loss: float | None = None) -> None:
        self._port.trained(step, update, own, loss=loss)

    @override
    def cancelled(self, step: int) -> None:
        self._port.cancelled(step)

    @override
    def weights_hashed(self, step: int, digests: Sequence[bytes]) -> None:
        self._port.weights_hashed(step, digests)

    @override
    def offer_model(self, model: SharedModel) -> None:
        self._port.offer_model(model)

    @override
    def withdraw_model(self) -> None:
        self._port.withdraw_model()

    @override
    def take_events(self) -> Any:
        return self._port.take_events()

    @override
    def view(self) -> Any:
        return self._port.view()

    @override
    def close(self, timeout: float = 5.0) -> None:
        self._port.close(timeout)
