"""What :class:`~distro_optim.optimizer.DisTrO` remembers of a parameter, and how it is saved.

Always in ``state[p]``, from construction, and saved; float32, or float64 for a float64 parameter:

================  ===============================================================================================
``delta``         momentum, shaped as the parameter
``coefficients``  instead of it, for a matrix that is cut into whole tiles, without overlap: its DCT, tile by tile,
                  ``(tiles, h, w)``, which saves transforms
``quarantined``   0-D int64 on the CPU: gradients left out because they were not finite
================  ===============================================================================================

With ``direction="orthogonal"`` also, and saved:

===================  ============================================================================================
``momentum_buffer``  Muon's momentum of the gradients, shaped as the parameter; ``delta`` gathers the directions
                     that are made of it
``direction``        the last of them, whose update is on its way; only with ``overlap=True``, and not with
                     ``ahead="delta"``
===================  ============================================================================================

With ``overlap=True`` also, and saved:

===============  ================================================================================================
``own_index``    ``(tiles, k) int32``: what this peer sent in the step before
``own_value``    ``(tiles, k)`` as ``delta``: the coefficients, unquantised; all 0 where nothing was sent
``weight``       as the parameter: the true weights while the lookahead is on; stale while it is off
===============  ================================================================================================

Filled only in ``state_dict()``, where it stands for what the exchange holds (with the ``in_flight`` flag of the
groups); in ``state[p]`` of no peers, since torch.distributed.checkpoint restores what it finds there by name:

=====================  ==========================================================================================
``in_flight_index``    ``(peers, tiles, k) int32``: everybody's update that is sent and not applied
``in_flight_value``    ``(peers, tiles, k)`` bool or as the parameter
``in_flight_present``  ``(peers,)`` bool
=====================  ==========================================================================================
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..compress import CompressedUpdate, TileGrid, TilePlan, compute_dtype, from_coefficients, to_coefficients
from ..compress.dct import TransformName
from ..errors import ConfigurationError, DistroError
from .rules import PUBLISHED, is_orthogonal

__all__ = [
    "COEFFICIENTS",
    "DELTA",
    "DIRECTION",
    "MOMENTUM_BUFFER",
    "OWN_INDEX",
    "OWN_VALUE",
    "QUARANTINED",
    "WEIGHT",
    "momentum",
    "pack_in_flight",
    "restore_state",
    "unpack_in_flight",
]

DELTA: Final = "delta"
COEFFICIENTS: Final = "coefficients"
MOMENTUM_BUFFER: Final = "momentum_buffer"
DIRECTION: Final = "direction"
QUARANTINED: Final = "quarantined"
OWN_INDEX: Final = "own_index"
OWN_VALUE: Final = "own_value"
WEIGHT: Final = "weight"

_IN_FLIGHT_INDEX: Final = "in_flight_index"
_IN_FLIGHT_VALUE: Final = "in_flight_value"
_IN_FLIGHT_PRESENT: Final = "in_flight_present"
_IN_FLIGHT: Final = (_IN_FLIGHT_INDEX, _IN_FLIGHT_VALUE, _IN_FLIGHT_PRESENT)


def momentum(state: dict[str, Tensor]) -> Tensor:
    """The momentum of a parameter as its state holds it: shaped as the parameter, or coefficients ``(tiles, h, w)``."""
    return state[COEFFICIENTS] if COEFFICIENTS in state else state[DELTA]


def _templates(
    param: Tensor, plan: TilePlan, number: int, overlap: bool, transform: TransformName, rules: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tensors without memory that have the shapes and dtypes of the state."""
    grid = plan.grids[number]
    dtype, rows = compute_dtype(param.dtype), (grid.tiles, plan.topk[number])

    def template(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    # Of more than two dimensions, equally many tiles of the same size may be others under another tiling.
    if not overlap and transform == "dct" and grid.exact:
        state = {COEFFICIENTS: template(grid.tiles, grid.h, grid.w, dtype=dtype)}
    else:
        state = {DELTA: template(*grid.shape, dtype=dtype)}
    state[QUARANTINED] = template(dtype=torch.int64)
    if is_orthogonal(rules):
        state[MOMENTUM_BUFFER] = template(*grid.shape, dtype=dtype)
        if overlap and rules["ahead"] == "direction":
            state[DIRECTION] = template(*grid.shape, dtype=dtype)
    if overlap:
        state[OWN_INDEX] = template(*rows, dtype=torch.int32)
        state[OWN_VALUE] = template(*rows, dtype=dtype)
        state[WEIGHT] = torch.empty_like(param, device="meta")
        state[_IN_FLIGHT_INDEX] = template(0, *rows, dtype=torch.int32)
        state[_IN_FLIGHT_VALUE] = template(0, *rows, dtype=param.dtype)
        state[_IN_FLIGHT_PRESENT] = template(0, dtype=torch.bool)
    return state


def _fresh(key: str, template: Tensor, param: Tensor) -> Tensor:
    if key == WEIGHT:
        return param.detach().clone(memory_format=torch.preserve_format)
    return torch.zeros_like(template, device=_device(key, param))


def _device(key: str, param: Tensor) -> torch.device:
    return torch.device("cpu") if key in (QUARANTINED, _IN_FLIGHT_PRESENT) else param.device


def restore_state(
    saved: dict[str, Any],
    param: Tensor,
    plan: TilePlan,
    number: int,
    overlap: bool,
    transform: TransformName,
    rules: Mapping[str, Any] = PUBLISHED,
) -> dict[str, Tensor]:
    """State from what was saved or moved, with dtypes and devices as they should be; what is missing starts afresh.

    So a state of plain DeMo (``delta`` alone) can be loaded, and a state with overlap can be loaded without it, and the
    other way round. Tensors that are right already are taken as they are.

    Args:
        saved: shapes as in the tables above, of any dtypes and devices; ``{}`` gives the state of an untrained one.
        param: the parameter.
        plan: of the model.
        number: the parameter's place in ``plan``.
        overlap, transform: of the optimizer.
        rules: of the group of the parameter.

    Raises:
        ConfigurationError: a tensor has another shape, or an index lies outside its tile.
    """
    state = {}
    for key, template in _templates(param, plan, number, overlap, transform, rules).items():
        value = saved.get(key)
        if value is None and key in (DELTA, COEFFICIENTS):
            value = _in_the_other_form(saved, key, param, plan.grids[number])
        if value is None or key in _IN_FLIGHT:
            state[key] = _fresh(key, template, param)
            continue
        if tuple(value.shape) != tuple(template.shape):
            raise ConfigurationError(
                f"the saved {key} of parameter {number} has shape {tuple(value.shape)}, expected "
                f"{tuple(template.shape)}: load it into the same model with the same compression settings",
                name="state_dict",
            )
        if (
            key == OWN_INDEX
            and value.numel()
            and not 0 <= int(value.min()) <= int(value.max()) < plan.grids[number].tile_size
        ):
            raise ConfigurationError(
                f"the saved {key} of parameter {number} is of other tiles: load it with the same tiling and "
                "compression_chunk",
                name="state_dict",
            )
        value = value.to(device=_device(key, param), dtype=template.dtype)
        if key in (DELTA, COEFFICIENTS, MOMENTUM_BUFFER, DIRECTION) and not _is_finite(value):
            warnings.warn(
                f"distro_optim: the saved {key} of parameter {number} is not finite; its momentum starts from zero.",
                UserWarning,
                stacklevel=2,
            )
            value = torch.zeros_like(value)
        state[key] = value if key in (WEIGHT, QUARANTINED) or value.is_contiguous() else value.contiguous()
    return state


def _in_the_other_form(saved: dict[str, Any], key: str, param: Tensor, grid: TileGrid) -> Tensor | None:
    """The momentum as ``key`` says, of a state that has it in the other form. As it is where it does not fit."""
    value: Tensor | None = saved.get(DELTA if key == COEFFICIENTS else COEFFICIENTS)
    if value is None:
        return None
    expected = grid.shape if key == COEFFICIENTS else (grid.tiles, grid.h, grid.w)
    if tuple(value.shape) != tuple(expected):
        return value  # refused, with its shape
    exact = value.to(compute_dtype(param.dtype))
    return to_coefficients(exact, grid) if key == COEFFICIENTS else from_coefficients(exact, grid)


def pack_in_flight(
    plan: TilePlan, updates: Sequence[CompressedUpdate] | None, quantized: bool, peers: int
) -> list[dict[str, Tensor]]:
    """The saved form of ``updates``, parameter by parameter; zeros for ``peers`` peers where nothing is in flight.

    The tensors are those of the last table above.

    Raises:
        DistroError: some updates hold signs and others values.
    """
    held = updates if updates is not None else [CompressedUpdate.empty(plan, quantized=quantized)] * peers
    packed = []
    for number, home in enumerate(plan.home):
        present = torch.tensor([u.present[number] for u in held], device="cpu")
        if home is None:
            index = torch.zeros(len(held), 0, plan.topk[number], dtype=torch.int32, device="cpu")
            value = torch.zeros(len(held), 0, plan.topk[number], device="cpu")
        else:
            start, stop = plan.batches[home].ranges[number]
            index = torch.stack([u.index[home][start:stop].cpu() for u in held])
            value = _stack_values([u.value[home][start:stop].cpu() for u in held], present.tolist())
        packed.append({_IN_FLIGHT_INDEX: index, _IN_FLIGHT_VALUE: value, _IN_FLIGHT_PRESENT: present})
    return packed


def _stack_values(values: Sequence[Tensor], present: Sequence[bool]) -> Tensor:
    """Signs stay signs, whatever the rows of absent peers, which mean nothing, happen to be."""
    kinds = {value.dtype for value, there in zip(values, present, strict=True) if there}
    if len(kinds) > 1:
        raise DistroError("some peers send signs and others values: give all of them the same quantize_1bit")
    kind = kinds.pop() if kinds else values[0].dtype
    return torch.stack([v if v.dtype == kind else torch.zeros_like(v, dtype=kind) for v in values])


def unpack_in_flight(plan: TilePlan, saved: Sequence[dict[str, Any]]) -> list[CompressedUpdate] | None:
    """The updates that :func:`pack_in_flight` saved; None where the state was saved without them.

    A parameter without an entry (torch.distributed.checkpoint leaves out frozen ones) is absent from the updates.

    Raises:
        ConfigurationError: they do not fit the plan.
    """
    peers = max((len(entry.get(_IN_FLIGHT_PRESENT, ())) for entry in saved), default=0)
    if not peers:
        return None
    homes = [(n, home) for n, home in enumerate(plan.home) if home is not None and _IN_FLIGHT_PRESENT in saved[n]]
    quantized = any(saved[n][_IN_FLIGHT_VALUE].dtype == torch.bool for n, _ in homes)
    updates = []
    for peer in range(peers):
        update = CompressedUpdate.empty(plan, quantized=quantized)
        for number, home in homes:
            start, stop = plan.batches[home].ranges[number]
            index, value = saved[number][_IN_FLIGHT_INDEX][peer], saved[number][_IN_FLIGHT_VALUE][peer]
            if index.shape != update.index[home][start:stop].shape:
                raise ConfigurationError(
                    f"the saved update of parameter {number} has shape {tuple(index.shape)}, expected "
                    f"{(stop - start, plan.topk[number])}: load it with the same compression settings",
                    name="state_dict",
                )
            update.index[home][start:stop].copy_(index)
            update.value[home][start:stop].copy_(value)
        present = tuple(_IN_FLIGHT_PRESENT in entry and bool(entry[_IN_FLIGHT_PRESENT][peer]) for entry in saved)
        updates.append(CompressedUpdate(plan, update.index, update.value, present))
    return updates


def _is_finite(value: Tensor) -> bool:
    """Without a temporary of its size: the extremes of a tensor with NaN in it are NaN."""
    return value.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(value))
