"""PsycheStrategy for ``import lightning.pytorch``."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from .psyche import PsycheStrategy

__all__ = ["LightningPsycheStrategy"]


class LightningPsycheStrategy(PsycheStrategy, DDPStrategy):
    """:class:`~.psyche.PsycheStrategy` for ``lightning.pytorch``."""

    _namespace = "lightning.pytorch"


LightningPsycheStrategy.register_strategies(StrategyRegistry)
