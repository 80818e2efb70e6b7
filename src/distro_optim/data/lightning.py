"""Token sequences for a Lightning ``Trainer``.

Imports Lightning; nothing else in this room does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from ..errors import ConfigurationError
from .dataset import TokenDataset, collate_tokens
from .provider import TokenProvider, TokenSequence

__all__ = ["TokenDataModule"]

ProviderMaker = Callable[[], TokenProvider]


class TokenDataModule(LightningDataModule):
    """Training data, and validation data if there are any, from token providers.

    >>> data = TokenDataModule(lambda: TokenFiles("tokens.bin", TokenSize.TWO_BYTES, 2048), batch_size=8)
    >>> Trainer().fit(model, data)

    Batches are those of :func:`~.dataset.collate_tokens`, in the order of the data: what shuffles is the provider, so
    that every peer has the same order.

    Args:
        train: opens the training data. Called once in each process, before the first batch; the first and the last
            sequence are looked at then, so that data that cannot be trained on are found before training.
        val: opens the validation data.
        batch_size: sequences of a batch.
        num_sequences: training sequences of one epoch, for data that know no end.
    """

    def __init__(
        self,
        train: ProviderMaker,
        val: ProviderMaker | None = None,
        *,
        batch_size: int = 1,
        num_sequences: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigurationError(
                f"batch_size must be at least 1, got {batch_size}", name="batch_size", value=batch_size
            )
        self.batch_size = batch_size
        self.num_sequences = num_sequences
        self._makers: dict[str, ProviderMaker] = {"train": train}
        if val is None:
            # Lightning asks for validation data wherever the method is there.
            self.val_dataloader = None  # type: ignore[assignment,method-assign]
        else:
            self._makers["val"] = val
        self._open: dict[str, TokenProvider] = {}

    @override
    def setup(self, stage: str = "fit") -> None:
        """
        Raises:
            DataError: the data cannot be fetched, or cannot be trained on.
        """
        for name in self._makers:
            self._provider(name)

    @override
    def teardown(self, stage: str = "fit") -> None:
        opened, self._open = self._open, {}
        for provider in opened.values():
            provider.close()

    @override
    def train_dataloader(self) -> DataLoader[TokenSequence]:
        return self._loader(TokenDataset(self._provider("train"), self.num_sequences))

    @override
    def val_dataloader(self) -> DataLoader[TokenSequence]:
        return self._loader(TokenDataset(self._provider("val")))

    def _provider(self, name: str) -> TokenProvider:
        if name not in self._open:
            provider = self._makers[name]()
            try:
                provider.probe()
            except BaseException:
                provider.close()
                raise
            self._open[name] = provider
        return self._open[name]

    def _loader(self, dataset: TokenDataset) -> DataLoader[Any]:
        # No worker processes: providers read in threads of their own, and are not to be shared between processes.
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=collate_tokens, num_workers=0)
