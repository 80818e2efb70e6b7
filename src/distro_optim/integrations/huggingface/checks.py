"""What of a ``transformers.Trainer`` cannot work in a run, each with what can."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from ...errors import ConfigurationError
from ...optimizer import DisTrO

__all__ = ["check_optimizer", "check_trainer", "unused_optimizer", "unwrapped"]


def check_trainer(trainer: Any) -> None:
    """Looks at the arguments of a trainer that is about to train.

    Raises:
        ConfigurationError: they want something that a run cannot give.
    """
    args = trainer.args
    if getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False):
        raise ConfigurationError(
            "DeepSpeed and FSDP cut parameters into pieces, but peers of a run exchange updates of whole ones: leave "
            "out deepspeed and fsdp, and train a model that fits on one device, or a LoRA of it",
            name="fsdp",
        )
    if args.auto_find_batch_size:
        raise ConfigurationError(
            "auto_find_batch_size=True starts training again with other batches, but a run is joined once: set "
            "per_device_train_batch_size to what fits; how many samples a step has is RunConfig(global_batch_size=...)",
            name="auto_find_batch_size",
            value=True,
        )
    dataset = trainer.train_dataset
    if isinstance(dataset, Sized) and not len(dataset):
        raise ConfigurationError(
            "the training dataset is empty: a run needs samples", name="train_dataset", value=dataset
        )
    if trainer.optimizer is not None:
        check_optimizer(trainer.optimizer)


def unused_optimizer(args: Any) -> str | None:
    """What there is to say of an optimizer that ``TrainingArguments`` name; None if it is the default."""
    field = type(args).__dataclass_fields__.get("optim")
    chosen = getattr(args.optim, "value", args.optim)
    default = None if field is None else getattr(field.default, "value", field.default)
    if chosen == default:
        return None
    return (
        f"TrainingArguments(optim={chosen!r}) is not used, since only updates of DisTrO are exchanged: it takes "
        "learning_rate and weight_decay; for more give optimizers=(DisTrO(model.parameters(), lr=...), None)"
    )


def check_optimizer(optimizer: Any) -> DisTrO:
    """The DisTrO that a trainer has, under the wrapper that accelerate puts around it.

    Raises:
        ConfigurationError: it is another optimizer.
    """
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, DisTrO):
        raise ConfigurationError(
            f"the optimizer is {type(optimizer).__name__}, which has nothing to send to peers: leave it out, or give "
            "optimizers=(DisTrO(model.parameters(), lr=4e-4), None)",
            name="optimizers",
            value=optimizer,
        )
    return optimizer


def unwrapped(optimizer: Any) -> Any:
    """The optimizer under accelerate's ``AcceleratedOptimizer``."""
    while not isinstance(optimizer, DisTrO) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
