"""Whatever loads the script's data loads the assigned samples: workers, collate functions, streams."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset, WeightedRandomSampler
from typing_extensions import override

from distro_optim.coordinator.types import BatchId
from distro_optim.data.dataset import TokenDataset
from distro_optim.data.dummy import DummyTokens
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.frameworks.round_loader import RoundBatch, RoundLoader
from distro_optim.strategy.frameworks.samples import samples_of
from distro_optim.strategy.sample_order import sample_indices
from frameworks.lightning_runs import Numbered

pytestmark = pytest.mark.waiting


@dataclass
class Given:
    """A round."""

    batch: BatchId
    size: int

    @property
    def indices(self) -> list[int]:
        return sample_indices(range(self.batch.start, self.batch.end + 1), self.size, 5)


@dataclass
class Peer:
    """Where rounds come from: ``share`` samples each, a peer's own of ``peers``."""

    share: int
    size: int = 20
    index: int = 0
    peers: int = 1
    device: tuple[int, int] = (0, 1)
    rounds: int = 10
    rounds_per_epoch: int = 3
    given: list[Given] = field(default_factory=list)

    @property
    def place_among_peers(self) -> tuple[int, int]:
        return self.index, self.peers

    @property
    def place_among_devices(self) -> tuple[int, int]:
        return self.device

    def next_round(self) -> Given | None:
        number = len(self.given)
        if number == self.rounds:
            return None
        start = (number * self.peers + self.index) * self.share
        self.given.append(Given(BatchId(start, start + self.share - 1), self.size))
        return self.given[-1]


def indices(batch: Any) -> list[int]:
    numbers: Tensor = batch[0]
    return numbers.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_round_gives_the_samples_that_were_assigned(workers: int) -> None:
    peer = Peer(share=7, rounds=6)
    context = "fork" if workers else None
    loader = DataLoader(Numbered(20), batch_size=3, shuffle=True, num_workers=workers, multiprocessing_context=context)
    rounds = RoundLoader(samples_of(loader), peer)
    assert len(rounds) == 3
    for batch in rounds:
        assert isinstance(batch, RoundBatch)
        assert batch.samples.tolist() == peer.given[-1].indices
        pieces = list(batch.micro_batches())
        assert [len(indices(piece)) for piece, _ in pieces] == [3, 3, 1]
        assert [sample for piece, _ in pieces for sample in indices(piece)] == peer.given[-1].indices
        assert sum(weight for _, weight in pieces) == pytest.approx(1)
    assert len(peer.given) == 6
    rounds.samples.close()


def test_a_share_that_fits_is_the_scripts_own_batch() -> None:
    rounds = RoundLoader(samples_of(DataLoader(Numbered(20), batch_size=8)), peer := Peer(share=7))
    batch = next(rounds)
    assert type(batch) is list
    assert indices(batch) == peer.given[0].indices


def test_a_round_that_is_given_up_does_not_disturb_the_next() -> None:
    rounds = RoundLoader(samples_of(DataLoader(Numbered(20), batch_size=2)), peer := Peer(share=6))
    next(next(rounds).micro_batches())
    pieces = [indices(piece) for piece, _ in next(rounds).micro_batches()]
    assert sum(pieces, []) == peer.given[1].indices  # noqa: RUF017


def test_the_collate_function_is_kept_and_so_are_datasets_of_batches() -> None:
    loader = DataLoader(Numbered(20), batch_size=4, collate_fn=lambda samples: [number for number, _, _ in samples])
    assert next(RoundLoader(samples_of(loader), peer := Peer(share=4))) == peer.given[0].indices
    unbatched = DataLoader(Numbered(20), batch_size=None)
    rounds = next(RoundLoader(samples_of(unbatched), peer := Peer(share=3)))
    assert [piece[0] for piece, _ in rounds.micro_batches()] == peer.given[0].indices


def test_devices_share_a_round_between_them() -> None:
    seen = []
    for rank in range(3):
        peer = Peer(share=7, device=(rank, 3))
        batch = next(RoundLoader(samples_of(DataLoader(Numbered(20), batch_size=2)), peer))
        pieces = list(batch.micro_batches())
        assert len(pieces) == 2
        seen += [sample for piece, weight in pieces if weight for sample in indices(piece)]
    assert sorted(seen) == sorted(peer.given[0].indices)


def test_a_sampler_with_a_mind_of_its_own_is_named() -> None:
    sampler = WeightedRandomSampler([1.0] * 20, 20)
    with pytest.warns(UserWarning, match="WeightedRandomSampler is not used: the run assigns the samples"):
        samples_of(DataLoader(Numbered(20), batch_size=4, sampler=sampler))
    batches = BatchSampler(sampler, 4, drop_last=True)
    with pytest.warns(UserWarning, match="WeightedRandomSampler"):
        assert samples_of(DataLoader(Numbered(20), batch_sampler=batches)).micro_batch_size == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = samples_of(DataLoader(Numbered(20), batch_size=4, sampler=sampler), by_index=False)
        samples_of(DataLoader(Numbered(20), batch_sampler=BatchSampler(SequentialSampler(range(20)), 4, True)))
    batch = next(RoundLoader(kept, Peer(share=8)))
    assert [len(indices(piece)) for piece, _ in batch.micro_batches()] == [4, 4]


class Stream(IterableDataset[Any]):
    @override
    def __iter__(self) -> Iterator[Any]:
        return iter(Numbered(24))


def test_peers_share_a_stream_by_counting() -> None:
    seen = []
    for index in range(3):
        with pytest.warns(UserWarning, match="may be trained twice or not at all"):
            samples = samples_of(DataLoader(Stream(), batch_size=4))
        assert samples.size is None
        rounds = RoundLoader(samples, Peer(share=4, index=index, peers=3, rounds=2))
        seen += [sample for batch in rounds for sample in indices(batch)]
    assert sorted(seen) == list(range(24))


def test_a_stream_begins_again_and_weighs_its_batches_alike() -> None:
    with pytest.warns(UserWarning, match="not a DataLoader"):
        rounds = RoundLoader(samples_of([torch.tensor([1]), torch.tensor([2])]), Peer(share=3, rounds=2))
    pieces = [[(int(piece), weight) for piece, weight in batch.micro_batches()] for batch in rounds]
    third = pytest.approx(1 / 3)
    assert pieces == [[(1, third), (2, third), (1, third)], [(2, third), (1, third), (2, third)]]


def test_what_gives_no_samples_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a DataLoader, and not iterable"):
        samples_of(5)
    with pytest.warns(UserWarning, match="not a DataLoader"):
        rounds = RoundLoader(samples_of([]), Peer(share=1))
    with pytest.raises(ConfigurationError, match="gives no batches"):
        next(rounds)

    class Batches:
        def __iter__(self) -> Iterator[list[int]]:
            yield [0]

    with pytest.raises(ConfigurationError, match="does not say its batch_size"):
        samples_of(DataLoader(Numbered(20), batch_sampler=Batches()))


class ByNumber(Numbered):
    by_data_index = True


def test_a_dataset_says_whether_its_indices_are_those_of_the_run() -> None:
    tokens = TokenDataset(DummyTokens())
    assert samples_of(DataLoader(tokens)).by_data_index
    assert samples_of(DataLoader(ByNumber())).by_data_index
    assert not samples_of(DataLoader(Numbered())).by_data_index
    assert not samples_of(DataLoader(Subset(tokens, [5, 6, 7]))).by_data_index  # whose indices are others
