"""Which samples of a dataset the coordinator's data indices mean, and in which pieces a peer trains them.

A coordinator hands out indices that only grow; it knows nothing of datasets. Here index ``i`` means a place in pass
``i // dataset_size`` over the dataset, and every pass goes through the samples in an order of its own. The order
follows from the seed alone, so that peers that never exchange data agree on it, and since a coordinator gives each
index to one peer, each sample is trained once per pass, whichever peers come and go.

In a run of Psyche's there is another reading, that of its clients and of ``distro-optim join``: index ``i`` is sequence
``i`` of the run's data. A dataset that knows no other index says so; see :attr:`SampleOrder.seed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import blake3
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError

__all__ = [
    "HOW_TO_TAKE_BY_DATA_INDEX",
    "MicroBatch",
    "SampleOrder",
    "check_dataset_size",
    "micro_batches",
    "sample_indices",
    "shuffle_seed",
]

# splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): the increment, and the
# multipliers and shifts of the finalizer.
_GOLDEN_GAMMA: Final = 0x9E3779B97F4A7C15
_MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS: Final = (30, 27, 31)
_U64: Final = 2**64 - 1

_FEISTEL_ROUNDS: Final = 8
"""Luby and Rackoff (1988) need four rounds for a permutation that nobody tells from a random one; tiny domains are
mixed badly by so few, and more cost next to nothing."""

MAX_DATASET_SIZE: Final = 2**48
"""Samples; beyond it an index times a few bits no longer fits the arithmetic. Chosen far above any real dataset."""


def shuffle_seed(run_id: str) -> int:
    """The seed that all peers of a run shuffle with, 64 bits: they have its name in common and need nothing else."""
    return int.from_bytes(blake3.blake3(run_id.encode()).digest(8), "little")


def check_dataset_size(dataset_size: int | None, batch_size: int) -> None:
    """Raises ConfigurationError if a round of so many samples would have some of them twice.

    Args:
        dataset_size: samples; None if nobody knows.
        batch_size: samples of a round, all peers together.
    """
    if dataset_size is not None and batch_size > dataset_size:
        raise ConfigurationError(
            f"global_batch_size is {batch_size}, but the dataset has only {dataset_size} samples, so a round would "
            "train some of them twice: give the dataset that the run is for, or host with a smaller global_batch_size",
            name="global_batch_size",
            value=batch_size,
        )


def sample_indices(data_indices: range, dataset_size: int, seed: int) -> list[int]:
    """The samples that ``data_indices`` of the coordinator stand for.

    Every ``dataset_size`` indices, from 0 on, are a pass: each sample once, in an order that depends on ``seed`` and
    the number of the pass. Neither order nor seed depend on a version of torch or numpy.

    Args:
        data_indices: of the coordinator, with step 1; ``range(batch.start, batch.end + 1)`` for a ``BatchId``.
        dataset_size: samples.
        seed: see :func:`shuffle_seed`.

    Raises:
        ConfigurationError: the dataset is empty, or absurdly large.
    """
    if not 1 <= dataset_size <= MAX_DATASET_SIZE:
        raise ConfigurationError(
            f"a dataset of {dataset_size} samples: there must be at least one, and at most {MAX_DATASET_SIZE}",
            name="dataset_size",
            value=dataset_size,
        )
    samples: list[int] = []
    start = data_indices.start
    while start < data_indices.stop:
        number, place = divmod(start, dataset_size)
        count = min(data_indices.stop - start, dataset_size - place)
        places = np.arange(place, place + count, dtype=np.uint64)
        samples += _permuted(places, dataset_size, _mixed(seed + _GOLDEN_GAMMA * number)).tolist()
        start += count
    return samples


HOW_TO_TAKE_BY_DATA_INDEX: Final = (
    "beside distro-optim join and Psyche's clients give the strategy a TokenDataModule of the run's data or another "
    "dataset with by_data_index = True, and a session no dataset_size, with round.batch in place of round.indices"
)
"""What a script has to do whose samples are to be those of Psyche's clients."""


@dataclass(frozen=True)
class SampleOrder:
    """Which samples of a dataset the data indices of a run stand for.

    Attributes:
        size: samples in the dataset.
        seed: of their order; None where a sample's index is the data index.
    """

    size: int
    seed: int | None

    def samples(self, data_indices: range) -> list[int]:
        """Indices into the dataset, one for each of ``data_indices``."""
        return list(data_indices) if self.seed is None else sample_indices(data_indices, self.size, self.seed)

    @property
    def in_common(self) -> dict[str, int]:
        """What peers must agree on; nothing where the run says it all."""
        return {} if self.seed is None else {"size": self.size, "seed": self.seed}


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes of a round.

    Attributes:
        samples: their indices in the dataset; never empty.
        weight: what the mean loss of these samples counts in the mean over the peer's whole share of the round. 0 if
            the samples are only there so that this device has as many forward passes as the others.
    """

    samples: tuple[int, ...]
    weight: float


def micro_batches(samples: Sequence[int], size: int, *, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """Cuts a peer's share of a round into pieces of at most ``size`` samples, for each of its devices.

    All devices get equally many, since they average gradients together after each or after the last. With their
    weights, the mean over devices of the sum over pieces is the mean over ``samples``.

    Args:
        samples: the share, not empty.
        size: samples of a piece.
        rank, world_size: this device and the number of devices of this peer.
    """
    pieces = max(1, -(-len(samples) // (size * world_size)))
    mine = samples[rank::world_size]
    cut = [tuple(mine[n * size : (n + 1) * size]) for n in range(pieces)]
    total = len(samples)
    return [
        MicroBatch(piece, len(piece) * world_size / total) if piece else MicroBatch((samples[0],), 0.0) for piece in cut
    ]


def _permuted(places: NDArray[np.uint64], size: int, key: int) -> NDArray[np.uint64]:
    """Where a permutation of ``range(size)`` sends ``places``: a Feistel network on the next power of four.

    What falls beyond ``size`` goes through the network again until it falls within (Black and Rogaway, 2002: cycle
    walking), which it must, since a permutation leads back to where it began.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = [np.uint64(_mixed(key + _GOLDEN_GAMMA * number)) for number in range(1, _FEISTEL_ROUNDS + 1)]
    result = _feistel(places, half, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result


def _feistel(values: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_finalized(right ^ key) & mask)
    return (left << bits) | right


def _mixed(value: int) -> int:
    return int(_finalized(np.array([value & _U64], dtype=np.uint64))[0])


def _finalized(values: NDArray[Any]) -> NDArray[np.uint64]:
    """splitmix64's finalizer, modulo 2**64 (arrays wrap around without a warning)."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(multiplier)
    result: NDArray[np.uint64] = values ^ (values >> np.uint64(_SHIFTS[2]))
    return result
