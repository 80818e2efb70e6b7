"""PsycheStrategy for ``import pytorch_lightning``, whose classes are others than those of ``lightning.pytorch``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import MissingDependencyError
from .psyche import PsycheStrategy

__all__ = ["PytorchLightningPsycheStrategy"]

try:
    _strategies: Any = import_module("pytorch_lightning.strategies")
except ImportError as error:
    raise MissingDependencyError("pip install pytorch-lightning, or use lightning.pytorch, which is here") from error

_DDPStrategy: Any = _strategies.DDPStrategy


class PytorchLightningPsycheStrategy(PsycheStrategy, _DDPStrategy):  # type: ignore[misc]
    """:class:`~.psyche.PsycheStrategy` for ``pytorch_lightning``."""

    _namespace = "pytorch_lightning"


PytorchLightningPsycheStrategy.register_strategies(_strategies.StrategyRegistry)
