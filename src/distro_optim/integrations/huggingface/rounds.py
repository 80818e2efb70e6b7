"""A round of a run as the loop of ``transformers.Trainer`` takes it: one of its batches, in epochs of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...strategy.frameworks.round_loader import RoundBatch, RoundLoader, RoundSource
from ...strategy.frameworks.samples import Samples
from ...strategy.round import Round

__all__ = ["EpochsOfRounds", "RoundInputs", "TrainerRounds"]


class RoundInputs(dict[str, Any]):
    """The batches of a round, which the trainer counts as one.

    As a mapping it has the model's main input of all of them together, flat: trainers count tokens by it.

    Attributes:
        pieces: the user's own batches, each with what its mean loss counts in that of the round.
    """

    def __init__(self, pieces: Sequence[tuple[Any, float]], main_input: str) -> None:
        self.pieces = list(pieces)
        values = [batch.get(main_input) if isinstance(batch, Mapping) else None for batch, _ in self.pieces]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors and len(tensors) == len(values):
            super().__init__({main_input: _flat(tensors)})
        else:
            super().__init__()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All values in one row; of images and sounds only how many they are, since a copy would be large."""
    if tensors[0].is_floating_point():
        return torch.zeros((), dtype=tensors[0].dtype).expand(sum(tensor.numel() for tensor in tensors))
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class TrainerRounds(RoundSource, Protocol):
    """What the loader needs of a trainer."""

    def wait_for_round(self) -> Round | None:
        """The next round in which we train, which :meth:`next_round` will give; None at the end of the run."""

    @property
    def main_input(self) -> str:
        """Name of the model's main input, such as ``"input_ids"``."""


class EpochsOfRounds:
    """In the place of a training loader: each iterator gives the rounds of one epoch of the run, or what is left of it.

    An epoch of the trainer's is one pass of all peers together over the dataset, so a peer that joins late or has
    missed rounds goes through fewer of them.

    Attributes:
        dataset: of the loader; trainers ask for its length.
    """

    def __init__(self, samples: Samples, source: TrainerRounds, dataset: object) -> None:
        self.samples = samples
        self.dataset = dataset
        self._source = source
        self._rounds = RoundLoader(samples, source)

    def __len__(self) -> int:
        return len(self._rounds)

    def __iter__(self) -> Iterator[RoundInputs]:
        epoch = None
        while (round_ := self._source.wait_for_round()) is not None:
            number, place = divmod(round_.step - 1, len(self))
            if epoch is not None and number != epoch:
                return  # the round is the first that we train of a later epoch, and waits for its iterator
            epoch = number
            batch = next(self._rounds)
            pieces = list(batch.micro_batches()) if isinstance(batch, RoundBatch) else [(batch, 1.0)]
            yield RoundInputs(pieces, self._source.main_input)
            if place == len(self) - 1:
                return
