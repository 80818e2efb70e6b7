"""Data that end while a run goes on end our part in it; data that fail now and then do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from typing_extensions import override

from client.processes import TINY_LLAMA
from distro_optim.client.devices import LocalTrainers
from distro_optim.client.training import MAX_FAILURES, read_round, train_language_model
from distro_optim.coordinator.types import BatchId
from distro_optim.data.provider import TokenProvider, TokenSequence
from distro_optim.errors import DataUnavailableError, OutOfDataError
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.monitor.figures import Progress

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


SEQ_LEN = 8


class Rounds:
    """A session of so many rounds of one sequence each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.done: list[str] = []

    def rounds(self) -> Any:
        for number in range(self.count):
            self.step, self.batch, self.cancelled = number + 1, BatchId(number, number), False
            yield self

    def skip(self) -> None:
        self.done.append("skipped")

    def finish(self, loss: float) -> None:
        self.done.append("finished")


class Tokens(TokenProvider):
    """Fails where it is told to, and ends after ``count`` sequences."""

    def __init__(self, count: int, fails: Callable[[int], bool] = lambda index: False) -> None:
        super().__init__(SEQ_LEN)
        self._count = count
        self._fails = fails

    @property
    @override
    def num_sequences(self) -> int:
        return self._count

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        if self._fails(batch.start):
            raise DataUnavailableError("nobody answers")
        return [TokenSequence(np.zeros(SEQ_LEN, np.int32)) for _ in range(len(batch))]


def train(rounds: Rounds, tokens: Tokens) -> list[str]:
    news: list[str] = []
    model = CausalLM({**TINY_LLAMA, "vocab_size": 16, "num_hidden_layers": 1}, "HfLlama")
    trainers = LocalTrainers(model, [torch.device("cpu")], micro_batch_size=1)
    train_language_model(
        rounds,  # type: ignore[arg-type]
        trainers,
        lambda round_: read_round(round_, tokens),
        Progress(bytes(32)),
        tell=news.append,
    )
    return news


def test_data_that_end_in_the_midst_of_a_run_are_told() -> None:
    rounds = Rounds(5)
    with pytest.raises(OutOfDataError, match="B3 lies beyond the training data, which have 3 sequences"):
        train(rounds, Tokens(3))
    assert rounds.done == ["finished"] * 3


def test_a_round_without_data_is_skipped_and_told() -> None:
    rounds = Rounds(6)
    news = train(rounds, Tokens(6, lambda index: index in (1, 2, 4)))
    assert rounds.done == ["finished", "skipped", "skipped", "finished", "skipped", "finished"]
    assert news[0] == "step 2: B1 could not be read: nobody answers"


def test_several_rounds_without_data_in_a_row_end_our_part() -> None:
    rounds = Rounds(9)
    with pytest.raises(DataUnavailableError):
        train(rounds, Tokens(9, lambda index: index >= 2))
    assert rounds.done == ["finished"] * 2 + ["skipped"] * MAX_FAILURES
