"""Rounds of a language model: data in, gradients, and on to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import torch
from torch import Tensor

from ..console import narrated
from ..coordinator.types import BatchId
from ..data.provider import TokenProvider
from ..errors import DataUnavailableError
from ..models.batches import TokenBatch, collate
from ..models.causal_lm import CausalLM
from ..strategy.monitor.figures import Progress
from ..strategy.round import Round
from ..strategy.session import SwarmSession

__all__ = ["audit_loss", "read_round", "train_language_model"]

MAX_FAILURES: Final = 3
"""Rounds in a row without data until we leave: others train the batches of who is not there. Chosen arbitrarily."""


class Trainers(Protocol):
    """What computes gradients."""

    def train(self, batch: TokenBatch, cancelled: Callable[[], bool]) -> float | None:
        """As :meth:`.LocalTrainers.train`."""


def train_language_model(
    session: SwarmSession,
    trainers: Trainers,
    read: Callable[[Round], TokenBatch],
    progress: Progress,
    *,
    tell: Callable[[str], None],
    begins: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains to the end of the run.

    Args:
        session: in the run.
        trainers: compute.
        read: gives the samples of a round; see :func:`read_round`.
        progress: told how it goes.
        tell: told the news.
        begins: called with the step of each round, when the model is ready for it.

    Raises:
        DataError: the data are wrong, or could not be had in several rounds in a row.
        RunError: the run cannot go on with us.
    """
    failures = 0
    for round_ in session.rounds():
        begins(round_.step)
        progress.begins(round_.step, round_.batch)
        try:
            with narrated(f"step {round_.step}: reading {round_.batch}", tell):
                batch = read(round_)
        except DataUnavailableError as error:
            failures += 1
            tell(f"step {round_.step}: {round_.batch} could not be read: {error}")
            round_.skip()
            progress.ends(None)
            if failures >= MAX_FAILURES:
                raise
            continue
        failures = 0
        loss = trainers.train(batch, lambda current=round_: current.cancelled)  # type: ignore[misc]
        if loss is None:
            round_.skip()  # which notices that the round is over
        else:
            round_.finish(loss)
        progress.ends(loss)


def audit_loss(model: CausalLM, data: TokenProvider, device: torch.device) -> Callable[[list[int]], Tensor]:
    """The mean loss of sequences of the run, for audits: given their data indices, which follow each other."""

    def loss(indices: list[int]) -> Tensor:
        with torch.no_grad():
            batch = collate(data.get_samples(BatchId(indices[0], indices[-1]))).to(device)
        mean: Tensor = model(batch).loss
        return mean

    return loss


@torch.no_grad()
def read_round(round_: Round, data: TokenProvider) -> TokenBatch:
    """The samples of a round, of the run's data.

    Raises:
        DataError: they cannot be read.
    """
    return collate(data.get_samples(round_.batch))
