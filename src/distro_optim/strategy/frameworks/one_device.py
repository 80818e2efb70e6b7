"""A strategy of Lightning's or Fabric's that does without processes, groups and wrappers where there is one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

if TYPE_CHECKING:

    class _Strategy:
        """What both kinds of ``DDPStrategy`` have in common; classes that derive from :class:`OneDevice` add one."""

        num_processes: int

        def _configure_launcher(self) -> None: ...

        def barrier(self, *args: Any, **kwargs: Any) -> None: ...

        def broadcast(self, obj: Any, src: int = 0) -> Any: ...

        def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor: ...
else:
    _Strategy = object

__all__ = ["OneDevice"]


class OneDevice(_Strategy):
    """To be put before ``DDPStrategy``. What is exchanged among the devices of this machine stays as it is on one."""

    @property
    def _alone(self) -> bool:
        """One device: no process group, no wrapper, no launcher."""
        return self.num_processes <= 1

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
