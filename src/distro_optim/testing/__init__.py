"""Checks that every implementation of our interfaces must pass, ours and yours, and doubles to test your code with.

Exchanges (:class:`distro_optim.Exchange`):

======================  ==========================================================================================
``check_exchange``      runs the contract of an exchange, all peers in one process
``check_peer``          the same from one peer, where each has a process of its own
``step_together``       one step of several optimizers in one thread
``random_update``       an update as gradients could have made it
``same_update``         whether two updates say the same
======================  ==========================================================================================

Swarms (:class:`~distro_optim.comm.swarm.Swarm`):

======================  ==========================================================================================
``SWARM_CHECKS``        the contract of a swarm, each check to be awaited with a fresh arena
``SwarmArena``          what the checks ask of your swarm
``MemoryNetwork``       peers of one process, with latency, loss, partitions and liars
``MemorySwarm``         one of them
======================  ==========================================================================================

Coordinator clients (:class:`~distro_optim.coordinator.client.interface.CoordinatorClient`):

======================  ==========================================================================================
``COORDINATOR_CHECKS``  the contract of a client, each check to be awaited with a fresh arena
``CoordinatorArena``    what the checks ask of your client
``DUMMY_CONFIG``        the quick run that they expect,
``dummy_run``           and its state before anybody has joined
======================  ==========================================================================================

Token providers (:class:`~distro_optim.data.provider.TokenProvider`):

======================  ==========================================================================================
``TOKEN_DATA_CHECKS``   the contract of a provider, each check to be called with a fresh arena
``TokenDataArena``      what the checks ask of your provider
======================  ==========================================================================================

Psyche's programs on Solana, without a cluster:

======================  ==========================================================================================
``Validator``           accounts, a clock and fees; takes transactions and answers like a cluster
``ValidatorServer``     the same on a port of this machine, with faults to inject
``CoordinatorTwin``     the rules of the coordinator program alone
======================  ==========================================================================================

Networks:

======================  ==========================================================================================
``RelayServer``         passes datagrams between iroh endpoints on this machine
======================  ==========================================================================================

A run with many peers, in virtual time:

======================  ==========================================================================================
``simulate``            one run over a simulated network: what a round takes, and what it costs each peer
``SimulationOptions``   how many peers, over which lines, with which trouble
======================  ==========================================================================================

Where they lie:

======================  ==========================================================================================
``exchange``            the contract of an exchange
``lockstep``            several optimizers in one thread, in the same order every time
``updates``             random updates
``launches``            counts what a step would ask of a GPU
``swarm_checks``        the contract of a swarm
``swarm``               the swarm of one process
``model_exchange``      models shared within one process
``coordinator``         the contract of a coordinator's client
``free_rider``          a peer that does not train, to try audits with; runs a script
``relay``               the relay server, in iroh's protocol
``psyche_twin``         a client of Psyche's, without I/O, to train beside ours
``token_data``          the contract of a provider
``solana``              a folder: the programs and the cluster around them
``simulation``          a folder: the simulated run, its network and its peers
``simulating``          ``simulate``, and the command
======================  ==========================================================================================

Names are imported when first used: testing an exchange needs neither the swarm nor the coordinator.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
"""True for type checkers, as in typing, which would cost more to import than all of this."""

if TYPE_CHECKING:
    from .coordinator import CHECKS as COORDINATOR_CHECKS
    from .coordinator import DUMMY_CONFIG, dummy_run
    from .coordinator import Arena as CoordinatorArena
    from .exchange import check_exchange, check_peer
    from .lockstep import step_together
    from .relay import RelayServer
    from .simulating import simulate
    from .simulation.settings import SimulationOptions
    from .solana.coordinator_twin import CoordinatorTwin
    from .solana.server import ValidatorServer
    from .solana.validator import Validator
    from .swarm import MemoryNetwork, MemorySwarm
    from .swarm_checks import CHECKS as SWARM_CHECKS
    from .swarm_checks import SwarmArena
    from .token_data import CHECKS as TOKEN_DATA_CHECKS
    from .token_data import TokenDataArena
    from .updates import random_update, same_update

__all__ = [
    "COORDINATOR_CHECKS",
    "DUMMY_CONFIG",
    "SWARM_CHECKS",
    "TOKEN_DATA_CHECKS",
    "CoordinatorArena",
    "CoordinatorTwin",
    "MemoryNetwork",
    "MemorySwarm",
    "RelayServer",
    "SimulationOptions",
    "SwarmArena",
    "TokenDataArena",
    "Validator",
    "ValidatorServer",
    "check_exchange",
    "check_peer",
    "dummy_run",
    "random_update",
    "same_update",
    "simulate",
    "step_together",
]

_HOMES = {
    "COORDINATOR_CHECKS": ("coordinator", "CHECKS"),
    "CoordinatorArena": ("coordinator", "Arena"),
    "CoordinatorTwin": ("solana.coordinator_twin", "CoordinatorTwin"),
    "DUMMY_CONFIG": ("coordinator", "DUMMY_CONFIG"),
    "MemoryNetwork": ("swarm", "MemoryNetwork"),
    "MemorySwarm": ("swarm", "MemorySwarm"),
    "SWARM_CHECKS": ("swarm_checks", "CHECKS"),
    "RelayServer": ("relay", "RelayServer"),
    "SimulationOptions": ("simulation.settings", "SimulationOptions"),
    "SwarmArena": ("swarm_checks", "SwarmArena"),
    "TOKEN_DATA_CHECKS": ("token_data", "CHECKS"),
    "TokenDataArena": ("token_data", "TokenDataArena"),
    "Validator": ("solana.validator", "Validator"),
    "ValidatorServer": ("solana.server", "ValidatorServer"),
    "check_exchange": ("exchange", "check_exchange"),
    "check_peer": ("exchange", "check_peer"),
    "dummy_run": ("coordinator", "dummy_run"),
    "random_update": ("updates", "random_update"),
    "same_update": ("updates", "same_update"),
    "simulate": ("simulating", "simulate"),
    "step_together": ("lockstep", "step_together"),
}
"""Public name -> the module that defines it, and its name there."""


def __getattr__(name: str) -> object:
    try:
        module, original = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(import_module(f".{module}", __name__), original)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
