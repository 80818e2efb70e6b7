"""What a hosted run takes from the training script, where its :class:`~.config.RunConfig` says nothing."""

from __future__ import annotations

from dataclasses import replace

from ...errors import ConfigurationError
from ..config import RunConfig
from ..sample_order import check_dataset_size

__all__ = ["complete_config", "default_batch_size", "rounds_per_pass"]


def default_batch_size(config: RunConfig, *, peer_batch_size: int, dataset_size: int | None) -> int:
    """Samples of a round: what the script would take in a step, for as many peers as the run waits for.

    Args:
        config: its ``global_batch_size`` comes first.
        peer_batch_size: samples that the script takes in a step, on all devices of this machine.
        dataset_size: None if nobody knows.

    Raises:
        ConfigurationError: the dataset is empty, or shorter than the round that ``config`` wants.
    """
    if dataset_size == 0:
        raise ConfigurationError("the training dataset is empty: a run needs samples", name="dataset", value=0)
    if config.global_batch_size is None:
        size = peer_batch_size * config.min_peers
        return size if dataset_size is None else min(size, dataset_size)
    check_dataset_size(dataset_size, config.global_batch_size)
    return config.global_batch_size


def rounds_per_pass(dataset_size: int, batch_size: int) -> int:
    """Rounds in which the whole swarm goes through a dataset once; what is left over belongs to the next pass."""
    return max(1, dataset_size // batch_size)


def complete_config(config: RunConfig, *, batch_size: int, max_steps: int | None) -> RunConfig:
    """``config`` with nothing left open.

    Args:
        config: whatever it says comes first.
        batch_size: see :func:`default_batch_size`.
        max_steps: how many steps the script wants to train; None if it does not say.

    Raises:
        ConfigurationError: nobody says how long the run is.
    """
    if config.total_steps is not None:
        return replace(config, global_batch_size=batch_size)
    if max_steps is None:
        raise ConfigurationError(
            "a run has an end, and nobody has said when: set Trainer(max_steps=...) or RunConfig(total_steps=...)",
            name="total_steps",
        )
    return replace(config.training_up_to(max_steps), global_batch_size=batch_size)
