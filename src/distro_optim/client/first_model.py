"""A model that only peers have, downloaded before there is one here to compare it with.

A session compares what peers send with the model it was given. Who joins a run whose model is on no disk of this
machine has none to give: :class:`FirstModel` takes the run's first
:class:`~distro_optim.strategy.rounds.actions.Initialize`
off the port, downloads, and then puts both back, so that the session finds everything as if nobody had looked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from typing_extensions import override

from ..comm.model_exchange import Check, Patience, SharedModel
from ..coordinator.model import LLM
from ..coordinator.rules.checkpoints import is_with_peers
from ..coordinator.types import Coordinator, RunState
from ..errors import (
    ExchangeError,
    ModelConfigError,
    ModelTooLargeError,
    ModelWeightsError,
    ProtocolError,
    RunError,
)
from ..models.building import build_shapes, persistent_buffers, sorted_parameters
from ..models.config import read_config
from ..models.memory import check_memory
from ..strategy.model.handover import MAX_REFUSALS
from ..strategy.port import RunPort, TrainerAction
from ..strategy.rounds.actions import Initialize, RunEnded

__all__ = ["FirstModel", "comes_through_peers"]

MAX_PARAMETER_BYTES: Final = 8 << 30
"""The largest tensor of the 40B Consilience model has 2 GB in bfloat16. What the peers' configuration makes of it is a
lower bound."""

# Name, archive and message around a tensor's bytes: a few hundred, and the name. float32 is twice bfloat16.
_ENVELOPE_BYTES: Final = 64 * 1024
_WIDEST: Final = 2

_UNDER_WAY: Final = frozenset({RunState.WARMUP, RunState.ROUND_TRAIN, RunState.ROUND_WITNESS, RunState.COOLDOWN})
"""An epoch is under way, and who is not in it waits for the next."""


def comes_through_peers(state: Coordinator, key: bytes) -> bool:
    """Whether who joins now gets the model from peers, as far as the state tells: they train already."""
    if is_with_peers(state.model.checkpoint):
        return True
    ours = any(client.id.signer == key for client in state.epoch_state.clients)
    return state.run_state in _UNDER_WAY and not ours


class FirstModel(RunPort):
    """A port that has looked ahead; everything else passes through.

    Args:
        port: started, and nothing taken from it yet.
        run: what the run says of its model.
        device: that it must fit on.
    """

    def __init__(self, port: RunPort, run: LLM, device: torch.device) -> None:
        self._port = port
        self._run = run
        self._device = device
        self._action: TrainerAction | None = None
        self._model: SharedModel | None = None
        self._refused = 0

    def download(self, progress: Callable[[int, int], None] | None = None) -> SharedModel:
        """Waits until the run wants the model loaded, and gets it from peers.

        Raises:
            RunError: the run ended before.
            ModelWeightsError: no peer has the model.
            ModelConfigError, ModelTooLargeError: nothing can be made of it here, as far as peers can be believed.
        """
        while True:
            action = self._port.next_action(1.0)
            if isinstance(action, RunEnded):
                raise RunError(f"the run ended before its model could be loaded: {action.error or 'it is finished'}")
            if not isinstance(action, Initialize):
                continue
            if not action.providers:
                raise ModelWeightsError(
                    "the run's model is neither here nor with a peer: name the folder that has it with --model, or "
                    "join again once others train"
                )
            turn = self._refused % len(action.providers)
            try:
                self._model = self._port.download_model(
                    [*action.providers[turn:], *action.providers[:turn]],
                    max_parameter_bytes=MAX_PARAMETER_BYTES,
                    check=_Check(self._run, self._device, len(action.providers)),
                    progress=progress,
                )
            except (ExchangeError, ProtocolError) as error:
                self.refuse(str(error))
                continue
            self._action = action
            return self._model

    def refuse(self, reason: str) -> None:
        """Nothing can be made of what came; it is asked for again, of another peer first, as long as the run goes."""
        self._action = self._model = None
        self._refused += 1
        self._port.initialization_failed(reason)

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
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.LONG,
    ) -> SharedModel:
        model, self._model = self._model, None
        if model is None:
            return self._port.download_model(
                providers, max_parameter_bytes=max_parameter_bytes, check=check, progress=progress, patience=patience
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


class _Check:
    """Whether what a peer describes is a model that can be trained here; asked before any of it is downloaded."""

    def __init__(self, run: LLM, device: torch.device, providers: int) -> None:
        self._run = run
        self._device = device
        # One peer alone must not keep us out with a model that nobody trains.
        self._left = 1 if providers == 1 else MAX_REFUSALS

    def __call__(self, config: str, names: Sequence[str]) -> int:
        """Returns the bytes that its largest parameter takes at most."""
        try:
            return self._largest(config, names)
        except (ModelConfigError, ModelTooLargeError) as error:
            self._left -= 1
            if self._left <= 0:
                raise
            raise ProtocolError(str(error)) from None

    def _largest(self, config: str, names: Sequence[str]) -> int:
        if not config.lstrip().startswith("{"):
            raise ProtocolError("the peer's configuration is no JSON object")
        shapes = build_shapes(read_config(config, self._run.architecture, max_seq_len=self._run.max_seq_len))
        parameters = sorted_parameters(shapes)
        check_memory(parameters.values(), self._device, buffers=shapes.buffers())
        tensors = {**parameters, **persistent_buffers(shapes)}
        if not parameters.keys() <= set(names) <= tensors.keys():
            raise ProtocolError("the peer's parameters are not those of the model that it describes")
        return max(t.numel() * t.element_size() for t in tensors.values()) * _WIDEST + _ENVELOPE_BYTES
