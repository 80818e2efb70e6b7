"""Tensors that differ from those of the peers are fetched from them in mid-epoch, and given to those that ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, uint8
from typing_extensions import override

from ...comm.live_weights import MAX_WRONG_SHARE, LiveWeights, WantedTensors
from ...errors import ExchangeError, ProtocolError
from ...verify.merkle import merkle_root
from ..port import ModelSharing, RunAnswers
from ..rounds.actions import RepairWeights
from ..rounds.weights import tensor_digest
from .handover import message_bytes
from .identity import some_names
from .still_weights import WeightsGone
from .trainer import SwarmTrainer
from .weights_hash import WeightsHasher

__all__ = ["WeightsInTraining", "WeightsRepair"]


class WeightsInTraining(LiveWeights):
    """The weights of the step under way, as other threads may read them.

    Args:
        trainer: of the model.
        hasher: of its weights.
    """

    def __init__(self, trainer: SwarmTrainer, hasher: WeightsHasher) -> None:
        self._trainer = trainer
        self._hasher = hasher

    @override
    def digests(self, step: int) -> Sequence[bytes] | None:
        of_step, digests = self._hasher.latest
        return digests if of_step == step else None

    @override
    def tensor(self, step: int, name: str) -> Tensor | None:
        own = self._trainer.tensors.trained.get(name)
        if own is None:
            return None
        copy = torch.empty(own.shape, dtype=own.dtype)
        into: memoryview = copy.reshape(-1).view(uint8).numpy().data
        at = 0

        def take(piece: memoryview) -> None:
            nonlocal at
            into[at : at + len(piece)] = piece
            at += len(piece)

        try:
            self._trainer.still.read(step, name, take)
        except WeightsGone:
            return None
        return copy


class WeightsRepair:
    """Answers :class:`~.actions.RepairWeights`, and lets peers do the same with our weights. In the training thread.

    Args:
        sharing: the way to the other peers.
        answers: told whether the weights were repaired.
        trainer: of the model.
        hasher: has the digests of the weights as they are.
        tell: told what was wrong.
    """

    def __init__(
        self,
        sharing: ModelSharing,
        answers: RunAnswers,
        trainer: SwarmTrainer,
        hasher: WeightsHasher,
        *,
        tell: Callable[[str], None],
    ) -> None:
        self._sharing = sharing
        self._answers = answers
        self._trainer = trainer
        self._hasher = hasher
        self._tell = tell
        # Asked from other threads at any time, those that hold the model together could not answer together.
        if not trainer.tensors.holders.several:
            sharing.offer_live(WeightsInTraining(trainer, hasher))

    def carry_out(self, action: RepairWeights) -> None:
        """Replaces the tensors that differ, all or none, and answers."""
        names, own = self._trainer.names, self._trainer.tensors.trained
        wanted = WantedTensors(
            step=action.step,
            root=action.root,
            names=names,
            digests=self._hasher.wait(),
            max_bytes={name: message_bytes(own[name]) for name in names},
            max_wrong=int(MAX_WRONG_SHARE * len(names)),
            digest_of=tensor_digest,
            root_of=merkle_root,
        )
        try:
            fetched = self._sharing.download_tensors(action.providers, wanted, seconds=action.seconds)
        except (ExchangeError, ProtocolError) as error:
            self._tell(f"step {action.step}: some of our weights are wrong and could not be fetched again: {error}")
            self._answers.weights_repaired(action.step, None)
            return
        # Their digests are over type and shape as well, so they are those of our tensors.
        self._trainer.load(fetched.tensors)
        self._trainer.lay_down(action.step)
        self._hasher.replace(action.step, fetched.digests)
        for liar in fetched.liars:
            self._tell(f"peer {liar.hex()[:10]} gave other weights than it had reported")
        changed = list(fetched.tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in fetched.tensors.values())
        self._tell(
            f"step {action.step}: of {len(names)} tensors, {len(changed)} differed from those of the others "
            f"({some_names(changed)}) and came again from them, {size} bytes; training goes on. If this "
            "happens again, test the memory of this machine"
        )
        self._answers.weights_repaired(action.step, fetched.digests)

    def stop(self) -> None:
        """Gives nothing any more."""
        self._sharing.offer_live(None)
