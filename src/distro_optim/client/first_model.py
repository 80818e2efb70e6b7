"""A model that only peers have, downloaded before there is one here to compare it with.

A session compares what peers send with the model it was given. A peer that joins a run whose model is not on this
machine's disk has none to give: :class:`FirstModel` takes the run's first
:class:`~distro_optim.strategy.rounds.actions.Initialize`, downloads the model, and then puts both back, so that the
session finds everything as if nobody had looked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from typing_extensions import override

from ..comm.model_exchange import Check, SharedModel
from ..coordinator.model import LLM
from ..coordinator.rules.checkpoints import is_with_peers
from ..coordinator.types import Coordinator, NodeIdentity, RunState
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
from ..models.memory import check_memory, share_of
from ..strategy.forwarding import AccessParts, ForwardingActions, ForwardingLife, ForwardingSharing
from ..strategy.port import RunAccess, TrainerAction
from ..strategy.rounds.actions import Initialize, RunEnded

__all__ = ["FirstModel", "comes_through_peers"]

MAX_PARAMETER_BYTES: Final = 8 << 30
"""The largest tensor of the 40B Consilience model has 2 GB in bfloat16. What the peers' configuration makes of it is a
lower bound."""

_ENVELOPE_BYTES: Final = 64 * 1024
"""Name, archive and message around a tensor's bytes: a few hundred, and the name."""

LOOK_SECONDS: Final = 0.25
"""Between two looks at the run: a coordinator waits for members for a second at least."""

_WIDEST: Final = 2
"""float32 takes twice the bytes of bfloat16."""

_UNDER_WAY: Final = frozenset({RunState.WARMUP, RunState.ROUND_TRAIN, RunState.ROUND_WITNESS, RunState.COOLDOWN})
"""An epoch is under way; a client that is not in it waits for the next."""


def comes_through_peers(state: Coordinator, me: NodeIdentity) -> bool:
    """Whether a client that joins now gets the model from peers, as far as the state tells: they train already.

    Args:
        state: of the run.
        me: the client.
    """
    if is_with_peers(state.model.checkpoint):
        return True
    ours = any(client.id == me for client in state.epoch_state.clients)
    return state.run_state in _UNDER_WAY and not ours


def _will_begin_without_peers(state: Coordinator) -> bool:
    """Whether the next epoch begins with the checkpoint that everybody is to have."""
    return state.run_state is RunState.WAITING_FOR_MEMBERS and not is_with_peers(state.model.checkpoint)


class FirstModel:
    """Looks for the run's model ahead of a session, which then takes :attr:`access` and starts from the beginning.

    Args:
        access: to the run; started, and nothing taken from it yet.
        run: what the run says about its model.
        device: on which the model must fit.
        devices: so many like it that hold the model together.
    """

    def __init__(self, access: RunAccess, run: LLM, device: torch.device, *, devices: int = 1) -> None:
        self._inner = access
        self._devices = devices
        self._run = run
        self._device = device
        self._actions = _Actions(access.actions)
        self._sharing = _Sharing(access.sharing)
        self._refused = 0
        self._one_alone = False

    @property
    def access(self) -> RunAccess:
        """To the run, for the session: it is started, and what was taken from it comes again."""
        life = _Started(self._inner.life)
        return AccessParts.of(self._inner, actions=self._actions, sharing=self._sharing, life=life)

    def download(self, progress: Callable[[int, int], None] | None = None) -> SharedModel:
        """Waits until the run wants the model loaded, and gets it from peers.

        Args:
            progress: called with parameters done and in all, from another thread.

        Raises:
            RunError: the run ended before.
            ModelWeightsError: no peer has the model.
            ModelConfigError, ModelTooLargeError: the model cannot be built here, as far as peers can be believed.
        """
        while True:
            action = self._inner.actions.next_action(LOOK_SECONDS)
            state = self._inner.facts.state
            if action is None and state is not None and _will_begin_without_peers(state):
                # Others would begin an epoch with us, and have to abandon it.
                raise ModelWeightsError(
                    "the epoch in which peers had the model came to nothing: name the folder that has it with --model, "
                    "or join again once others train"
                )
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
            order = [*action.providers[turn:], *action.providers[:turn]]
            try:
                model = self._inner.sharing.download_model(
                    order[:1] if self._one_alone else order,
                    max_parameter_bytes=MAX_PARAMETER_BYTES,
                    check=_Check(self._run, self._device, self._devices, action.providers),
                    progress=progress,
                )
            except (ExchangeError, ProtocolError) as error:
                self.refuse(str(error))
                continue
            self._actions.again, self._sharing.again = action, model
            return model

    def refuse(self, reason: str) -> None:
        """What came cannot be used; the run asks for it again, and another peer is tried first then.

        If a whole model came, it is tried alone: one of the others may have given a part that is wrong.
        """
        self._one_alone = self._sharing.again is not None
        self._actions.again = self._sharing.again = None
        self._refused += 1
        self._inner.answers.initialization_failed(reason)


class _Started(ForwardingLife):
    @override
    def start(self) -> None:
        pass


class _Actions(ForwardingActions):
    """Gives one action again, once."""

    again: TrainerAction | None = None

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        action, self.again = self.again, None
        return action if action is not None else self.inner.next_action(timeout)


class _Sharing(ForwardingSharing):
    """Gives one model again, once."""

    again: SharedModel | None = None

    @override
    def download_model(self, providers: Iterable[bytes], *, check: Check | None = None, **settings: Any) -> SharedModel:
        model, self.again = self.again, None
        if model is None:
            return self.inner.download_model(providers, check=check, **settings)
        if check is not None:
            check(next(iter(providers), b""), model.config, list(model.parameters))
        return model


class _Check:
    """Whether what a peer describes is a model that can be trained here; asked before any of it is downloaded."""

    def __init__(self, run: LLM, device: torch.device, devices: int, providers: Iterable[bytes]) -> None:
        self._run = run
        self._devices = devices
        self._device = device
        self._providers = frozenset(providers)
        self._refused: set[bytes] = set()

    def __call__(self, peer: bytes, config: str, names: Sequence[str]) -> int:
        """Returns the bytes that its largest parameter takes at most."""
        try:
            return self._largest(config, names)
        except (ModelConfigError, ModelTooLargeError) as error:
            # Some peers must not keep us out with a model that nobody trains, as long as others may have another.
            self._refused.add(peer)
            if self._refused >= self._providers:
                raise
            raise ProtocolError(str(error)) from None

    def _largest(self, config: str, names: Sequence[str]) -> int:
        if not config.lstrip().startswith("{"):
            raise ProtocolError("the peer's configuration is not a JSON object")
        described = read_config(config, self._run.architecture, max_seq_len=self._run.max_seq_len, from_peer=True)
        shapes = build_shapes(described)
        parameters = sorted_parameters(shapes)
        check_memory(share_of(parameters.values(), self._devices), self._device, buffers=shapes.buffers())
        tensors = {**parameters, **persistent_buffers(shapes)}
        if not parameters.keys() <= set(names) <= tensors.keys():
            raise ProtocolError("the peer's parameters are not those of the model that it describes")
        return max(t.numel() * t.element_size() for t in tensors.values()) * _WIDEST + _ENVELOPE_BYTES
