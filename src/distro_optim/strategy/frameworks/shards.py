"""A model in shards in a framework's loop: FSDP2 and tensor parallelism over the devices of one machine, one peer.

Names and order of the mesh's dimensions are those of Lightning's ``ModelParallelStrategy``, so that a script's
``configure_model`` is the same with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...errors import ConfigurationError
from ...optim.sharding import check_fsdp2, is_sharded, shard_of
from ..ranks.holders import reshard, whole_of

__all__ = ["DATA", "ShardSizes", "check_in_shards", "load_whole", "several_devices_needed", "whole_state"]

DATA: Final = "data_parallel"
"""The dimension whose devices train different samples."""

TENSOR: Final = "tensor_parallel"
"""The dimension whose devices compute each sample together."""


@dataclass(frozen=True)
class ShardSizes:
    """What a strategy was given; None for whatever makes up the devices."""

    data: int | None
    tensor: int | None

    @classmethod
    def of(cls, data: int | None, tensor: int | None) -> Self | None:
        """None where neither is given, so that each device has the whole model.

        Raises:
            ConfigurationError: a size is below 1.
            MissingDependencyError: PyTorch has no FSDP2.
        """
        if data is None and tensor is None:
            return None
        for name, value in (("data_parallel_size", data), ("tensor_parallel_size", tensor)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name}={value!r}: give a whole number of at least 1", name=name, value=value)
        check_fsdp2()
        return cls(data, tensor)

    def mesh(self, devices: int, kind: str) -> DeviceMesh:
        """Of all devices. All processes must call.

        Raises:
            ConfigurationError: the sizes do not make up the devices.
        """
        data = self.data if self.data is not None else devices // (self.tensor or 1)
        tensor = self.tensor if self.tensor is not None else devices // data
        if data * tensor != devices:
            raise ConfigurationError(
                f"data_parallel_size={self.data} and tensor_parallel_size={self.tensor} with {devices} devices: their "
                "product must be the number of devices",
                name="data_parallel_size",
            )
        return init_device_mesh(kind, (data, tensor), mesh_dim_names=(DATA, TENSOR))


def several_devices_needed(runner: str) -> ConfigurationError:
    """What is wrong where shards are wanted on one device; ``runner`` is the class that is told the devices."""
    return ConfigurationError(
        "data_parallel_size and tensor_parallel_size are for several devices, which hold the model together: give "
        f"{runner}(devices=...), or leave them out",
        name="devices",
    )


def check_in_shards(module: nn.Module, *, where: str) -> None:
    """Raises ConfigurationError unless something of ``module`` is sharded, and says ``where`` to do it."""
    if not any(map(is_sharded, module.parameters())):
        raise ConfigurationError(
            f"no parameter of the model is a DTensor: shard it in {where}, with torch.distributed.fsdp.fully_shard("
            f'layer, mesh=mesh["{DATA}"]) or parallelize_module(layer, mesh["{TENSOR}"], ...); or leave out '
            "data_parallel_size and tensor_parallel_size, and each device has the whole model",
            name="data_parallel_size",
        )


@torch.no_grad()
def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Any]:
    """``module.state_dict()`` of the model that is not sharded, in main memory. All processes must call.

    Args:
        keep: this process wants it; others get nothing.
    """
    reshard(module)
    state = {}
    for name, value in module.state_dict().items():
        whole = whole_of(value) if isinstance(value, Tensor) else value
        if keep:
            state[name] = whole.detach().to("cpu", copy=True) if isinstance(whole, Tensor) else whole
    return state


@torch.no_grad()
def load_whole(module: nn.Module, saved: Mapping[str, Any], *, strict: bool = True) -> None:
    """``module.load_state_dict(saved)`` with whole values, of which each process takes its shards.

    Raises:
        RuntimeError: it is the state of another model, as ``load_state_dict`` says it.
    """
    reshard(module)
    plain, state = dict(saved), module.state_dict()
    for name, target in state.items():
        if not is_sharded(target) or name not in saved:
            continue
        value = plain.pop(name)
        if tuple(value.shape) != tuple(target.shape):
            raise RuntimeError(
                f"Error(s) in loading state_dict: size mismatch for {name}: {tuple(value.shape)} is saved, the model "
                f"has {tuple(target.shape)}"
            )
        target.to_local().copy_(value[tuple(slice(*span) for span in shard_of(target))])
    found = module.load_state_dict(plain, strict=False)
    missing = [name for name in found.missing_keys if name not in saved]
    if strict and (missing or found.unexpected_keys):
        raise RuntimeError(
            f"Error(s) in loading state_dict: missing {missing}, and unexpected {list(found.unexpected_keys)}"
        )
