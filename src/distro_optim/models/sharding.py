"""A language model in shards, for devices none of which could hold it.

A mesh of ``data x tensor`` processes holds it together, one device each. Over ``data`` the weights are cut by FSDP2,
which puts a layer together while it is computed, and different samples are trained; over ``tensor`` the matrices of a
layer are cut, and the processes compute the same samples together. Which matrices, is as in Psyche
(``shared/modeling/src/models/llama.rs``): queries, keys, values, gate and up by their rows, the projections behind them
by their columns, and the rest is whole.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ConfigurationError
from ..optim.sharding import check_fsdp2
from .building import build_empty
from .causal_lm import CausalLM
from .config import LanguageModelConfig

__all__ = ["DATA", "TENSOR", "build_in_shards", "check_sharding"]

DATA: Final = "data"
"""The dimension of the mesh whose processes train different samples."""

TENSOR: Final = "tensor"
"""The dimension whose processes compute the same samples together."""

_COLUMNS: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWS: Final = ("self_attn.o_proj", "mlp.down_proj")
_FAMILIES: Final = frozenset({"llama", "seed_oss"})
"""Whose attention is in parts of these names, and counts its heads by the rows of its matrices."""


def check_sharding(*, tensor: int, config: LanguageModelConfig | None = None) -> None:
    """Raises if models cannot be sharded here, or the model of ``config`` cannot.

    Args:
        tensor: processes that compute the same samples together.

    Raises:
        MissingDependencyError: PyTorch has no FSDP2.
        ConfigurationError: the model has other parts, or its heads cannot be dealt out.
    """
    check_fsdp2()
    if config is None or tensor == 1:
        return
    if config.model_type not in _FAMILIES:
        raise ConfigurationError(
            f"--tensor-parallelism {tensor}: it is for models of the family Llama, and this is a "
            f"{config.model_type!r}: cut it with --shard and --data-parallelism alone",
            name="tensor_parallelism",
            value=tensor,
        )
    made = config.to_transformers()
    for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(made, what)
        if count % tensor:
            raise ConfigurationError(
                f"--tensor-parallelism {tensor} does not divide the {what} of the model, {count}: give a number that "
                "does",
                name="tensor_parallelism",
                value=tensor,
            )


def build_in_shards(
    config: LanguageModelConfig, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> CausalLM:
    """This process's part of the model, its parameters without values. All processes of the mesh must call.

    No tensor is ever whole on the way.

    Args:
        mesh: with the dimensions :data:`DATA` and :data:`TENSOR`.
        device: of this process.

    Raises:
        ModelConfigError: no model can be made of ``config``.
        MissingDependencyError, ConfigurationError: as :func:`check_sharding`.
    """
    check_sharding(tensor=mesh[TENSOR].size(), config=config)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    network: Any = build_empty(config, device, dtype, parameters="meta")
    layers = network.model.layers
    if mesh[TENSOR].size() > 1:
        styles: dict[str, Any] = {
            **{name: ColwiseParallel() for name in _COLUMNS},
            **{name: RowwiseParallel() for name in _ROWS},
        }
        for layer in layers:
            parallelize_module(layer, mesh[TENSOR], styles)
    if mesh[DATA].size() > 1:
        # Sums over processes in float32, as Psyche has them (reduce_dtype).
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, mesh=mesh[DATA], mp_policy=policy)
        fully_shard(network, mesh=mesh[DATA], mp_policy=policy)

    def in_memory(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    network._apply(in_memory)
    return CausalLM.around(config, network)
