"""What a run trains and on what: its model and its data, made here, or refused in one sentence before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from ..comm.signing import SecretKey
from ..coordinator.model import DummyCheckpoint, DummyData, DummyOptimizer
from ..coordinator.schedule import learning_rate
from ..coordinator.types import Coordinator
from ..data.dummy import DummyTokens
from ..data.opening import open_token_data
from ..data.provider import TokenProvider
from ..errors import ModelWeightsError, RunError
from ..models.causal_lm import CausalLM
from ..models.locations import find_checkpoint
from ..models.optimization import distro_settings
from ..optimizer import DisTrO
from ..strategy.port import RunPort
from .first_model import FirstModel

__all__ = ["Prepared", "is_without_tensors", "prepare"]

# DisTrO wants a rate above 0; in a run the rates of its schedule count.
_ANY_RATE: Final = 1e-3


@dataclass
class Prepared:
    """All that training takes.

    Attributes:
        port: to give to the session; see :mod:`.first_model`.
    """

    model: CausalLM
    optimizer: DisTrO
    data: TokenProvider
    port: RunPort


def is_without_tensors(state: Coordinator) -> bool:
    """Whether it is one of Psyche's test runs, in which nothing is computed."""
    return isinstance(state.model.optimizer, DummyOptimizer)


def prepare(
    port: RunPort,
    state: Coordinator,
    *,
    key: SecretKey,
    device: torch.device,
    folder: Path | None,
    progress: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> Prepared:
    """Makes the run's model and opens its data.

    Args:
        port: started.
        state: of the run.
        folder: with the model, in place of what the run calls it; None takes the run's own name.
        progress: parameters downloaded, and in all.
        tell: told the news.

    Raises:
        ConfigurationError: the run has an optimizer, a model or data of a kind that is not supported.
        ModelWeightsError: the model is nowhere to be had.
        ModelTooLargeError: it does not fit in memory.
        DataError: the data cannot be had, or cannot be trained on.
        RunError: the run ended meanwhile.
    """
    run = state.model
    started = FirstModel(port)
    distro_settings(run.optimizer)  # refuses what cannot be optimized with, before anything is loaded
    model = None
    if folder is None and isinstance(run.checkpoint, DummyCheckpoint):
        raise RunError(
            "the run has no model (its checkpoint is Dummy) and yet an optimizer: name a folder with a model by --model"
        )
    try:
        where = folder if folder is not None else find_checkpoint(run.checkpoint)
        tell(f"the model comes from {where}")
        model = CausalLM.from_run(run, where, device=device)
    except ModelWeightsError:
        if folder is not None or not FirstModel.is_needed(run.checkpoint):
            raise
    if model is None:
        tell("the model comes from peers")
        model = CausalLM.from_run(run, started.download(progress), device=device)
    data = _open(state, key, model)
    try:
        data.probe()
        return Prepared(model, _optimizer(model, state), data, started)
    except BaseException:
        data.close()
        raise


def _open(state: Coordinator, key: SecretKey, model: CausalLM) -> TokenProvider:
    run = state.model
    if isinstance(run.data_location, DummyData):
        # As long as the model takes; Psyche's are always 2048 tokens, which many models do not.
        return DummyTokens(run.max_seq_len)
    return open_token_data(run.data_location, run.max_seq_len, vocab_size=model.config.vocab_size, key=key)


def _optimizer(model: CausalLM, state: Coordinator) -> DisTrO:
    lr = learning_rate(state.model.lr_schedule, state.progress.step)
    return model.make_optimizer(lr if lr > 0 else _ANY_RATE, state.model.optimizer)
