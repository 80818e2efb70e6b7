"""Train neural networks over the open internet from an ordinary PyTorch script.

    >>> from distro_optim import DisTrO
    >>> optimizer = DisTrO(model.parameters(), lr=4e-4)  # in place of AdamW; under torchrun: a few bits per parameter

Names are imported when first used, so that ``import distro_optim`` stays cheap and needs none of lightning,
iroh or transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comm.exchange import Exchange as Exchange
    from .comm.memory import MemoryExchange as MemoryExchange
    from .comm.process_group import ProcessGroupExchange as ProcessGroupExchange
    from .optimizer import DisTrO as DisTrO

__all__ = ["DisTrO", "Exchange", "MemoryExchange", "ProcessGroupExchange"]
__version__ = "0.1.0"

# public name -> the module that defines it
_HOMES = {
    "DisTrO": "distro_optim.optimizer",
    "Exchange": "distro_optim.comm.exchange",
    "MemoryExchange": "distro_optim.comm.memory",
    "ProcessGroupExchange": "distro_optim.comm.process_group",
}


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
