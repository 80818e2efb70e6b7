"""What of a Lightning script cannot work in a run, each with the line that can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from ...errors import ConfigurationError
from ...optimizer import DisTrO
from .samples import length_of

__all__ = ["check_fit", "check_optimizers", "compile_advice"]

_CALLBACKS: Final = {
    "GradientAccumulationScheduler": (
        "changes how many batches make a step, which is the same for all peers of a run: use "
        "RunConfig(global_batch_size=...)"
    ),
    "StochasticWeightAveraging": (
        "trains on after the run's end, with weights of its own: use WeightAveraging, which keeps the average aside"
    ),
    "BatchSizeFinder": "changes the batch size while it trains: find it with another strategy, then set it",
    "BaseFinetuning": (
        "gives the optimizer more parameters while it trains, but those of a run are settled when it begins: give "
        "DisTrO all of them, and those that are to stay as they are until step 1000 in a group of their own:\n"
        "    optimizer = DisTrO([{'params': head}, {'params': backbone}], lr=4e-4)\n"
        "    LambdaLR(optimizer, [lambda step: 1.0, lambda step: float(step >= 1000)])"
    ),
    "LearningRateFinder": "trains with many learning rates: find one with another strategy, then set it",
}
"""Callbacks by the names of their classes, since there are two of each: what they do, and what to do instead."""


def check_fit(trainer: Any) -> None:
    """Raises ConfigurationError if the script wants something that a run cannot give."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise ConfigurationError(
            "PsycheStrategy needs automatic optimization, since a round is one step of one optimizer: remove "
            "`self.automatic_optimization = False`, return the loss from training_step and leave the steps to "
            "Lightning. A loop that steps by itself can use distro_optim.SwarmSession",
            name="automatic_optimization",
            value=False,
        )
    if trainer.overfit_batches:
        raise ConfigurationError(
            f"overfit_batches={trainer.overfit_batches}: the run assigns the samples, so make the dataset small "
            "instead, with torch.utils.data.Subset",
            name="overfit_batches",
            value=trainer.overfit_batches,
        )
    given = trainer.fit_loop._data_source.instance  # the module itself if it is that which gives the loader
    if isinstance(given, DataLoader) and not isinstance(given.dataset, IterableDataset):
        length_of(given.dataset)
    for callback in trainer.callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in _CALLBACKS:
                raise ConfigurationError(
                    f"the callback {type(callback).__name__} {_CALLBACKS[kind.__name__]}",
                    name="callbacks",
                    value=callback,
                )


def check_optimizers(optimizers: Sequence[Optimizer]) -> DisTrO:
    """The one DisTrO that they are.

    Raises:
        ConfigurationError: they are something else; says which line to write instead.
    """
    if len(optimizers) != 1:
        raise _not_one_optimizer(str(len(optimizers) or "no"))
    [optimizer] = optimizers
    if not isinstance(optimizer, DisTrO):
        raise ConfigurationError(
            f"configure_optimizers returned {type(optimizer).__name__}, which has nothing to send to peers. "
            f"Write instead:\n    from distro_optim import DisTrO\n    {_replacement(optimizer)}",
            name="configure_optimizers",
            value=optimizer,
        )
    if not optimizer.overlap:
        raise ConfigurationError(
            "DisTrO(overlap=False) waits for every update, but in a run an update travels while the next round "
            "computes: leave out overlap=False",
            name="overlap",
            value=False,
        )
    return optimizer


def with_one_optimizer(setup_optimizers: Callable[[Any], None], trainer: Any) -> None:
    """Lets Lightning ask the module for its optimizers, of which it wants one as well.

    Raises:
        ConfigurationError: there are several, for which Lightning would advise something that cannot be done here.
    """
    try:
        setup_optimizers(trainer)
    except RuntimeError as error:
        if "multiple optimizers" not in str(error):
            raise
        raise _not_one_optimizer("several") from None


def _not_one_optimizer(how_many: str) -> ConfigurationError:
    return ConfigurationError(
        f"configure_optimizers returned {how_many} optimizers, but a round is one step of one: give one DisTrO all "
        "parameters, with a group for those that need another learning rate:\n"
        "    return DisTrO([{'params': first}, {'params': second, 'lr': 1e-4}], lr=4e-4)",
        name="configure_optimizers",
    )


def compile_advice(error: BaseException, compiled: bool) -> str | None:
    """What to do about an error inside a compiled LightningModule, if it is one."""
    if not compiled or not type(error).__module__.startswith("torch._dynamo"):
        return None
    return (
        "torch.compile(LightningModule) fails at self.log() in Lightning up to 2.6: compile the network inside the "
        "module instead, in configure_model:\n    self.net = torch.compile(self.net)"
    )


def _replacement(optimizer: Optimizer) -> str:
    """The line with DisTrO for the one with ``optimizer``: the decay is kept, the learning rate is another matter."""
    decay = optimizer.param_groups[0].get("weight_decay", 0) if optimizer.param_groups else 0
    decay_argument = f", weight_decay={decay:g}" if decay else ""
    return (
        f"optimizer = DisTrO(self.parameters(), lr=4e-4{decay_argument})"
        "  # lr is the size of a weight's change; AdamW's is a good start"
    )
