"""The way into a run that a program on Solana coordinates: ``solana:RUN-ID``.

The chain holds the run's state and the public keys of its peers, and no addresses: peers find each other as the
discovery of the endpoint has it, or are named by the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from typing_extensions import override

from ...comm.addresses import EndpointAddr
from ...comm.iroh.sharing.exchange import SharedModels
from ...comm.iroh.sharing.live import LiveSharing
from ...comm.iroh.sharing.transfer import ModelSharing
from ...comm.iroh.swarm import IrohSwarm, topic_of_run
from ...comm.loop import LoopThread
from ...comm.signing import SecretKey
from ...coordinator.solana_options import SolanaOptions
from ...coordinator.ticket_text import SOLANA, run_on_solana
from ...coordinator.types import NodeIdentity
from ...errors import ConfigurationError, ProtocolError
from .joining import NodeOptions, parse_run
from .link import RunLink, RunSource

if TYPE_CHECKING:
    from ...coordinator.solana.participation import Participation

__all__ = ["SolanaRun", "check_run", "participation_in"]


def participation_in(run: str, options: SolanaOptions | None) -> Participation | None:
    """What ``run`` means, if it is a run on Solana; None otherwise. Reads the wallet, and no network.

    Args:
        run: what a user passes as such.
        options: None stands for the defaults.

    Raises:
        ConfigurationError: no run can have this name, an option is wrong, or the options have no use.
        MissingDependencyError: solders is not installed.
    """
    if not isinstance(run, str):
        raise ConfigurationError(
            f"run={run!r}: give the ticket that the host printed (psyche1...), or host:port/run-id, as text",
            name="run",
            value=run,
        )
    try:
        run_id = run_on_solana(run)
    except ProtocolError as error:
        raise ConfigurationError(f"run={run[:40]!r}: {error}", name="run", value=run) from None
    if run_id is None:
        if options is not None:
            raise ConfigurationError(
                f"solana is for runs on Solana ({SOLANA}RUN-ID), and run={run[:40]!r} is none; leave one of the two "
                "out",
                name="solana",
                value=options,
            )
        return None
    from ...coordinator.solana.participation import Participation

    return Participation(run_id, options if options is not None else SolanaOptions())


def check_run(run: str, options: SolanaOptions | None) -> None:
    """Finds mistakes in what a user passes as ``run``, before anything else is done.

    Raises:
        ConfigurationError: it names no run, or an option is wrong.
        MissingDependencyError: see :func:`participation_in`.
    """
    if participation_in(run, options) is None:
        parse_run(run)


class SolanaRun(RunSource):
    """A run on chain. Whatever speaks against joining it is found by :meth:`open`, which pays nothing.

    Args:
        participation: which run, and with what.
        options: our endpoint.
        loop: where the network lives.
    """

    is_host = False

    def __init__(self, participation: Participation, options: NodeOptions, *, loop: LoopThread) -> None:
        self.key: SecretKey = options.key
        self.run_id = participation.run_id
        self._participation = participation
        self._options = options
        self._loop = loop

    @property
    @override
    def identity(self) -> NodeIdentity:
        return self._participation.identity(self.key.public)

    @override
    async def open(self) -> RunLink:
        async with AsyncExitStack() as stack:
            # First, and before our endpoint: what the run says costs little, and may be that we cannot join it.
            coordinator = self._participation.coordinator(self.key.public, on_note=lambda text: self.on_note(text))
            stack.push_async_callback(coordinator.close)
            await coordinator.look()
            await coordinator.check_admission()
            node = await self._options.open(self._loop)
            stack.push_async_callback(node.aclose)
            swarm = IrohSwarm(node, topic_of_run(self.run_id))
            stack.push_async_callback(swarm.aclose)
            models = SharedModels(ModelSharing(node, swarm.publish), swarm, LiveSharing(node, swarm))
            closing = stack.pop_all()

        async def enter() -> None:
            await coordinator.join()

        return RunLink(
            coordinator=coordinator,
            swarm=swarm,
            models=models,
            ticket=f"{SOLANA}{self.run_id}",
            enter=enter,
            fees=lambda: coordinator.fees.spent,
            find_peers=self._find_peers,
            aclose=closing.aclose,
        )

    async def _find_peers(self) -> Sequence[EndpointAddr]:
        return self._options.peers
