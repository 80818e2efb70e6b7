"""A strategy of Lightning's or Fabric's that does without processes, groups and wrappers where there is one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from ...errors import DistroError
from .shards import DATA, ShardSizes, several_devices_needed

if TYPE_CHECKING:

    class _Strategy:
        """What both kinds of ``DDPStrategy`` have in common; classes that derive from :class:`OneDevice` add one."""

        num_processes: int
        global_rank: int
        root_device: torch.device

        def _configure_launcher(self) -> None: ...

        def barrier(self, *args: Any, **kwargs: Any) -> None: ...

        def broadcast(self, obj: Any, src: int = 0) -> Any: ...

        def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor: ...
else:
    _Strategy = object

__all__ = ["OneDevice"]


class OneDevice(_Strategy):
    """To be put before ``DDPStrategy``. What is exchanged among the devices of this machine stays as it is on one.

    Several devices may hold the model together: then there is a mesh of them, which the class that derives makes.
    """

    _shard_sizes: ShardSizes | None = None
    _device_mesh: DeviceMesh | None = None
    _runner: ClassVar[str]
    """The framework's class that is told the devices."""
    _mesh_is_there: ClassVar[str]
    """When, in the words of the framework."""

    @property
    def _alone(self) -> bool:
        """One device: no process group, no wrapper, no launcher."""
        return self.num_processes <= 1

    def _mesh_of(self, sizes: ShardSizes) -> DeviceMesh:
        """A mesh of all devices.

        Raises:
            ConfigurationError: it is one device, or the sizes do not make them up.
        """
        if self._alone:
            raise several_devices_needed(self._runner)
        return sizes.mesh(self.num_processes, self.root_device.type)

    @property
    def device_mesh(self) -> DeviceMesh:
        """Of the devices that hold the model together, ``data_parallel`` times ``tensor_parallel``.

        Raises:
            DistroError: there are none, or they have not started yet.
        """
        if self._device_mesh is None:
            raise DistroError(
                f"there is a device mesh {self._mesh_is_there}, with data_parallel_size or tensor_parallel_size"
            )
        return self._device_mesh

    @property
    def place_among_devices(self) -> tuple[int, int]:
        """Of :class:`~.round_loader.RoundSource`."""
        if self._device_mesh is not None:
            return self._device_mesh.get_local_rank(DATA), self._device_mesh[DATA].size()
        return (0, 1) if self._alone else (self.global_rank, self.num_processes)

    @override
    def _configure_launcher(self) -> None:
        if not self._alone:
            super()._configure_launcher()

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._alone:
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._alone else super().broadcast(obj, src)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return tensor if self._alone else super().all_gather(tensor, group, sync_grads)
