"""The machine that a Lightning strategy runs on: one peer, of one device or of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from ...errors import ConfigurationError, DistroError
from .one_device import OneDevice

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _DDPStrategy
else:
    _DDPStrategy = object  # the classes for Lightning's two names add theirs

__all__ = ["OneMachine"]


class OneMachine(OneDevice, _DDPStrategy):
    """``DDPStrategy`` of one machine, which does without processes, groups and wrappers where there is one device.

    ``global_rank``, ``world_size`` and everything that is reduced are about the devices of this machine.
    """

    @property  # type: ignore[explicit-override]  # mypy does not see @override on a property with a setter
    @override
    def num_nodes(self) -> int:
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes != 1:
            raise ConfigurationError(
                f"num_nodes={num_nodes}: a peer is one machine, so start the script on each one, on all but the first "
                "with PsycheStrategy(run=<the ticket>), and leave num_nodes at 1",
                name="num_nodes",
                value=num_nodes,
            )

    @override
    def setup_distributed(self) -> None:
        if self._alone:
            self.set_world_ranks()
        else:
            super().setup_distributed()

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self._alone else super().reduce(tensor, group, reduce_op)

    @override
    def setup(self, trainer: Any) -> None:
        if self._alone:
            self._setup_one_device(trainer)
        else:
            super().setup(trainer)

    def _setup_one_device(self, trainer: Any) -> None:
        """``DDPStrategy.setup`` without what needs a process group."""
        if self.accelerator is None or self.model is None:
            raise DistroError("a strategy is set up by a Trainer, with a model and an accelerator")
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
