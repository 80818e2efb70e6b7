"""The machine that a Lightning strategy runs on: one peer, of one device or of several."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from ...errors import ConfigurationError, DistroError
from .one_device import OneDevice
from .shards import check_in_shards, load_whole, whole_state

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _DDPStrategy
else:
    _DDPStrategy = object  # the classes for Lightning's two names add theirs

__all__ = ["OneMachine"]


class OneMachine(OneDevice, _DDPStrategy):
    """``DDPStrategy`` of one machine, which does without processes, groups and wrappers where there is one device.

    ``global_rank``, ``world_size`` and everything that is reduced are about the devices of this machine.

    With sizes of shards it does what ``ModelParallelStrategy`` does: the module has a ``device_mesh`` in its
    ``configure_model``, which shards it, and nothing is wrapped around it.
    """

    _namespace: ClassVar[str]
    _runner = "Trainer"
    _mesh_is_there = "during fit()"

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
        if self._shard_sizes is not None:
            self._device_mesh = self._mesh_of(self._shard_sizes)
            if (module := self.lightning_module) is not None:
                module._device_mesh = self._device_mesh

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._device_mesh is None:
            kwargs: dict[str, Any] = super().distributed_sampler_kwargs
            return kwargs
        rank, size = self.place_among_devices
        return {"num_replicas": size, "rank": rank}

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        # What was made on the meta device has no memory before.
        return self._shard_sizes is not None

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._device_mesh is not None and (module := self.lightning_module) is not None:
            return whole_state(module, keep=self.is_global_zero)
        state: dict[str, Any] = super().lightning_module_state_dict()
        return state

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._device_mesh is not None and (module := self.lightning_module) is not None:
            load_whole(module, checkpoint["state_dict"], strict=strict)
        else:
            super().load_model_state_dict(checkpoint, strict)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self._alone else super().reduce(tensor, group, reduce_op)

    @override
    def setup(self, trainer: Any) -> None:
        if self._device_mesh is not None:
            self._setup_shards(trainer)
        elif self._alone:
            self._setup_one_device(trainer)
        else:
            super().setup(trainer)

    def _setup_shards(self, trainer: Any) -> None:
        """``ModelParallelStrategy.setup``."""
        if self.accelerator is None or self.model is None:
            raise DistroError("a strategy is set up by a Trainer, with a model and an accelerator")
        check_in_shards(self.model, where="configure_model, over self.device_mesh")
        fabric = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}[self._namespace]
        import_module(f"{fabric}.utilities.init")._materialize_distributed_module(self.model, self.root_device)
        self._setup_one_device(trainer)

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
