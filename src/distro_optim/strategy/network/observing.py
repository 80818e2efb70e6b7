"""A run that is watched by one that is not in it, because its host lets it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

from typing_extensions import override

from ...comm.iroh.endpoint import Node
from ...comm.iroh.observing.swarm import ObservingSwarm
from ...comm.iroh.sharing.exchange import SharedModels
from ...comm.iroh.sharing.live import LiveSharing
from ...comm.iroh.sharing.transfer import ModelSharing
from ...comm.iroh.swarm import topic_of_run
from ...comm.streams import Stream
from ...coordinator.client.remote import RemoteCoordinator
from ...coordinator.rules.checkpoints import is_run_of_psyche
from ...coordinator.ticket import connector
from ...coordinator.watchers import ask_who_watches
from ...errors import ConfigurationError, DistroError, JoinRefusedError
from .joining import SILENCE_SECONDS, JoinedRun
from .link import RunLink

__all__ = ["ObservedRun"]


class ObservedRun(JoinedRun):
    """A run of our own kind, seen from outside. Its arguments are those of :class:`.JoinedRun`.

    It is not looked for elsewhere when its host is gone: the watching ends then.
    """

    watches = True

    @override
    async def open(self) -> RunLink:
        async with AsyncExitStack() as stack:
            node = await self._options.open(self._loop)
            stack.push_async_callback(node.aclose)
            way = connector(self._ticket, node)
            coordinator = RemoteCoordinator(
                way,
                self.key,
                self.run_id,
                name=self._name,
                silence=SILENCE_SECONDS,
                give_up_after=self._patience,
            )
            coordinator.on_told = lambda text: self.on_note(text)
            stack.push_async_callback(coordinator.close)
            node.addresses.add(self._ticket.peers)
            if self._ticket.endpoint is not None:
                node.addresses.add(self._ticket.endpoint)
            try:
                state = await self._advised(coordinator.look())
            except JoinRefusedError as error:
                if error.hosted is not None:
                    raise
                raise self._not_permitted() from error
            if is_run_of_psyche(state):
                raise ConfigurationError(
                    f"the run {self.run_id!r} is one of Psyche's, whose clients turn everybody away that is not in its "
                    "epoch: audit as a member, by distro-optim join --audit 1",
                    name="run",
                )
            await self._check_permission(way)
            await self._introduce(node)
            swarm = ObservingSwarm(node, topic_of_run(self.run_id))
            stack.push_async_callback(swarm.aclose)
            models = SharedModels(ModelSharing(node, swarm.publish), swarm, LiveSharing(node, swarm))
            closing = stack.pop_all()
        return RunLink(
            coordinator=coordinator,
            swarm=swarm,
            models=models,
            ticket=str(self._ticket),
            enter=lambda: self._find_some(node),
            find_peers=lambda: self._find_peers(node),
            aclose=closing.aclose,
        )

    async def _check_permission(self, way: Callable[[], Awaitable[Stream]]) -> None:
        """Raises JoinRefusedError unless the host lets us watch."""
        stream = await way()
        try:
            watchers = await ask_who_watches(stream, self.key)
        finally:
            await stream.close()
        if watchers is None or self.key.public not in watchers:
            raise self._not_permitted()

    def _not_permitted(self) -> JoinRefusedError:
        key = self.key.public.hex()
        return JoinRefusedError(
            f"the host of {self.run_id!r} does not let this key watch: {key}. Send it to whoever hosts the run, who "
            f'starts it with RunConfig(observers=["{key}"]), or with distro-optim serve --observer {key}; or audit as '
            "a member: distro-optim join --audit 1",
            wanted=self.run_id,
        )

    async def _find_some(self, node: Node) -> None:
        with suppress(DistroError, OSError):  # it is asked again when we look for peers
            await self._ask_where(node)
