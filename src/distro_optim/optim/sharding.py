"""Parameters that are sharded over several devices (DTensors: FSDP2, tensor parallelism), as the optimizer sees them.

The ranks that hold a model together are *one* peer. Each has the momentum of the tiles that its shards :func:`own
<distro_optim.compress.shards.box_owned>` and changes its shards only, while updates, and whatever peers compare, are
those of the model that is not sharded. Ranks talk to each other where they must:

=====================  =============================================================================================
every step             the coefficients of all tiles, some bytes for each; which gradients are finite
and of each tensor     whose shards cut tiles: the rows of the gradient below the boundary, as far as the tile that is
                       cut, to its owner; with overlap, the signs of their momentum back
``orthogonal``         each matrix, to the rank that makes its direction, and back
``rms``                a sum of squares for each tensor
``state_dict``         all of the state, since what is saved is the state of the model that is not sharded
``delta``              the momentum of rows that another rank owns
=====================  =============================================================================================

Other weights need nobody: each rank decodes the tiles that its shards touch, from updates that all ranks have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..compress.plan import TilePlan
from ..compress.planning import plan_of_part
from ..compress.shards import Box, Span, box_around, box_owned, common_part, part_of
from ..errors import ConfigurationError
from .orthogonal import is_matrix
from .shards.matrices import ShardedMatrices
from .shards.placing import (
    as_sharded,
    check_fsdp2,
    check_places,
    check_sharded,
    common_mesh,
    is_sharded,
    local_part,
    shard_of,
)
from .shards.ranks import Ranks
from .shards.routes import Rectangle, Routes, routes
from .state import COEFFICIENTS, DELTA, DIRECTION, MOMENTUM_BUFFER, OWN_INDEX, OWN_VALUE, WEIGHT

__all__ = ["Ahead", "Sharding", "check_fsdp2", "check_sharded", "is_sharded", "shard_of"]

_BY_TILE: Final = (COEFFICIENTS, OWN_INDEX, OWN_VALUE)
"""Parts of a parameter's state that have a row for each tile."""

_BY_ELEMENT: Final = (DELTA, WEIGHT, MOMENTUM_BUFFER, DIRECTION)
"""Those that are shaped as the parameter: the weights as its shard, the others as the box."""


class Ahead(NamedTuple):
    """What is to look ahead: shards, cut where their momentum lies elsewhere. Parallel lists, as the lookahead's."""

    params: list[Tensor]
    directions: list[Tensor]
    saved: list[Tensor]
    lr: list[float]
    whole: list[bool]


def _check_arithmetic(plan: TilePlan) -> None:
    """Raises ConfigurationError for one in which parts of a sum are not a sum's."""
    # Psyche's has an order of its own for all that is rounded, but in wider types, where it leaves that to a BLAS.
    by_tile = plan.arithmetic == "exact" or (
        plan.arithmetic == "psyche" and all(spec.dtype in (torch.bfloat16, torch.float16) for spec in plan.specs)
    )
    if not by_tile:
        raise ConfigurationError(
            f"arithmetic={plan.arithmetic!r} with sharded parameters (DTensor): give 'exact', in which no sharding "
            "changes the weights, or in a run of Psyche's, have the weights in bfloat16",
            name="arithmetic",
            value=plan.arithmetic,
        )


class Sharding:
    """Which part of the model is here.

    Args:
        plan: of the whole model.
        params: DTensors, and plain tensors that every rank has alike.
        directions: of their groups, one for each.

    Attributes:
        whole: the plan of the model.
        orthogonal: parameters whose direction is Muon's.
        ranks: that hold the model together.
        boxes: tiles that the shards that are here own, one box for each parameter.
        plan: of these boxes.
        around: tiles that the shards touch, likewise.
        plan_around: of those; the very :attr:`plan` where no tile is cut.

    Raises:
        ConfigurationError: the parameters lie on meshes of which none has all ranks, or the arithmetic is another.
    """

    def __init__(self, plan: TilePlan, params: Sequence[Tensor], directions: Sequence[str]) -> None:
        _check_arithmetic(plan)
        self.whole = plan
        self.orthogonal = frozenset(n for n, direction in enumerate(directions) if direction == "orthogonal")
        self._params: list[Any] = list(params)
        self.ranks = Ranks(common_mesh(params))
        shards = [shard_of(param) for param in params]
        self.boxes = [box_owned(shard, grid) for shard, grid in zip(shards, plan.grids, strict=True)]
        self.around = [box_around(shard, grid) for shard, grid in zip(shards, plan.grids, strict=True)]
        self.plan = plan_of_part(plan, [box.grid for box in self.boxes])
        alike = all(box.spans == other.spans for box, other in zip(self.boxes, self.around, strict=True))
        self.plan_around = self.plan if alike else plan_of_part(plan, [box.grid for box in self.around])
        self._versions: list[int] | None = None
        self._lent: dict[int, list[tuple[Rectangle, Tensor]]] = {}

    @property
    def mesh(self) -> Any:
        """The ranks that hold the model together."""
        return self.ranks.mesh

    @property
    def rank(self) -> int:
        """This rank's place in :attr:`everybody`."""
        return self.ranks.here

    def gather(self, mine: Tensor) -> list[Tensor]:
        """As :meth:`~distro_optim.optim.shards.ranks.Ranks.gather`."""
        return self.ranks.gather(mine)

    @cached_property
    def everybody(self) -> list[list[Box]]:
        """The boxes of all ranks of the mesh. The first time, all ranks must ask.

        Raises:
            DistroError: the shards of a tensor are not where their placements say.
        """
        mine = [box.shard for box in self.boxes]
        # Dimensions are known, and so the length of the message.
        edges = torch.tensor(
            [edge for shard in mine for span in shard for edge in span], dtype=torch.int64, device="cpu"
        )
        boxes = []
        for row in self.gather(edges):
            numbers = iter(row.tolist())
            shards: list[tuple[Span, ...]] = [tuple((next(numbers), next(numbers)) for _ in shard) for shard in mine]
            boxes.append([box_owned(shard, grid) for shard, grid in zip(shards, self.whole.grids, strict=True)])
        for number, param in enumerate(self._params):
            check_places(number, param)
        return boxes

    @cached_property
    def _to_owners(self) -> Routes:
        """From shards to those who own the tiles."""
        return self._routes(self._all_shards(), self._all_boxes())

    @cached_property
    def _from_owners(self) -> Routes:
        """From those who own tiles to the shards."""
        return self._routes(self._all_boxes(), self._all_shards())

    def _routes(self, have: list[list[Rectangle]], need: list[list[Rectangle]]) -> Routes:
        return routes(self.ranks.coordinates, self.ranks.here, have, need)

    def _all_shards(self) -> list[list[Rectangle]]:
        return [[box.shard for box in boxes] for boxes in self.everybody]

    def _all_boxes(self) -> list[list[Rectangle]]:
        return [[box.spans for box in boxes] for boxes in self.everybody]

    # -- the tensors that are here -------------------------------------------------------------------------------------

    def held(self) -> list[Tensor]:
        """The shards that are here, in the memory of the parameters; a write to them is one to the parameters."""
        return [self.held_of(number) for number in range(len(self._params))]

    def held_of(self, number: int) -> Tensor:
        """The shard of one parameter; trained if the parameter is."""
        param: Tensor = self._params[number]
        return _as_parameter(local_part(param), param) if is_sharded(param) else param

    def as_parameter(self, number: int, tensor: Tensor) -> Tensor:
        """A tensor that is shaped as the box of :attr:`around`, as one that is sharded as the parameter, a copy."""
        here = self.around[number].shard_of(tensor).clone(memory_format=torch.contiguous_format)
        return as_sharded(self._params[number], here)

    def delta(self, number: int, owned: Tensor) -> Tensor:
        """A tensor of which all ranks have their boxes, as one that is sharded as the parameter, a copy.

        All ranks must call.
        """
        box = self.boxes[number]
        came = self._from_owners.send(self.ranks, {number: owned})[number]
        return as_sharded(self._params[number], _put_together(box.shard, [(box.spans, owned), *came], owned))

    @property
    def travels(self) -> frozenset[int]:
        """Parameters whose gradients travel in part: the same on all ranks. The first time, all of them must ask."""
        return self._to_owners.travel

    # -- gradients -----------------------------------------------------------------------------------------------------

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the parameters, shaped as the boxes. All ranks must call.

        Args:
            grads: DTensors of any placement where the parameter is one, or what is shaped as the box already.
        """
        placed = self._placed(grads)
        local = {n: local_part(grad) for n, grad in enumerate(placed) if grad is not None and is_sharded(grad)}
        cut = {n: grad for n, grad in local.items() if n in self._to_owners.travel}
        came = self._to_owners.send(self.ranks, cut)
        made: list[Tensor | None] = [local.get(n, grad) for n, grad in enumerate(placed)]
        for number, grad in cut.items():
            box = self.boxes[number]
            made[number] = _put_together(box.spans, [(box.shard, grad), *came[number]], grad)
        return made

    def local_gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the shards that are here."""
        return [local_part(grad) if grad is not None and is_sharded(grad) else grad for grad in self._placed(grads)]

    def _placed(self, grads: Sequence[Any]) -> list[Any]:
        """As the parameters are: backward passes may leave sums that are still to be made."""
        return [
            grad.redistribute(param.device_mesh, param.placements)
            if grad is not None and is_sharded(grad) and grad.placements != param.placements
            else grad
            for grad, param in zip(grads, self._params, strict=True)
        ]

    @cached_property
    def _matrices(self) -> ShardedMatrices:
        return ShardedMatrices(self.ranks, self.whole.grids, self.everybody)

    def orthogonalize(self, looks: Mapping[int, Tensor]) -> None:
        """Replaces ``looks``, shaped as the boxes, by Muon's directions, in place. All ranks must call.

        Args:
            looks: by number, of parameters of which all ranks have a gradient.
        """
        for number, look in looks.items():
            if not is_matrix(self.whole.grids[number]):
                look.sign_()
        self._matrices.orthogonalize({n: look for n, look in looks.items() if is_matrix(self.whole.grids[n])})

    # -- the lookahead -------------------------------------------------------------------------------------------------

    def look_ahead(
        self,
        directions: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        whole: Sequence[bool],
        *,
        on: bool,
    ) -> Ahead:
        """What the lookahead shifts, or puts back. To shift, all ranks must call; to put back, each may by itself.

        Whoever writes to a DTensor leaves no trace in its shard: that is written down for the lookahead here.

        Args:
            directions: shaped as the boxes.
            saved: shaped as the shards.
            lr, whole: as for the lookahead, for each parameter.
            on: it is on already.
        """
        held = self.held()
        versions = [param._version for param in self._params]
        if on and self._versions is not None:
            for tensor, before, now in zip(held, self._versions, versions, strict=True):
                if before != now:
                    tensor.detach().reshape(-1)[:0].zero_()
        self._versions = versions
        if not (on and self._lent):
            self._lent = self._borrowed(directions, whole)
        ahead = Ahead([], [], [], [], [])
        for number, (box, param, direction) in enumerate(zip(self.boxes, held, directions, strict=True)):
            parts: Iterable[tuple[Rectangle, Tensor]] = ((box.shard, direction),)
            if not box.is_shard:
                parts = ((box.spans, direction), *self._lent.get(number, ()))
            for spans, of_part in parts:
                part = common_part(spans, box.shard)
                if box.is_shard or part == box.shard:
                    ahead.params.append(param)
                    ahead.saved.append(saved[number])
                    ahead.directions.append(of_part if box.is_shard else part_of(of_part, spans, box.shard))
                elif part is not None:
                    ahead.params.append(_as_parameter(part_of(param.detach(), box.shard, part), param))
                    ahead.saved.append(part_of(saved[number], box.shard, part))
                    ahead.directions.append(part_of(of_part, spans, part))
                else:
                    continue
                ahead.lr.append(lr[number])
                ahead.whole.append(whole[number])
        return ahead

    def _borrowed(
        self, directions: Sequence[Tensor], whole: Sequence[bool]
    ) -> dict[int, list[tuple[Rectangle, Tensor]]]:
        """Directions of what is here and owned by others."""
        # A sign fits into a byte.
        sent = {
            number: directions[number] if whole[number] else torch.sign(directions[number]).to(torch.int8)
            for number in sorted(self._from_owners.travel)
        }
        return {
            number: [(part, values.to(directions[number].dtype)) for part, values in came]
            for number, came in self._from_owners.send(self.ranks, sent).items()
        }

    # -- what is saved -------------------------------------------------------------------------------------------------

    def whole_state(self, number: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter as it would be unsharded, in main memory. All ranks must call."""
        return {
            key: self._whole_of(number, key, value)
            if isinstance(value, Tensor) and (key in _BY_TILE or key in _BY_ELEMENT)
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
            elif key in _BY_ELEMENT and tuple(value.shape) == grid.shape:
                spans = box.shard if key == WEIGHT else box.spans
                part[key] = value[tuple(slice(*span) for span in spans)].contiguous()
        return part


def _as_parameter(part: Tensor, param: Tensor) -> Tensor:
    """A part of a parameter, which shares its memory, and is trained if the parameter is."""
    return Parameter(part, requires_grad=param.requires_grad) if isinstance(param, Parameter) else part


def _put_together(spans: Rectangle, parts: Sequence[tuple[Rectangle, Tensor]], like: Tensor) -> Tensor:
    """The elements ``spans`` of a tensor of which there are ``parts`` that have all of them, a copy."""
    made = like.new_empty([stop - start for start, stop in spans])
    for place, values in parts:
        both = common_part(place, spans)
        if both is not None:
            part_of(made, spans, both).copy_(part_of(values, place, both))
    return made
