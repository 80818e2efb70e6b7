"""The sample that a run would give us first, read before we ask to be in it: data that cannot be trained on are found
while nobody there counts on us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...coordinator.rules.outlook import first_data_index
from ...coordinator.types import Coordinator
from ...errors import ConfigurationError, DistroError
from ..session import SwarmSession
from .samples import Samples

__all__ = ["look_at_first_sample"]


def look_at_first_sample(session: SwarmSession, samples: Samples, model: nn.Module) -> Callable[[Coordinator], None]:
    """What :attr:`~..session.SwarmSession.look_over` calls.

    Args:
        session: not started yet.
        samples: of the script.
        model: if its ``config`` says how many tokens it knows, ``input_ids`` are compared with that.

    Raises:
        ConfigurationError: by what is returned: the sample cannot be read, or has tokens that the model does not know.
    """

    def look(state: Coordinator) -> None:
        index = session.sample_of(first_data_index(state))
        if index is None:
            return
        try:
            with torch.random.fork_rng(devices=[]):  # what is only looked at changes nothing
                sample = samples.probe(index)
        except DistroError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"sample {index} of the training dataset, which the run would train next, cannot be read: "
                f"{type(error).__name__}: {error}",
                name="dataset",
            ) from error
        _check_tokens(sample, model, index)

    return look


def _check_tokens(sample: Any, model: nn.Module, index: int) -> None:
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    tokens = sample.get("input_ids") if isinstance(sample, Mapping) else getattr(sample, "input_ids", None)
    if not isinstance(known, int) or tokens is None:
        return
    values = torch.as_tensor(tokens)
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < known:
        raise ConfigurationError(
            f"sample {index} of the training dataset has tokens from {int(values.min())} to {int(values.max())}, the "
            f"model's vocabulary has {known}: the data were made with another tokenizer",
            name="dataset",
        )
