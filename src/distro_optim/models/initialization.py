"""The first weights of a new Llama or dense DeepSeek, as Psyche's runs begin with them.

The "Mitchell" scheme of OLMo (Groeneveld et al., 2024, arXiv:2402.00838; allenai/OLMo ``InitFnType.mitchell``): normal
numbers with a standard deviation of 1 / sqrt(inputs), cut off at three of them; projections that write back to the
residual stream shrink with depth. For DeepSeek's compressed queries, keys and values as PsycheFoundation/psyche
``scripts/push-new-model-hf.py`` has it.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from .config import LanguageModelConfig

__all__ = ["initialize"]

_CUTOFF: Final = 3.0
"""Standard deviations (``cutoff_factor``)."""

_RESIDUAL: Final = ("self_attn.o_proj", "mlp.down_proj")
"""Their outputs are added to the residual stream."""


@torch.no_grad()
def initialize(model: nn.Module, config: LanguageModelConfig, generator: torch.Generator) -> None:
    """Fills all parameters of a Llama or a dense DeepSeek-V3, in the order of their names.

    Args:
        generator: on the device of the parameters.
    """
    for name in sorted(dict(model.named_parameters()), key=str.encode):
        param = model.get_parameter(name)
        if name.endswith(".bias"):
            param.zero_()
        elif param.dim() == 1:
            param.fill_(1.0)  # the scale of a norm
        else:
            _normal(param, _deviation(name, param, int(config.values["hidden_size"])), generator)


def _deviation(name: str, weight: Tensor, hidden: int) -> float:
    if not name.startswith("model.layers."):
        return 1 / math.sqrt(hidden)
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    if part in _RESIDUAL:
        # Psyche's script takes the hidden size for o_proj, also where the heads together are wider.
        inputs = hidden if part == "self_attn.o_proj" else weight.shape[1]
        return 1 / math.sqrt(2 * inputs * (int(layer) + 1))
    return 1 / math.sqrt(weight.shape[1])


def _normal(weight: Tensor, deviation: float, generator: torch.Generator) -> None:
    cutoff = _CUTOFF * deviation
    weight.normal_(0.0, deviation, generator=generator).clamp_(-cutoff, cutoff)
