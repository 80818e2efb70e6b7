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
    from .comm.iroh.blobs.disk import DiskStore as DiskStore
    from .comm.iroh.blobs.net import BlobService as BlobService
    from .comm.iroh.blobs.store import MemoryStore as MemoryStore
    from .comm.iroh.endpoint import Node as Node
    from .comm.iroh.gossip.net import GossipService as GossipService
    from .comm.iroh.swarm import IrohSwarm as IrohSwarm
    from .comm.memory import MemoryExchange as MemoryExchange
    from .comm.process_group import ProcessGroupExchange as ProcessGroupExchange
    from .comm.signing import SecretKey as SecretKey
    from .coordinator.client import RemoteCoordinator as RemoteCoordinator
    from .coordinator.embedded import EmbeddedCoordinator as EmbeddedCoordinator
    from .coordinator.server import CoordinatorServer as CoordinatorServer
    from .coordinator.ticket import RunTicket as RunTicket
    from .optimizer import DisTrO as DisTrO
    from .strategy.config import RunConfig as RunConfig
    from .strategy.psyche import PsycheStrategy as PsycheStrategy
    from .strategy.session import SwarmSession as SwarmSession

__all__ = [
    "BlobService",
    "CoordinatorServer",
    "DisTrO",
    "DiskStore",
    "EmbeddedCoordinator",
    "Exchange",
    "GossipService",
    "IrohSwarm",
    "MemoryExchange",
    "MemoryStore",
    "Node",
    "ProcessGroupExchange",
    "PsycheStrategy",
    "RemoteCoordinator",
    "RunConfig",
    "RunTicket",
    "SecretKey",
    "SwarmSession",
]
__version__ = "0.1.0"

# public name -> the module that defines it
_HOMES = {
    "BlobService": "distro_optim.comm.iroh.blobs.net",
    "CoordinatorServer": "distro_optim.coordinator.server",
    "DisTrO": "distro_optim.optimizer",
    "DiskStore": "distro_optim.comm.iroh.blobs.disk",
    "EmbeddedCoordinator": "distro_optim.coordinator.embedded",
    "Exchange": "distro_optim.comm.exchange",
    "GossipService": "distro_optim.comm.iroh.gossip.net",
    "IrohSwarm": "distro_optim.comm.iroh.swarm",
    "MemoryExchange": "distro_optim.comm.memory",
    "MemoryStore": "distro_optim.comm.iroh.blobs.store",
    "Node": "distro_optim.comm.iroh.endpoint",
    "ProcessGroupExchange": "distro_optim.comm.process_group",
    "PsycheStrategy": "distro_optim.strategy.psyche",
    "RemoteCoordinator": "distro_optim.coordinator.client",
    "RunConfig": "distro_optim.strategy.config",
    "RunTicket": "distro_optim.coordinator.ticket",
    "SecretKey": "distro_optim.comm.signing",
    "SwarmSession": "distro_optim.strategy.session",
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
