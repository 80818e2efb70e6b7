"""One string that says which run to join and where.

``psyche1`` and, in base32 (RFC 4648, lower case, no padding): the first 4 bytes of the SHA-256 of what follows, then
the postcard of run, TCP addresses and iroh endpoint, and of some more peers, if any are known: those lead to whoever
hosts when the host is gone. Without them it is the form that older versions read. The other form,
``host:port/run-id``, can be typed, and is all that a centralized coordinator of Psyche needs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

from typing_extensions import override

from ..comm.addresses import EndpointAddr
from ..comm.postcard import Limit, decode, encode
from ..comm.streams import Stream, open_tcp, split_address
from ..errors import ConfigurationError, ProtocolError
from .ticket_text import decode_text, encode_text, pasted
from .types import RUN_ID_MAX_LEN

if TYPE_CHECKING:  # the iroh package is only needed to dial through it
    from ..comm.iroh.endpoint import Node

__all__ = ["RunTicket", "connector"]

MAX_TCP_ADDRESSES: Final = 8

TCP_SECONDS: Final = 1.0
"""For an address to answer if there is another way to try: where packets are dropped without a word, the system would
wait for minutes. Chosen above the round trip of any line that is of use."""

MAX_PEERS: Final = 4
"""Of a ticket; each takes some 80 characters of it. Chosen arbitrarily."""


@dataclass(frozen=True)
class RunTicket:
    """Which run, and the ways to its coordinator, best first.

    Attributes:
        run_id: the run.
        tcp: addresses ``host:port``.
        endpoint: where its iroh endpoint is, if it has one.
        peers: where some peers of the run are.

    Raises:
        ConfigurationError: no run, no way, or an address that is not ``host:port``.
    """

    run_id: Annotated[str, Limit(RUN_ID_MAX_LEN)]
    tcp: Annotated[tuple[Annotated[str, Limit(255)], ...], Limit(MAX_TCP_ADDRESSES)] = ()
    endpoint: EndpointAddr | None = None
    peers: Annotated[tuple[EndpointAddr, ...], Limit(MAX_PEERS)] = ()

    def __post_init__(self) -> None:
        if not self.run_id:
            raise ConfigurationError("a ticket names a run, but run_id is empty", name="run_id", value="")
        if not self.tcp and self.endpoint is None:
            raise ConfigurationError("a ticket names at least one way to the coordinator", name="tcp", value=())
        for address in self.tcp:
            split_address(address, name="tcp")

    @override
    def __str__(self) -> str:
        return encode_text(encode(self if self.peers else _Plain(self.run_id, self.tcp, self.endpoint)))

    @classmethod
    def parse(cls, text: str) -> RunTicket:
        """Reads either form, also with what came along when it was copied, see :mod:`.ticket_text`.

        Raises:
            ProtocolError: it is neither, or it was damaged on its way.
        """
        text = pasted(text)
        address, slash, run_id = text.partition("/")
        if slash:
            return _typed(address, run_id)
        payload = decode_text(text)
        try:
            plain = decode(_Plain, payload)
        except ProtocolError:
            return decode(cls, payload)
        return _checked(plain)


@dataclass(frozen=True)
class _Plain:
    """A ticket without peers."""

    run_id: Annotated[str, Limit(RUN_ID_MAX_LEN)]
    tcp: Annotated[tuple[Annotated[str, Limit(255)], ...], Limit(MAX_TCP_ADDRESSES)]
    endpoint: EndpointAddr | None


def _checked(plain: _Plain) -> RunTicket:
    try:
        return RunTicket(plain.run_id, plain.tcp, plain.endpoint)
    except ConfigurationError as error:
        raise ProtocolError(f"the ticket leads nowhere: {error}") from None


def _typed(address: str, run_id: str) -> RunTicket:
    try:
        if len(run_id.encode(errors="surrogatepass")) > RUN_ID_MAX_LEN:
            raise ProtocolError(f"a run's name has at most {RUN_ID_MAX_LEN} bytes, got {run_id[:40]!r}")
        return RunTicket(run_id, (address,))
    except ConfigurationError as error:
        raise ProtocolError(f"a run is named as host:port/run-id: {error}") from None


def connector(ticket: RunTicket, node: Node | None = None) -> Callable[[], Awaitable[Stream]]:
    """What :class:`~.client.RemoteCoordinator` needs to connect: tries each way of the ticket in turn.

    Args:
        ticket: the ways.
        node: dials iroh endpoints; without it only TCP is tried.

    Raises:
        ConfigurationError: the ticket has only an iroh endpoint, and there is no node.
    """
    if not ticket.tcp and node is None:
        raise ConfigurationError("this run is reached through iroh: a node is needed to dial it", name="node")

    is_choice = len(ticket.tcp) > 1 or (ticket.endpoint is not None and node is not None)

    async def connect() -> Stream:
        failures: list[str] = []
        for address in ticket.tcp:
            try:
                return await open_tcp(*split_address(address), seconds=TCP_SECONDS if is_choice else None)
            except OSError as error:
                failures.append(f"{address}: {error}")
        if ticket.endpoint is not None and node is not None:
            from ..comm.iroh.streams import open_iroh

            try:
                return await open_iroh(node, ticket.endpoint)
            except OSError as error:
                failures.append(str(error))
        raise ConnectionRefusedError("; ".join(failures))

    return connect
