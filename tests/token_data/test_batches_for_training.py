"""Token sequences as batches: what a data loader and a Lightning trainer get."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from distro_optim.coordinator.model import TokenSize
from distro_optim.coordinator.types import BatchId
from distro_optim.data.dataset import TokenDataset, collate_tokens
from distro_optim.data.dummy import DummyTokens
from distro_optim.data.provider import TokenProvider, TokenSequence
from distro_optim.data.token_files import TokenFiles
from distro_optim.errors import ConfigurationError, InvalidDataError

pytestmark = pytest.mark.waiting


SEQ_LEN = 8


def ids(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


class Counting(TokenProvider):
    """Sequence ``n`` has the tokens n, n, ...; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(2)
        self.asked: list[str] = []

    @property
    @override
    def num_sequences(self) -> int:
        return 100

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        self.asked.append(str(batch))
        return [TokenSequence(ids(index, index)) for index in range(batch.start, batch.end + 1)]


def test_a_batch_has_tokens_and_labels() -> None:
    batch = collate_tokens([TokenSequence(ids(1, 2, 3)), TokenSequence(ids(4, 5, 6))])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 5, 6]],
        "labels": [[1, 2, 3], [4, 5, 6]],
    }
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_packed_texts_keep_their_positions_labels_and_lengths() -> None:
    packed = TokenSequence(ids(1, 2, 3), ids(-100, 2, 3), ids(0, 0, 1), ids(1, 2))
    single = TokenSequence(ids(4, 5, 6), ids(4, 5, -100), ids(0, 1, 2), ids(3))
    batch = collate_tokens([packed, single])
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, 5, -100]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    assert batch["sequence_lengths"].tolist() == [[1, 2], [3, 0]]


def test_what_not_every_sequence_has_is_left_out() -> None:
    packed = TokenSequence(ids(1, 2, 3), ids(-100, 2, 3), ids(0, 0, 1), ids(1, 2))
    batch = collate_tokens([packed, TokenSequence(ids(4, 5, 6))])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_loader_asks_for_a_batch_at_once() -> None:
    provider = Counting()
    loader = DataLoader(TokenDataset(provider), batch_size=4, collate_fn=collate_tokens)
    batch = next(iter(loader))
    assert batch["input_ids"][:, 0].tolist() == [0, 1, 2, 3]
    assert provider.asked == ["B[0, 3]"]


def test_scattered_indices_come_in_the_order_they_were_asked_for() -> None:
    provider = Counting()
    samples = TokenDataset(provider).__getitems__([7, 8, 9, 3, 50, 51])
    assert [int(sample.input_ids[0]) for sample in samples] == [7, 8, 9, 3, 50, 51]
    assert provider.asked == ["B[7, 9]", "B3", "B[50, 51]"]


def test_a_data_set_is_as_long_as_its_data() -> None:
    assert len(TokenDataset(Counting())) == 100
    assert len(TokenDataset(DummyTokens(4))) == 2**31
    assert len(TokenDataset(DummyTokens(4), 10)) == 10
    with pytest.raises(IndexError):
        TokenDataset(DummyTokens(4), 10)[10]
    with pytest.raises(ConfigurationError, match="num_sequences"):
        TokenDataset(DummyTokens(4), 0)


def write_tokens(path: Path, count: int) -> None:
    path.write_bytes((np.arange(count) % 16).astype("<u2").tobytes())


def trainer_and_model() -> tuple[object, object]:
    lightning = pytest.importorskip("lightning.pytorch")

    class Bigrams(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, 16)
            self.seen: list[list[int]] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            self.seen += batch["input_ids"].tolist()
            scores = self.table(batch["input_ids"][:, :-1])
            return nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"][:, 1:].flatten())

        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            self.seen += batch["input_ids"].tolist()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    return trainer, Bigrams()


@pytest.mark.parametrize("with_validation", [False, True])
def test_a_trainer_sees_every_sequence_once(tmp_path: Path, with_validation: bool) -> None:
    from distro_optim.data.lightning import TokenDataModule

    write_tokens(tmp_path / "a.bin", 6 * SEQ_LEN + 3)
    opened: list[TokenFiles] = []

    def make() -> TokenFiles:
        opened.append(TokenFiles(tmp_path, TokenSize.TWO_BYTES, SEQ_LEN, vocab_size=16))
        return opened[-1]

    trainer, model = trainer_and_model()
    data = TokenDataModule(make, make if with_validation else None, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and loggers
        trainer.fit(model, data)  # type: ignore[attr-defined]
    files = TokenFiles(tmp_path, TokenSize.TWO_BYTES, SEQ_LEN)
    expected = [sample.input_ids.tolist() for sample in files.get_samples(BatchId(0, 5))]
    assert model.seen == expected * len(opened)  # type: ignore[attr-defined]
    assert len(opened) == 1 + with_validation
    assert all(provider._closed for provider in opened)


def test_data_that_cannot_be_trained_on_are_found_before_training(tmp_path: Path) -> None:
    from distro_optim.data.lightning import TokenDataModule

    write_tokens(tmp_path / "a.bin", 100)
    trainer, model = trainer_and_model()
    data = TokenDataModule(lambda: TokenFiles(tmp_path, TokenSize.TWO_BYTES, SEQ_LEN, vocab_size=7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InvalidDataError, match="beyond the vocabulary of 7"):
            trainer.fit(model, data)  # type: ignore[attr-defined]
    assert model.seen == []  # type: ignore[attr-defined]


def test_a_batch_without_a_sequence_is_refused() -> None:
    from distro_optim.data.lightning import TokenDataModule

    with pytest.raises(ConfigurationError, match="batch_size must be at least 1, got 0"):
        TokenDataModule(DummyTokens, batch_size=0)
