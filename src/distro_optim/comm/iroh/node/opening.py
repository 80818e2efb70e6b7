"""How an endpoint is opened: at which ports it listens, which relay servers and lookups it uses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from ....errors import ConfigurationError, ExchangeError, PeerTimeoutError
from ...addresses import EndpointAddr, SocketAddr
from ...signing import SecretKey
from ..ffi import load_iroh
from ..home import Ports
from ..reach import Discovery, Relays
from ..stream_ends import translate_errors

__all__ = ["FAREWELL_SECONDS", "USUAL_PORT_SECONDS", "Opener", "close_quietly", "sockets_of"]

_log = logging.getLogger(__name__)

USUAL_PORT_SECONDS: Final = 3.0
"""How long to try for a port that was ours before; longer than an endpoint takes to close."""

FAREWELL_SECONDS: Final = 0.8
"""For an endpoint to tell its peers that it leaves, out of the two seconds that closing a node may take."""

_USUAL_PORT_PAUSE: Final = 0.1
_TOLD_SECONDS: Final = 2.0
_TOLD_PAUSE: Final = 0.01


class Opener:
    """Opens the endpoints of one node.

    Args:
        secret_key: of all of them.
        bind_addr: where the first one listens for IPv4; see :class:`~distro_optim.comm.iroh.endpoint.Node`.
        usual_ports: those that it takes in place of any, as far as they are free.
        relays: its relay servers.
        discovery: where its address is published and looked up.
        external: where else others reach it.

    Raises:
        ConfigurationError: ``bind_addr`` is not an IPv4 address.
    """

    def __init__(
        self,
        secret_key: SecretKey,
        bind_addr: str,
        *,
        usual_ports: Ports | None,
        relays: Relays,
        discovery: Discovery,
        external: Sequence[SocketAddr],
    ) -> None:
        self._secret_key = secret_key
        self._bind_addr = SocketAddr.parse(bind_addr)
        if self._bind_addr.ip.version != 4:
            raise ConfigurationError(
                f"bind_addr must be an IPv4 address, got {bind_addr}; IPv6 is listened on beside it",
                name="bind_addr",
                value=bind_addr,
            )
        self._usual_ports = usual_ports if self._bind_addr.port == 0 else None
        self._relays = relays
        self._discovery = discovery
        self._external = tuple(external)

    async def open(self, alpns: Sequence[bytes]) -> Any:
        """The first endpoint, at the usual ports if they are free; it says so if they are not.

        Those of a session that this process has just closed become free a moment later.

        Raises:
            ExchangeError: the address is taken, or the like.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + USUAL_PORT_SECONDS
        *usual, any_port = self._binds()
        while usual:
            for binds in usual:
                try:
                    return await self._open_at(binds, alpns)
                except ExchangeError as error:
                    _log.debug("cannot listen at %s: %s", binds, error)
            if loop.time() >= until:
                _log.warning(
                    "UDP port %s, where this endpoint listened before, is taken: it listens at another one, so that "
                    "tickets from before lead here through relay servers or the public lookup only; end what has the "
                    "port (ss -ulpn shows it), or hand out a fresh ticket",
                    usual[0][0].rpartition(":")[2],
                )
                break
            await asyncio.sleep(_USUAL_PORT_PAUSE)
        return await self._open_at(any_port, alpns)

    async def open_beside(self, alpns: Sequence[bytes]) -> Any:
        """Another endpoint with the same key, at any port; it has no relay server and is published nowhere."""
        host = self._bind_addr.ip
        _log.debug("another endpoint is opened beside the first")
        return await self._open_at([f"{host}:0", *(["[::1]:0"] if host.is_loopback else [])], alpns, alone=True)

    async def tell_external(self, endpoint: Any, addr: Callable[[], EndpointAddr]) -> None:
        """Tells the endpoint its external addresses, and waits until they are among its own: a ticket that is made at
        once is to have them.

        Args:
            endpoint: the first one.
            addr: its address at the moment.
        """
        with translate_errors():
            for external in self._external:
                await endpoint.add_external_addr(str(external))
        with suppress(TimeoutError):
            async with asyncio.timeout(_TOLD_SECONDS):
                while not set(self._external) <= set(addr().direct):
                    await asyncio.sleep(_TOLD_PAUSE)
        if self._external and self._bind_addr.port == 0:
            # A port that is taken at random is hardly the one that somebody forwards to.
            _log.warning(
                "others are told to reach us at %s, but we listen on a port taken at random (%s): choose one with "
                "bind_addr='0.0.0.0:PORT' or --bind-p2p-port PORT, and let the router forward to it",
                ", ".join(map(str, self._external)),
                ", ".join(str(socket) for socket in sockets_of(endpoint) if socket.ip.version == 4),
            )

    async def _open_at(self, binds: Sequence[str], alpns: Sequence[bytes], *, alone: bool = False) -> Any:
        iroh = load_iroh()
        options = iroh.EndpointOptions(preset=self._preset(iroh, binds, alone=alone), alpns=list(alpns))
        with translate_errors():
            return await iroh.Endpoint.bind(options)

    def _binds(self) -> list[list[str]]:
        """Addresses to listen at, the better ones first."""
        host, loopback = self._bind_addr.ip, self._bind_addr.ip.is_loopback
        # Otherwise the package listens on all IPv6 addresses although the user asked for loopback.
        any_port = [str(self._bind_addr), *(["[::1]:0"] if loopback else [])]
        if self._usual_ports is None:
            return [any_port]
        port, port6 = self._usual_ports
        usual = f"{host}:{port}"
        both = [[usual, f"{'[::1]' if loopback else '[::]'}:{port6}"]] if port6 else []
        return [*both, [usual, *any_port[1:]], any_port]

    def _preset(self, iroh: Any, binds: Sequence[str], *, alone: bool) -> Any:
        """What an endpoint is to be like; one that is ``alone`` has no relay server and publishes nothing."""
        relays, discovery, secret_key = self._relays, self._discovery, self._secret_key.to_bytes()

        class Settings(iroh.Preset):  # type: ignore[misc]
            def apply(self, builder: Any) -> None:
                if discovery == "n0" and not alone:
                    builder.apply_n0()
                else:
                    builder.apply_minimal()
                if relays == "none" or alone:
                    builder.relay_mode(iroh.RelayMode.disabled())
                elif relays == "default":
                    builder.relay_mode(iroh.RelayMode.default_mode())
                else:
                    builder.relay_mode(iroh.RelayMode.custom_from_urls(list(relays)))
                builder.secret_key(secret_key)
                for bind in binds:
                    builder.bind_addr(bind)

        return Settings()


def sockets_of(endpoint: Any) -> tuple[SocketAddr, ...]:
    """Where an endpoint listens."""
    return tuple(SocketAddr.parse(text) for text in endpoint.bound_sockets())


async def close_quietly(endpoint: Any) -> None:
    """Closes an endpoint within :data:`FAREWELL_SECONDS`; what fails in that is of no use to anybody any more."""
    try:
        async with asyncio.timeout(FAREWELL_SECONDS):
            with translate_errors():
                await endpoint.close()
    except (TimeoutError, PeerTimeoutError):
        _log.debug("some peers did not acknowledge the close in time")
    except ExchangeError as error:
        _log.debug("closing the endpoint: %s", error)
