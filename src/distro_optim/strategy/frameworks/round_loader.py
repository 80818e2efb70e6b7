"""A training loader whose every batch is a round of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from .samples import Samples

__all__ = ["OpenRound", "RoundBatch", "RoundLoader", "RoundSource"]


class OpenRound(Protocol):
    """What a loader needs of a :class:`~.session.Round`."""

    @property
    def batch(self) -> Any:
        """The data indices; their number is its length."""

    @property
    def indices(self) -> Sequence[int]:
        """Samples of the dataset."""


class RoundSource(Protocol):
    """What a loader needs of a strategy."""

    def next_round(self) -> OpenRound | None:
        """Waits for the next round in which we train; None at the end of the run."""

    @property
    def rounds_per_epoch(self) -> int:
        """How many make up an epoch of the script."""

    @property
    def place_among_peers(self) -> tuple[int, int]:
        """Our index, and the number of peers."""

    @property
    def place_among_devices(self) -> tuple[int, int]:
        """This process's rank, and the number of processes of this peer."""


@dataclass(eq=False)
class RoundBatch:
    """A round whose share is more than one forward pass: several of the user's batches, with their weights.

    Not a sequence on purpose: frameworks go through those, and these batches are still to be loaded.

    Attributes:
        samples: ``(n,)`` int64, the samples assigned to this peer. Frameworks read the size of the batch off it.
    """

    samples: Tensor

    def __init__(self, samples: Tensor, weights: Sequence[float], batches: Callable[[], Iterator[Any]]) -> None:
        self.samples = samples
        self._weights = tuple(weights)
        self._batches = batches
        self._begun: tuple[Any, Iterator[Any]] | None = None

    def __len__(self) -> int:
        """Forward passes."""
        return len(self._weights)

    def micro_batches(self) -> Iterator[tuple[Any, float]]:
        """The batches, as the user's loader makes them, and what the mean loss of each counts in the round's."""
        begun, self._begun = self._begun, None
        batches = self._batches() if begun is None else chain(begun[:1], begun[1])
        for weight, batch in zip(self._weights, batches, strict=False):
            yield batch, weight

    def first(self) -> Any:
        """The first of the batches, before :meth:`micro_batches` gives it; none may be without one."""
        if self._begun is None:
            batches = self._batches()
            self._begun = next(batches), batches
        return self._begun[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Lightning's float64 and half precision copy batches to convert them; there is nothing to convert here yet.
        return self


class RoundLoader:
    """Gives a batch per round, and waits for the next round where another loader would wait for its workers.

    A batch is one of the user's own if the share of this peer fits in one, else a :class:`RoundBatch`. There is only
    one iterator, however often it is asked for: where it stands is the run's business.
    """

    def __init__(self, samples: Samples, source: RoundSource) -> None:
        self.samples = samples
        self._source = source

    def __len__(self) -> int:
        return self._source.rounds_per_epoch

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        opened = self._source.next_round()
        if opened is None:
            raise StopIteration
        samples = self.samples
        (peer, peers), (rank, devices) = self._source.place_among_peers, self._source.place_among_devices
        samples.split(peer * devices + rank, peers * devices)
        share = range(len(opened.batch)) if samples.size is None else opened.indices
        pieces = samples.plan(share, rank, devices)
        if len(pieces) == 1 and pieces[0].weight == 1.0:
            return next(samples.fetch(pieces))
        weights = [piece.weight for piece in pieces]
        return RoundBatch(torch.tensor(share), weights, lambda: samples.fetch(pieces))

    @property
    def worker_init_fn(self) -> Any:
        """As of a ``DataLoader``: Lightning sets it where workers are to be seeded."""
        return self.samples.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self.samples.worker_init_fn = function
