"""Where the batches of a round come from: the user's own ``DataLoader``, asked for the samples that the run assigns.

:func:`samples_of` looks at what the user has and picks a :class:`Samples`. A dataset with indices gives exactly what
was assigned; a stream can only give as much as was assigned.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, Final

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from typing_extensions import override

from ...errors import ConfigurationError
from ..sample_order import MicroBatch, micro_batches

__all__ = ["IndexedSamples", "Samples", "StreamedSamples", "length_of", "samples_of", "warn"]

_REPLACEABLE: Final = (RandomSampler, SequentialSampler, DistributedSampler)
"""Samplers that only say "all of it", in order or not: the run does the same, so nothing is lost without them."""


class Samples(ABC):
    """The training data of one device, by the share of a round."""

    size: int | None
    """Samples in all; None if nobody knows."""

    micro_batch_size: int
    """Samples of one forward pass: the user's ``batch_size``."""

    by_data_index: bool = False
    """The dataset knows its samples by the data indices of a run, as :class:`~distro_optim.TokenDataset` does: it has
    an attribute of this name that is true. In a run of Psyche's they are taken by those."""

    worker_init_fn: Any
    """Called in every worker process; Lightning sets it to seed them."""

    @abstractmethod
    def plan(self, share: Sequence[int], rank: int, world_size: int) -> list[MicroBatch]:
        """The forward passes that this device makes of ``share``, the samples assigned to the peer."""

    @abstractmethod
    def fetch(self, pieces: Sequence[MicroBatch]) -> Iterator[Any]:
        """The user's own batches, one per piece, loaded ahead by the user's workers. Ends what was fetched before."""

    def probe(self, index: int) -> Any:
        """The sample of this index, read in this process; None where samples have none."""
        return None

    @property
    def can_load(self) -> bool:
        """Whether :meth:`load` gives samples by their indices."""
        return False

    def load(self, indices: Sequence[int]) -> Any:
        """A batch of these samples, made in this process, beside what :meth:`fetch` is at.

        Raises:
            ConfigurationError: samples have no indices here.
        """
        raise ConfigurationError("samples of a stream cannot be asked for by their indices", name="loader")

    @abstractmethod
    def close(self) -> None:
        """Ends the workers; they start again when they are needed."""

    def split(self, index: int, count: int) -> None:  # noqa: B027 - most have nothing to do
        """Says which this is of how many devices that train, those of all peers together."""


def samples_of(loader: object, *, by_index: bool = True) -> Samples:
    """The samples behind a user's training loader.

    Args:
        loader: a ``DataLoader``, or any iterable of batches.
        by_index: False leaves the choice of samples to the loader's own sampler on every peer.

    Raises:
        ConfigurationError: a loader that cannot be asked for single samples, or has none.
    """
    if not isinstance(loader, DataLoader):
        if not isinstance(loader, Iterable):
            raise ConfigurationError(f"{loader!r} is not a DataLoader, and not iterable either", name="loader")
        warn("the training loader is not a DataLoader, so every peer goes through all of it, in its own order")
        return StreamedSamples(loader, None)
    if isinstance(loader.dataset, IterableDataset):
        warn(
            f"{type(loader.dataset).__name__} is an IterableDataset, so samples cannot be assigned by index: peers "
            "take turns by counting, and when peers come or go a sample may be trained twice or not at all. A dataset "
            "with __getitem__ and __len__ trains each sample once per pass"
        )
        peers = torch.tensor([0, 1]).share_memory_()
        return StreamedSamples(_rebuilt(loader, dataset=_EveryNth(loader.dataset, peers)), peers)
    if not by_index:
        return StreamedSamples(loader, None)
    return IndexedSamples(loader)


def length_of(dataset: object) -> int:
    """Of a map-style dataset; raises ConfigurationError if it does not say."""
    if not isinstance(dataset, Sized):
        raise ConfigurationError(
            f"{type(dataset).__name__} has no length, but samples are assigned by index: give it a __len__",
            name="dataset",
            value=dataset,
        )
    return len(dataset)


class IndexedSamples(Samples):
    """A map-style dataset: gives just the samples that were assigned.

    Which they are is known only when a round begins, so workers load ahead within a round, and stay alive between
    rounds.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.size = length_of(loader.dataset)
        self.by_data_index = getattr(loader.dataset, "by_data_index", False) is True
        self.micro_batch_size = _batch_size(loader)
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)  # Lightning's wrapper for other samplers
        if not isinstance(sampler if wrapped is None else wrapped, _REPLACEABLE):
            name = type(sampler if wrapped is None else wrapped).__name__
            warn(
                f"{name} is not used: the run assigns the samples, each once per pass, in an order of its own. If the "
                "sampler matters more than that, pass Trainer(use_distributed_sampler=False): every peer samples by "
                "itself then"
            )
        self._sampler = _Assigned()
        if loader.batch_size is None and loader.batch_sampler is None:
            # We make no batches here: a sample of the dataset is a batch already.
            self._loader = _rebuilt(loader, sampler=self._sampler)
        else:
            self._loader = _rebuilt(loader, batch_sampler=self._sampler)

    @property  # type: ignore[explicit-override]  # mypy does not see @override on a property with a setter
    @override
    def worker_init_fn(self) -> Any:
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self._loader.worker_init_fn = function

    @override
    def plan(self, share: Sequence[int], rank: int, world_size: int) -> list[MicroBatch]:
        return micro_batches(share, self.micro_batch_size, rank=rank, world_size=world_size)

    @override
    def fetch(self, pieces: Sequence[MicroBatch]) -> Iterator[Any]:
        if self._loader.batch_sampler is None:
            self._sampler.assigned = [sample for piece in pieces for sample in piece.samples]
        else:
            self._sampler.assigned = [list(piece.samples) for piece in pieces]
        return iter(self._loader)

    @override
    def probe(self, index: int) -> Any:
        dataset = self._loader.dataset
        several = getattr(dataset, "__getitems__", None)  # by which PyTorch's loader asks where it can
        return several([index])[0] if several is not None else dataset[index]

    @property
    @override
    def can_load(self) -> bool:
        # Where a sample is a batch already, several of them are several batches.
        return self._loader.batch_sampler is not None

    @override
    def load(self, indices: Sequence[int]) -> Any:
        dataset = self._loader.dataset
        several = getattr(dataset, "__getitems__", None)
        samples = several(list(indices)) if several is not None else [dataset[index] for index in indices]
        return self._loader.collate_fn(samples)

    @override
    def close(self) -> None:
        self._loader._iterator = None


class StreamedSamples(Samples):
    """Batches that come one after the other, again and again: a round takes as many as its share is long."""

    def __init__(self, loader: Iterable[Any], peers: torch.Tensor | None) -> None:
        """``peers``: our index and the number of peers, seen by the workers; None if the stream is not split."""
        self._loader = loader
        self._peers = peers
        self._stream: Iterator[Any] | None = None
        self.micro_batch_size = _batch_size(loader) if isinstance(loader, DataLoader) else 1
        self.size = _stream_size(loader, self.micro_batch_size)

    @property  # type: ignore[explicit-override]  # mypy does not see @override on a property with a setter
    @override
    def worker_init_fn(self) -> Any:
        return getattr(self._loader, "worker_init_fn", None)

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        if isinstance(self._loader, DataLoader):
            self._loader.worker_init_fn = function

    @override
    def plan(self, share: Sequence[int], rank: int, world_size: int) -> list[MicroBatch]:
        count = max(1, -(-len(share) // (self.micro_batch_size * world_size)))
        return [MicroBatch((), 1 / count)] * count

    @override
    def fetch(self, pieces: Sequence[MicroBatch]) -> Iterator[Any]:
        for _ in pieces:
            yield self._next()

    @override
    def close(self) -> None:
        self._stream = None

    @override
    def split(self, index: int, count: int) -> None:
        if self._peers is not None:
            self._peers[0], self._peers[1] = index, count

    def _next(self) -> Any:
        if self._stream is not None:
            for batch in self._stream:
                return batch
        self._stream = iter(self._loader)
        for batch in self._stream:
            return batch
        raise ConfigurationError(
            "the training loader gives no batches: a dataset must have at least one", name="loader"
        )


class _Assigned:
    """A sampler that gives what was assigned last: indices, or lists of them. Shaped as torch's own are."""

    def __init__(self) -> None:
        self.assigned: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.assigned)

    def __len__(self) -> int:
        return len(self.assigned)


class _EveryNth(IterableDataset[Any]):
    """Every n-th sample of a stream: peers that count alike share it between them."""

    def __init__(self, dataset: IterableDataset[Any], peers: torch.Tensor) -> None:
        self.dataset = dataset
        self.peers = peers  # in shared memory, so that workers see who has come and gone

    @override
    def __iter__(self) -> Iterator[Any]:
        for number, sample in enumerate(self.dataset):
            index, count = self.peers.tolist()
            if number % count == index:
                yield sample


def _batch_size(loader: DataLoader[Any]) -> int:
    size = loader.batch_size
    if size is None:
        if loader.batch_sampler is None:
            return 1
        size = getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int) or size < 1:
        raise ConfigurationError(
            f"{type(loader.batch_sampler).__name__} does not say its batch_size, but a round is cut in batches of a "
            "size: use DataLoader(batch_size=...)",
            name="batch_sampler",
        )
    return size


def _stream_size(loader: Iterable[Any], batch_size: int) -> int | None:
    try:
        return len(loader) * batch_size if isinstance(loader, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def _rebuilt(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """The same loader, with workers that stay."""
    keep = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "persistent_workers": loader.num_workers > 0,
    }
    if loader.num_workers > 0:
        keep["prefetch_factor"] = loader.prefetch_factor
    if "batch_sampler" not in changes:
        keep["batch_size"] = loader.batch_size
        if loader.batch_size is not None:
            keep["drop_last"] = loader.drop_last
    return DataLoader(**{**keep, **changes})


def warn(message: str) -> None:
    """Warns that something in the script is not as a run needs it, in one sentence without its full stop."""
    warnings.warn(f"distro_optim: {message}.", UserWarning, stacklevel=3)
