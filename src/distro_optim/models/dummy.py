"""The model of Psyche's test runs: it has parameters, trains nothing, and its loss is always 1.

With ``optimizer = "Dummy"`` its results are empty, and a client needs no tensors at all (PsycheFoundation/psyche
``shared/modeling/src/dummy.rs``, ``config/test/state.toml``).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["DUMMY_PARAMETERS", "DummyModel"]

DUMMY_PARAMETERS: Final = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.norm.weight",
)
"""Names of its tensors, each of one float32 zero."""


class DummyModel(nn.Module):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        for name in DUMMY_PARAMETERS:
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.zeros(1)))

    @override
    def forward(self, batch: object = None) -> Tensor:
        """The loss, 0-D: 1, whatever the batch, with gradients of 0."""
        return sum((p.sum() * 0.0 for p in self.parameters()), torch.ones(()))
