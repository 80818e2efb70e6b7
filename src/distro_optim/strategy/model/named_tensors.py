"""The tensors of a model by name: what its optimizer trains, what stays as it is, and what the model counts besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError
from ...optimizer import DisTrO
from ..ranks.holders import Holders

__all__ = ["NamedTensors"]

_WRAPPERS: Final = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put into names; Psyche takes them out as well
(``shared/modeling/src/python_causal_lm.rs``)."""


@dataclass(frozen=True)
class NamedTensors:
    """Each tensor once, under its first name.

    Attributes:
        trained: the optimizer's parameters, in its order.
        frozen: parameters that it does not have, in the model's order.
        buffers: persistent ones, such as the statistics of BatchNorm. Each peer counts its own.
        holders: who has them.
    """

    trained: Mapping[str, Tensor]
    frozen: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    holders: Holders = field(default_factory=Holders)

    @classmethod
    def of(cls, model: nn.Module, optimizer: DisTrO, holders: Holders | None = None) -> NamedTensors:
        """The tensors of ``model``, of which ``optimizer`` trains some; ``holders`` where they are shards.

        Raises:
            ConfigurationError: the optimizer has a parameter that the model has not, or two have the same name.
        """
        holders = holders or Holders()
        holders.settle(model)
        named = {id(tensor): plain_name(name) for name, tensor in model.named_parameters()}
        if len(set(named.values())) != len(named):
            raise ConfigurationError("two parameters of the model have the same name", name="model")
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for number, param in enumerate(params):
            if id(param) not in named:
                raise ConfigurationError(
                    f"parameter {number} of the optimizer, shape {tuple(param.shape)}, is not in the model: make the "
                    "optimizer from the parameters of the very model that you pass",
                    name="optimizer",
                )
        trained = {named[id(param)]: param for param in params}
        frozen = {
            plain_name(name): tensor for name, tensor in model.named_parameters() if plain_name(name) not in trained
        }
        saved = model.state_dict(keep_vars=True).keys()
        buffers = {plain_name(name): tensor for name, tensor in model.named_buffers() if name in saved}
        return cls(trained, frozen, buffers, holders)

    @property
    def all(self) -> dict[str, Tensor]:
        """All of them: trained, frozen, buffers."""
        return {**self.trained, **self.frozen, **self.buffers}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copies ``values`` into the tensors of the same names and shapes; the other tensors stay as they are."""
        for name, tensor in self.all.items():
            if name in values:
                self.holders.fill(tensor, values[name])

    def copies(self) -> dict[str, Tensor]:
        """Copies of all of them, on the CPU and contiguous."""
        return {name: self.holders.copy(tensor) for name, tensor in self.all.items()}


def plain_name(name: str) -> str:
    """``name`` without what wrappers have put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
