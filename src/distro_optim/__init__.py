"""Train neural networks over the open internet from an ordinary PyTorch script.

    >>> from distro_optim import DisTrO
    >>> optimizer = DisTrO(model.parameters(), lr=4e-4)  # in place of AdamW

Under torchrun the processes then exchange a few bits per hundred parameters.

Names are imported when first used, so that ``import distro_optim`` stays cheap and needs none of lightning,
iroh or transformers.
"""

from __future__ import annotations

from importlib import import_module

from ._version import __version__ as __version__

TYPE_CHECKING = False
"""True for type checkers, as in typing: importing typing would be most of what ``import distro_optim`` costs."""

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
    from .coordinator.client.remote import RemoteCoordinator as RemoteCoordinator
    from .coordinator.server.embedded import EmbeddedCoordinator as EmbeddedCoordinator
    from .coordinator.server.server import CoordinatorServer as CoordinatorServer
    from .coordinator.solana_options import SolanaOptions as SolanaOptions
    from .coordinator.ticket import RunTicket as RunTicket
    from .data.lightning import TokenDataModule as TokenDataModule
    from .data.opening import open_token_data as open_token_data
    from .data.provider import TokenProvider as TokenProvider
    from .data.token_files import TokenFiles as TokenFiles
    from .integrations.huggingface import SwarmTrainer as SwarmTrainer
    from .integrations.huggingface import SwarmTraining as SwarmTraining
    from .models.causal_lm import CausalLM as CausalLM
    from .models.lightning_module import PsycheCausalLM as PsycheCausalLM
    from .optimizer import DisTrO as DisTrO
    from .strategy.config import RunConfig as RunConfig
    from .strategy.fabric import FabricPsycheStrategy as FabricPsycheStrategy
    from .strategy.network.runtime import Runtime as Runtime
    from .strategy.port import RunView as RunView
    from .strategy.psyche import PsycheStrategy as PsycheStrategy
    from .strategy.psyche_lightning import LightningPsycheStrategy as LightningPsycheStrategy
    from .strategy.psyche_pytorch_lightning import PytorchLightningPsycheStrategy as PytorchLightningPsycheStrategy
    from .strategy.round import Round as Round
    from .strategy.session import SwarmSession as SwarmSession
    from .strategy.upload import Upload as Upload

__all__ = [
    "BlobService",
    "CausalLM",
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
    "Round",
    "RunConfig",
    "RunTicket",
    "RunView",
    "Runtime",
    "SecretKey",
    "SolanaOptions",
    "SwarmSession",
    "TokenFiles",
    "TokenProvider",
    "Upload",
    "open_token_data",
]

_HOMES = {
    "BlobService": "distro_optim.comm.iroh.blobs.net",
    "CausalLM": "distro_optim.models.causal_lm",
    "CoordinatorServer": "distro_optim.coordinator.server.server",
    "DiskStore": "distro_optim.comm.iroh.blobs.disk",
    "DisTrO": "distro_optim.optimizer",
    "EmbeddedCoordinator": "distro_optim.coordinator.server.embedded",
    "Exchange": "distro_optim.comm.exchange",
    "FabricPsycheStrategy": "distro_optim.strategy.fabric",
    "GossipService": "distro_optim.comm.iroh.gossip.net",
    "IrohSwarm": "distro_optim.comm.iroh.swarm",
    "LightningPsycheStrategy": "distro_optim.strategy.psyche_lightning",
    "MemoryExchange": "distro_optim.comm.memory",
    "MemoryStore": "distro_optim.comm.iroh.blobs.store",
    "Node": "distro_optim.comm.iroh.endpoint",
    "open_token_data": "distro_optim.data.opening",
    "ProcessGroupExchange": "distro_optim.comm.process_group",
    "PsycheCausalLM": "distro_optim.models.lightning_module",
    "PsycheStrategy": "distro_optim.strategy.psyche",
    "PytorchLightningPsycheStrategy": "distro_optim.strategy.psyche_pytorch_lightning",
    "RemoteCoordinator": "distro_optim.coordinator.client.remote",
    "Round": "distro_optim.strategy.round",
    "RunConfig": "distro_optim.strategy.config",
    "RunTicket": "distro_optim.coordinator.ticket",
    "Runtime": "distro_optim.strategy.network.runtime",
    "RunView": "distro_optim.strategy.port",
    "SecretKey": "distro_optim.comm.signing",
    "SolanaOptions": "distro_optim.coordinator.solana_options",
    "SwarmSession": "distro_optim.strategy.session",
    "SwarmTrainer": "distro_optim.integrations.huggingface",
    "SwarmTraining": "distro_optim.integrations.huggingface",
    "TokenDataModule": "distro_optim.data.lightning",
    "TokenFiles": "distro_optim.data.token_files",
    "TokenProvider": "distro_optim.data.provider",
    "Upload": "distro_optim.strategy.upload",
}
"""Public name -> the module that defines it. Those that need Lightning or transformers' Trainer are not in
__all__: a star would import it."""

_RUN = "DISTRO_OPTIM_RUN"
"""That of ``strategy/environment.py``, which takes long to import."""


def __getattr__(name: str) -> object:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    _look_at_ticket()
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def _look_at_ticket() -> None:
    """Ends a script whose environment names a run by what names none, before seconds go by with imports.

    In one line, since a traceback would only show the script's import statement. A prompt or a notebook, which are not
    to be ended, get the exception.

    Raises:
        SystemExit: with status 2, as for other wrong usage.
        ConfigurationError: in a prompt.
    """
    import os

    text = os.environ.get(_RUN, "")
    if not text.strip():
        return
    from .coordinator.ticket_text import WHAT_TO_COPY, check_text
    from .errors import ConfigurationError, ProtocolError

    try:
        check_text(text)
    except ProtocolError as error:
        import sys

        message = f"{_RUN} does not name a run: {error}. {WHAT_TO_COPY}"
        if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules:
            raise ConfigurationError(message, name=_RUN, value=text) from None
        print(f"distro_optim: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
