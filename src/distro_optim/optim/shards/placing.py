"""Which elements of a DTensor are here, and that they lie as its placements say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...compress.shards import Span
from ...errors import ConfigurationError, DistroError, MissingDependencyError

__all__ = [
    "as_sharded",
    "check_fsdp2",
    "check_places",
    "check_sharded",
    "common_mesh",
    "is_sharded",
    "local_part",
    "shard_of",
]


def check_fsdp2() -> None:
    """Raises :class:`~distro_optim.errors.MissingDependencyError` if this PyTorch cannot shard models as we do."""
    from torch.distributed import fsdp  # takes a second to load, which most have no use for

    if not hasattr(fsdp, "fully_shard"):
        raise MissingDependencyError(
            f"a model in shards needs FSDP2, which PyTorch {torch.__version__} lacks: pip install 'torch>=2.6'"
        )


def is_sharded(param: object) -> bool:
    """Whether ``param`` is a DTensor."""
    return hasattr(param, "device_mesh") and hasattr(param, "placements")


def check_sharded(param: Any) -> None:
    """Raises :class:`~distro_optim.errors.ConfigurationError` unless a DTensor's parts are shards or copies of it."""
    if any(placement.is_partial() for placement in param.placements):
        raise ConfigurationError(
            f"params: a DTensor is placed as {param.placements}, so that its ranks hold terms of a sum: redistribute() "
            "it to Shard or Replicate",
            name="params",
        )


def local_part(tensor: Any) -> Tensor:
    """The elements of a DTensor that are here, in its own memory."""
    # Without gradients this is the very memory of the shard.
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def as_sharded(param: Any, here: Tensor) -> Tensor:
    """``here`` as a tensor that is sharded as ``param`` is, of which it has what is here."""
    if not is_sharded(param):
        return here
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        here, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return made


def shard_of(param: Any) -> tuple[Span, ...]:
    """The elements of a parameter that are here, dimension by dimension.

    Raises:
        ConfigurationError: there are more of them, or fewer, than its placements say.
    """
    if not is_sharded(param):
        return tuple((0, size) for size in param.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if tuple(shape) != tuple(local_part(param).shape):
        raise ConfigurationError(
            f"params: a DTensor of {tuple(param.shape)} has a part of {tuple(local_part(param).shape)} here, where "
            f"{param.placements} means {tuple(shape)}: distribute it as torch does",
            name="params",
        )
    return tuple(
        (min(start, size), min(start, size) + length)
        for start, length, size in zip(offset, shape, param.shape, strict=True)
    )


def check_places(number: int, param: Any) -> None:
    """Where a dimension is sharded over several dimensions of the mesh, orders of shards differ: one look.

    All ranks of its mesh must call.

    Raises:
        DistroError: the shards of parameter ``number`` are not where its placements say.
    """
    if not is_sharded(param):
        return
    from torch.distributed.tensor import DTensor, Replicate

    for dim, span in enumerate(shard_of(param)):
        on_it = [getattr(placement, "dim", None) == dim for placement in param.placements]
        if sum(on_it) < 2:
            continue
        moved = [_moved(p) if on else Replicate() for p, on in zip(param.placements, on_it, strict=True)]
        here = torch.arange(*span, device=local_part(param).device)
        size = param.shape[dim]
        line = DTensor.from_local(
            here, param.device_mesh, moved, run_check=False, shape=torch.Size([size]), stride=(1,)
        )
        if not torch.equal(line.full_tensor(), torch.arange(size, device=here.device)):
            raise DistroError(
                f"parameter {number} is placed as {param.placements}, whose shards are not runs of rows: shard "
                "each dimension of a tensor over one dimension of the mesh"
            )


def _moved(placement: Any) -> Any:
    """The placement of a line that lies as one dimension of a tensor does."""
    from torch.distributed.tensor import Shard

    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)


def common_mesh(params: Sequence[Any]) -> Any:
    """The mesh that has the ranks of all others.

    Raises:
        ConfigurationError: there is none, or this rank is not in it.
    """
    meshes = [param.device_mesh for param in params if is_sharded(param)]
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    if largest.get_coordinate() is None:
        raise ConfigurationError("params: this rank is not in the mesh of the DTensors", name="params")
    for mesh in meshes:
        if not set(mesh.mesh.flatten().tolist()) <= ranks:
            raise ConfigurationError(
                f"params: DTensors lie on {largest} and on {mesh}, which has other ranks: shard the model over one "
                "mesh, or over parts of it",
                name="params",
            )
    return largest
