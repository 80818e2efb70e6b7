"""How large a model is, and what it sends each round, without the model: from its shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..buffer import Writer
from ..compress import ParamSpec, TilePlan, make_plan
from ..compress.wire import encode_download_head
from ..compress.wire_layout import KnownLayouts
from ..coordinator.model import Distro
from ..errors import ConfigurationError
from .building import build_shapes, sorted_parameters
from .config import LanguageModelConfig

__all__ = ["ModelSize", "model_size", "plan_of", "result_size"]


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
        [ParamSpec(tuple(p.shape), p.dtype, p.device, 0, chunk, topk) for p in parameters.values()],
        "divisor",
        arithmetic="psyche",
    )


def result_size(plan: TilePlan, *, quantized: bool, step: int = 0, trainer_nonce: int = 0, last_index: int = 0) -> int:
    """Bytes of a complete result's blob (:mod:`~distro_optim.compress.wire`), without making one.

    Args:
        quantized: values are signs.
        last_index: both ends of the batch; each number adds a byte for every 7 bits.

    Raises:
        ConfigurationError: the wire cannot hold it.
    """
    layout = plan.derived(KnownLayouts).complete(quantized=quantized)
    if layout is None:
        raise ConfigurationError("the wire cannot hold results of these tensors", name="plan")
    head = Writer()
    batch_id = last_index, last_index
    encode_download_head(head, step=step, trainer_nonce=trainer_nonce, batch_id=batch_id, count=len(plan))
    return len(head) + layout.size
