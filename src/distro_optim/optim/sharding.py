"""Parameters that are sharded over several devices (DTensors: FSDP2, tensor parallelism), as the optimizer sees them.

The ranks that hold a model together are *one* peer. Each has the momentum of the :mod:`boxes <distro_optim.compress.
shards>` around its shards and changes its shards only, while updates, and whatever peers compare, are those of the
model that is not sharded. Ranks talk to each other where they must:

=====================  =============================================================================================
every step             the coefficients of all tiles, some bytes for each; which gradients are finite
and for each tensor    whose shards cut a tile: its gradient is gathered, one tensor after the other
``state_dict``         all of the state, since what is saved is the state of the model that is not sharded
=====================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..compress.plan import TilePlan, plan_of_part
from ..compress.shards import Box, Span, box_around
from ..errors import ConfigurationError, DistroError
from .state import COEFFICIENTS, DELTA, OWN_INDEX, OWN_VALUE, WEIGHT

__all__ = ["Sharding", "check_sharded", "is_sharded"]

_BY_TILE: Final = (COEFFICIENTS, OWN_INDEX, OWN_VALUE)
"""Parts of a parameter's state that have a row for each tile; the others are shaped as the parameter."""


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


def _check_settings(plan: TilePlan, directions: Sequence[str]) -> None:
    """Raises ConfigurationError for what needs tensors as a whole."""
    if plan.arithmetic != "exact":
        raise ConfigurationError(
            f"arithmetic={plan.arithmetic!r} with sharded parameters (DTensor): give 'exact', in which no sharding "
            "changes the weights",
            name="arithmetic",
            value=plan.arithmetic,
        )
    for name, published, given in (
        ("update", "sign", [spec.update for spec in plan.specs]),
        ("direction", "momentum", directions),
    ):
        other = next((value for value in given if value != published), None)
        if other is not None:
            raise ConfigurationError(
                f"{name}={other!r} with sharded parameters (DTensor) needs whole tensors: give {published!r}, or do "
                "not shard the model",
                name=name,
                value=other,
            )


class Sharding:
    """Which part of the model is here.

    Args:
        plan: of the whole model.
        params: DTensors, and plain tensors that every rank has alike.
        directions: of their groups, one for each.

    Attributes:
        mesh: the ranks that hold the model together.
        boxes: of the shards that are here, one for each parameter.
        plan: of the boxes.

    Raises:
        ConfigurationError: the parameters lie on meshes of which none has all ranks, or a setting needs whole tensors.
    """

    def __init__(self, plan: TilePlan, params: Sequence[Tensor], directions: Sequence[str]) -> None:
        _check_settings(plan, directions)
        self.whole = plan
        self._params: list[Any] = list(params)
        self.mesh = _common_mesh(params)
        self.boxes = [box_around(_shard_of(param), grid) for param, grid in zip(params, plan.grids, strict=True)]
        self.plan = plan_of_part(plan, [box.grid for box in self.boxes])
        self._everybody: list[list[Box]] | None = None
        self._versions: list[int] | None = None

    @property
    def rank(self) -> int:
        """This rank's place in :attr:`everybody`."""
        place = 0
        for coordinate, size in zip(self.mesh.get_coordinate(), self.mesh.shape, strict=True):
            place = place * size + coordinate
        return place

    @property
    def everybody(self) -> list[list[Box]]:
        """The boxes of all ranks of the mesh. The first time, all ranks must ask.

        Raises:
            DistroError: the shards of a tensor are not where their placements say.
        """
        if self._everybody is None:
            mine = [box.shard for box in self.boxes]
            shards = self._objects(mine)
            self._everybody = [
                [box_around(shard, grid) for shard, grid in zip(theirs, self.whole.grids, strict=True)]
                for theirs in shards
            ]
            for number, param in enumerate(self._params):
                self._check_places(number, param)
        return self._everybody

    def _check_places(self, number: int, param: Any) -> None:
        """Where a dimension is sharded over several dimensions of the mesh, orders of shards differ: one look."""
        if not is_sharded(param):
            return
        from torch.distributed.tensor import DTensor, Replicate

        for dim, span in enumerate(_shard_of(param)):
            on_it = [getattr(placement, "dim", None) == dim for placement in param.placements]
            if sum(on_it) < 2:
                continue
            moved = [_moved(p) if on else Replicate() for p, on in zip(param.placements, on_it, strict=True)]
            here = torch.arange(*span, device=_local(param).device)
            size = param.shape[dim]
            line = DTensor.from_local(
                here, param.device_mesh, moved, run_check=False, shape=torch.Size([size]), stride=(1,)
            )
            if not torch.equal(line.full_tensor(), torch.arange(size, device=here.device)):
                raise DistroError(
                    f"parameter {number} is placed as {param.placements}, whose shards are not runs of rows: shard "
                    "each dimension of a tensor over one dimension of the mesh"
                )

    # -- the tensors that are here -------------------------------------------------------------------------------------

    def held(self) -> list[Tensor]:
        """The shards that are here, in the memory of the parameters; a write to them is one to the parameters."""
        return [self.held_of(number) for number in range(len(self._params))]

    def held_of(self, number: int) -> Tensor:
        """The shard of one parameter; trained if the parameter is."""
        param: Tensor = self._params[number]
        if not is_sharded(param):
            return param
        local = _local(param)
        return Parameter(local, requires_grad=param.requires_grad) if isinstance(param, Parameter) else local

    def look_ahead(self, *, on: bool) -> list[Tensor]:
        """:meth:`held`, to put the lookahead on, or to take it off.

        Whoever writes to a DTensor leaves no trace in its shard: that is written down for the lookahead here.

        Args:
            on: it is on already.
        """
        held = self.held()
        versions = [param._version for param in self._params]
        if on and self._versions is not None:
            for tensor, before, now in zip(held, self._versions, versions, strict=True):
                if before != now:
                    tensor.detach().reshape(-1)[:0].zero_()
        self._versions = versions
        return held

    def in_box(self, number: int, tensor: Tensor) -> Tensor:
        """The shard in a tensor that is shaped as the box, contiguous."""
        return self.boxes[number].shard_of(tensor).contiguous()

    def as_parameter(self, number: int, tensor: Tensor) -> Tensor:
        """A tensor that is shaped as the box, as one that is sharded as the parameter, a copy."""
        param: Any = self._params[number]
        here = self.boxes[number].shard_of(tensor).clone(memory_format=torch.contiguous_format)
        if not is_sharded(param):
            return here
        from torch.distributed.tensor import DTensor

        made: Tensor = DTensor.from_local(
            here, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
        return made

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the parameters, shaped as the boxes. Gathers those of which a tile is cut: all ranks must call.

        Args:
            grads: DTensors of any placement where the parameter is one.
        """
        together = [any(not boxes[n].is_shard for boxes in self.everybody) for n in range(len(self._params))]
        made: list[Tensor | None] = []
        for number, grad in enumerate(self._placed(grads)):
            if grad is None or not is_sharded(grad):
                made.append(grad)
            elif together[number]:
                made.append(self.boxes[number].of_whole(grad.full_tensor()).contiguous())
            else:
                made.append(_local(grad))
        return made

    def local_gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the shards that are here."""
        return [_local(grad) if grad is not None and is_sharded(grad) else grad for grad in self._placed(grads)]

    def _placed(self, grads: Sequence[Any]) -> list[Any]:
        """As the parameters are: backward passes may leave sums that are still to be made."""
        return [
            grad.redistribute(param.device_mesh, param.placements)
            if grad is not None and is_sharded(grad) and grad.placements != param.placements
            else grad
            for grad, param in zip(grads, self._params, strict=True)
        ]

    # -- what ranks tell each other ------------------------------------------------------------------------------------

    def gather(self, mine: Tensor) -> list[Tensor]:
        """What every rank of the mesh has, in its order. All ranks must call.

        Args:
            mine: of one dimension, of the same type and length on all ranks, in main memory.
        """
        device = torch.device(self.mesh.device_type)
        everybody = mine.to(device).reshape(1, -1)
        for dim in reversed(range(self.mesh.ndim)):
            rows = [torch.empty_like(everybody) for _ in range(self.mesh.size(dim))]
            dist.all_gather(rows, everybody, group=self.mesh.get_group(dim))
            everybody = torch.cat(rows)
        return list(everybody.cpu())

    def _objects(self, mine: list[tuple[Span, ...]]) -> list[list[tuple[Span, ...]]]:
        """The shards of all ranks, as :meth:`gather`: their dimensions are known, and so the length of the message."""
        flat = torch.tensor(
            [edge for shard in mine for span in shard for edge in span], dtype=torch.int64, device="cpu"
        )
        everybody = []
        for row in self.gather(flat):
            edges = iter(row.tolist())
            everybody.append([tuple((next(edges), next(edges)) for _ in shard) for shard in mine])
        return everybody

    # -- what is saved -------------------------------------------------------------------------------------------------

    def whole_state(self, number: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter as it would be unsharded, in main memory. All ranks must call."""
        return {
            key: self._whole_of(number, key, value)
            if isinstance(value, Tensor) and (key in _BY_TILE or key in (DELTA, WEIGHT))
            else value
            for key, value in state.items()
        }

    def _whole_of(self, number: int, key: str, part: Tensor) -> Tensor:
        grid, param = self.whole.grids[number], self._params[number]
        if key == WEIGHT and is_sharded(param):
            # Of the weights there is the shard, and not the box.
            parts = [box.shard for box in (boxes[number] for boxes in self.everybody)]
        else:
            parts = [boxes[number].spans for boxes in self.everybody]
        row = tuple(part.shape[1:])
        counts = [boxes[number].grid.tiles for boxes in self.everybody] if key in _BY_TILE else []
        shapes = [(count, *row) for count in counts] or [tuple(b - a for a, b in spans) for spans in parts]
        size = max(torch.Size(shape).numel() for shape in shapes)
        if not size:
            return part.cpu().new_empty((grid.tiles, *row) if key in _BY_TILE else grid.shape)
        message = torch.zeros(size, dtype=part.dtype, device="cpu")
        message[: part.numel()] = part.detach().cpu().reshape(-1)
        whole = torch.empty((grid.tiles, *row) if key in _BY_TILE else grid.shape, dtype=part.dtype, device="cpu")
        everybody = self.gather(message.view(torch.uint8))
        # Of those who have the same, the first counts, as for updates.
        for place in reversed(range(len(everybody))):
            shape = shapes[place]
            count = torch.Size(shape).numel()
            if not count:
                continue
            here = everybody[place].view(part.dtype)[:count].view(shape)
            if key in _BY_TILE:
                whole[self.everybody[place][number].tiles(grid)] = here
            else:
                whole[tuple(slice(*span) for span in parts[place])] = here
        return whole

    def part_of_state(self, number: int, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`whole_state`. What has another shape than it should stays as it is."""
        box, grid = self.boxes[number], self.whole.grids[number]
        part = dict(saved)
        for key, value in saved.items():
            if key in _BY_TILE and len(value) == grid.tiles:
                part[key] = value[box.tiles(grid).to(value.device)]
            elif key in (DELTA, WEIGHT) and tuple(value.shape) == grid.shape:
                spans = box.shard if key == WEIGHT else box.spans
                part[key] = value[tuple(slice(*span) for span in spans)].contiguous()
        return part


def _local(tensor: Any) -> Tensor:
    # Without gradients this is the very memory of the shard.
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def _moved(placement: Any) -> Any:
    """The placement of a line that lies as one dimension of a tensor does."""
    from torch.distributed.tensor import Shard

    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)


def _common_mesh(params: Sequence[Any]) -> Any:
    """The mesh that has the ranks of all others."""
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


def _shard_of(param: Any) -> tuple[Span, ...]:
    """The elements of a parameter that are here, dimension by dimension."""
    if not is_sharded(param):
        return tuple((0, size) for size in param.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if tuple(shape) != tuple(_local(param).shape):
        raise ConfigurationError(
            f"params: a DTensor of {tuple(param.shape)} has a part of {tuple(_local(param).shape)} here, where "
            f"{param.placements} means {tuple(shape)}: distribute it as torch does",
            name="params",
        )
    return tuple(
        (min(start, size), min(start, size) + length)
        for start, length, size in zip(offset, shape, param.shape, strict=True)
    )
