"""How large a model is, and what it sends each round, without the model: from its shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..compress import ParamSpec, TilePlan, make_plan
from ..compress.wire_tensor import index_width
from ..coordinator.model import Distro
from .building import build_shapes, sorted_parameters
from .config import LanguageModelConfig

__all__ = ["ModelSize", "model_size", "plan_of", "result_size"]

# A byte of postcard's varints holds 7 bits.
_VARINT_BITS = 7
# Type, requires_grad, variant of the data.
_TENSOR_HEAD = 3
# `SerializableTensor` counts in i64, zigzag: twice the value.
_ZIGZAG = 2


@dataclass(frozen=True)
class ModelSize:
    """What :func:`model_size` finds.

    Attributes:
        tensors: number of parameters' tensors.
        parameters: number of elements of all.
        weights_bytes: of all, in the type they are trained in.
        result_bytes: one peer's result for one batch of a round, as its blob holds it. Every peer sends one for each
            batch it trains and fetches those of all others.
    """

    tensors: int
    parameters: int
    weights_bytes: int
    result_bytes: int


def model_size(config: LanguageModelConfig, optimizer: Distro) -> ModelSize:
    """Counts a model and its results; no memory is taken for either."""
    parameters = sorted_parameters(build_shapes(config))
    return ModelSize(
        tensors=len(parameters),
        parameters=sum(p.numel() for p in parameters.values()),
        weights_bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
        result_bytes=result_size(plan_of(parameters, optimizer), quantized=optimizer.quantize_1bit),
    )


def plan_of(parameters: Mapping[str, Tensor], optimizer: Distro) -> TilePlan:
    """How the parameters are tiled in a Psyche run; they may be on the meta device."""
    chunk, topk = optimizer.compression_chunk, optimizer.compression_topk
    return make_plan(
        [ParamSpec(tuple(p.shape), p.dtype, p.device, 0, chunk, topk) for p in parameters.values()], "divisor"
    )


def result_size(plan: TilePlan, *, quantized: bool, step: int = 0, trainer_nonce: int = 0, last_index: int = 0) -> int:
    """Bytes of a complete result's blob (:mod:`~distro_optim.compress.wire`), without making one.

    Args:
        quantized: values are signs.
        last_index: both ends of the batch; each number adds a byte for every 7 bits.
    """
    size = 1 + sum(map(_varint, (step, trainer_nonce, last_index, last_index, len(plan))))
    for grid, k, spec in zip(plan.grids, plan.topk, plan.specs, strict=True):
        shape = grid.coded_shape
        rows = shape[:-1] if len(shape) == 2 else shape[:-2]
        k = k if grid.tiles else 0
        width = index_width(grid.tile_size)
        last = k if width == 8 else k * width
        index_bytes = grid.tiles * k * width
        value_bytes = (grid.tiles * k + 7) // 8 if quantized else grid.tiles * k * spec.dtype.itemsize
        size += _tensor(rows, last, index_bytes) + _tensor(rows, k, value_bytes)
        size += _varint(len(shape)) + sum(map(_varint, shape)) + _varint(grid.tile_size)
    return size


def _tensor(rows: tuple[int, ...], last: int, data: int) -> int:
    dims = sum(_varint(_ZIGZAG * side) for side in (*rows, last))
    return _varint(len(rows) + 1) + dims + _TENSOR_HEAD + _varint(data) + data


def _varint(value: int) -> int:
    return max(1, -(-value.bit_length() // _VARINT_BITS))
