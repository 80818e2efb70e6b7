"""The model on its way between peers: offered to those that join, which download it and compare it with theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from ...comm.model_exchange import Check, Patience, SharedModel
from ...errors import ExchangeError, ModelMismatchError, ProtocolError
from ...protocol import OURS
from ..port import ModelSharing
from ..rounds.actions import Initialize
from .identity import ModelIdentity, describe, weights_root
from .machine import machine_facts
from .trainer import SwarmTrainer

__all__ = ["ModelHandover", "message_bytes"]

MAX_SINGLE_PROVIDERS: Final = 3
"""Peers that are asked for the whole model, one after the other, where several together gave no whole one. Each costs
as much as all together; the next warm-up begins afresh. Chosen arbitrarily."""

_ENVELOPE_BYTES: Final = 64 * 1024
"""Name, archive and message around a tensor's bytes: a few hundred, and the name."""

_WIDEST_BYTES: Final = 4
"""Of an element: a peer of Psyche's kind may send float32 where ours is bfloat16."""


def message_bytes(tensor: Tensor, widest: int = 0) -> int:
    """Bound on the message in which ``tensor`` travels, with elements of at least ``widest`` bytes."""
    return tensor.numel() * max(tensor.element_size(), widest) + _ENVELOPE_BYTES


class _TornModelError(ProtocolError):
    """What came is in parts of different models, or a part is of none."""


class ModelHandover:
    """Both sides of model sharing, for one model. Belongs to the training thread.

    Args:
        sharing: the way to the other peers.
        trainer: has the model's tensors.
        model: whose configuration goes with the weights, if it is one of transformers.
        script_rates: learning rates are compared; see :func:`~.model_identity.describe`.
        data: see :class:`~.model_identity.ModelIdentity`.
        as_psyche: parameters travel without buffers and in bfloat16, and a peer need not describe its model.
        tell: told what differs without harm.
        progress: called with parameters that have come, and in all.
    """

    def __init__(
        self,
        sharing: ModelSharing,
        trainer: SwarmTrainer,
        model: nn.Module,
        *,
        script_rates: bool,
        data: Mapping[str, int],
        as_psyche: bool,
        tell: Callable[[str], None],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._sharing = sharing
        self._progress = progress
        self._trainer = trainer
        self._model = model
        self._script_rates = script_rates
        self._data = data
        self._as_psyche = as_psyche
        self._tell = tell
        self._told: set[str] = set()
        self._offered: int | None = None

    def identity(self, epoch: int, step: int, weights: bytes = bytes(32)) -> ModelIdentity:
        """What the model is now; ``weights`` is the root over its hashes, where it is wanted."""
        identity = describe(
            self._trainer.tensors,
            self._trainer.optimizer,
            epoch=epoch,
            step=step,
            weights=weights,
            script_rates=self._script_rates,
            data=self._data,
        )
        # In a run of Psyche's nothing more is said than before.
        protocols = None if self._as_psyche else (OURS.oldest, OURS.newest)
        return replace(identity, machine=machine_facts(self._trainer.optimizer), protocols=protocols)

    def snapshot(self, epoch: int, step: int) -> tuple[dict[str, Tensor], ModelIdentity]:
        """Copies of all tensors as they are at the start of ``step``, and what they are."""
        values = self._trainer.tensors.copies()
        return values, self.identity(epoch, step, weights_root(self._trainer.tensors, values))

    # -- offering ------------------------------------------------------------------------------------------------------

    def offer(self, identity: ModelIdentity, values: Mapping[str, Tensor]) -> None:
        """Shares ``values``, copies that nobody changes, with peers that join at ``identity.step``."""
        if self._as_psyche:
            buffers = self._trainer.tensors.buffers
            values = {
                name: values[name].to(torch.bfloat16) for name in sorted(values, key=str.encode) if name not in buffers
            }
        # Psyche's clients want the tokenizer with the model, where there is one.
        companions = getattr(self._model, "companions", {})
        tokenizer = companions.get("tokenizer.json", b"").decode() if isinstance(companions, dict) else ""
        self._sharing.offer_model(SharedModel(identity.encode(self._model), tokenizer, dict(values)))
        self._offered = identity.step

    def passed(self, step: int) -> None:
        """Weights change at ``step``: what was offered for an earlier one is of no use, and must not mislead."""
        if self._offered is not None and step > self._offered:
            self._offered = None
            self._sharing.withdraw_model()

    # -- downloading ---------------------------------------------------------------------------------------------------

    def download(
        self, action: Initialize, *, attempt: int, patience: Patience = Patience.LONG
    ) -> tuple[dict[str, Tensor], ModelIdentity]:
        """The model of the peers, compared with ours.

        Args:
            attempt: how often it was tried in vain; another peer is asked first each time.
            patience: with peers that have nothing to share yet.

        Raises:
            ModelMismatchError: the run trains something else, as every one of the peers says.
            ExchangeError: nobody gave it.
            ProtocolError: what came is not the model of the run, or not whole.
        """
        ours = self.identity(action.epoch, action.step)
        bounds = self._bounds()
        largest = max(bounds.values())
        refused: set[bytes] = set()

        def check(peer: bytes, config: str, names: Sequence[str]) -> Mapping[str, int]:
            try:
                self._check(ours, ModelIdentity.decode(config), names)
            except ModelMismatchError as error:
                refused.add(peer)
                # Liars could say so to keep joiners away: as long as one of the others may still say something else,
                # it is one peer's word.
                if refused >= set(action.providers):
                    raise
                raise ProtocolError(str(error)) from None
            return bounds

        turn = attempt % len(action.providers)
        order = [*action.providers[turn:], *action.providers[:turn]]
        try:
            return self._fetch(order, ours, check, largest, patience)
        except _TornModelError as error:
            reason: Exception = error
        # Some of them have other weights and do not know it yet, or lie. From one alone the model is whole; whether it
        # is the right one, the reports of the warm-up tell.
        for peer in order[:MAX_SINGLE_PROVIDERS]:
            try:
                return self._fetch([peer], ours, check, largest, patience)
            except (ExchangeError, ProtocolError) as error:
                reason = error
        raise reason

    def _bounds(self) -> dict[str, int]:
        """Bytes of each tensor's blob at most, so that a small one cannot be as large as the largest."""
        widest = _WIDEST_BYTES if self._as_psyche else 0
        return {name: message_bytes(tensor, widest) for name, tensor in self._trainer.tensors.all.items()}

    def _fetch(
        self, providers: Sequence[bytes], ours: ModelIdentity, check: Check, largest: int, patience: Patience
    ) -> tuple[dict[str, Tensor], ModelIdentity]:
        """The model from these peers, each giving some of its tensors."""
        tensors = self._trainer.tensors
        shared = self._sharing.download_model(
            providers, max_parameter_bytes=largest, check=check, patience=patience, progress=self._progress
        )
        theirs = ModelIdentity.decode(shared.config)
        self._check(ours, theirs, list(shared.parameters))
        values = {}
        for name, value in shared.parameters.items():
            self._check_tensor(name, value)
            values[name] = value.to(tensors.all[name].dtype)
        root = weights_root(tensors, values)
        if theirs is not None and theirs.weights != root:
            raise _TornModelError(
                "the weights are not those that their hash stands for: peers gave parts of two models"
            )
        if theirs is not None:
            for sentence in ours.harmless_differences(theirs):
                if sentence not in self._told:
                    self._told.add(sentence)
                    self._tell(sentence)
        return values, replace(ours, weights=root)

    def _check(self, ours: ModelIdentity, theirs: ModelIdentity | None, names: Sequence[str]) -> None:
        """Raises ModelMismatchError if it is another model, ProtocolError if it is not the one of this step."""
        if theirs is None and not self._as_psyche:
            raise ProtocolError("the peer does not describe its model")
        if theirs is not None:
            if theirs.step != ours.step:
                raise ProtocolError(f"the peer has the weights of step {theirs.step}, not those of {ours.step}")
            mismatch = ours.first_difference(theirs)
            if mismatch is not None:
                raise mismatch
        tensors = self._trainer.tensors
        wanted = {**tensors.trained, **tensors.frozen} if self._as_psyche else tensors.all
        if set(names) != set(wanted):
            name = min(set(names) ^ set(wanted))
            here, there = ("a parameter", "none") if name in wanted else ("none", "a parameter")
            raise ModelMismatchError(
                f"the run trains something else: {name} is {here} here and {there} in the run; build the same model",
                what=name,
                ours=name in wanted,
                theirs=name not in wanted,
            )

    def _check_tensor(self, name: str, value: Tensor) -> None:
        own = self._trainer.tensors.all[name]
        castable = self._as_psyche and value.is_floating_point() and own.is_floating_point()
        same_dtype = value.dtype == own.dtype or castable
        if value.shape != own.shape or not same_dtype:
            raise _TornModelError(
                f"{name} came as {value.dtype} of shape {tuple(value.shape)}, it is {own.dtype} of "
                f"{tuple(own.shape)} here"
            )
