"""Finds out what ``distro-optim doctor`` tells: looks at this machine, and asks the network. Decides nothing."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from ..comm.addresses import EndpointAddr
from ..comm.iroh.endpoint import RELAY_SECONDS, Node
from ..comm.iroh.gossip.net import GOSSIP_ALPN
from ..comm.iroh.keys import generate_secret_key
from ..comm.iroh.measuring import measure_line
from ..comm.iroh.reach import Discovery, parse_relays
from ..console import printable
from ..coordinator.client.remote import RemoteCoordinator
from ..coordinator.model import Distro
from ..coordinator.ticket import RunTicket, connector
from ..coordinator.types import Coordinator
from ..errors import ConfigurationError, DistroError
from ..models.memory import available_memory, training_memory
from ..optimizer import DisTrO
from ..strategy.model.machine import MERGE, machine_facts
from .devices import parse_devices
from .findings import Facts, HostFacts, PeerFacts
from .round_cost import Line, RoundFacts

__all__ = ["DoctorOptions", "count_parameters", "look_into"]

EXPECTED_HASH: Final = "cc5d88cc62720a6a649abb6b4b08d6e7a9f360e17a5cbd48c44714976bef1b53"
"""What the self-test gives with the defaults on every machine (``arithmetic="exact"``); a test compares."""

TIME_SERVER: Final = "pool.ntp.org"
NTP_PORT: Final = 123
NTP_EPOCH: Final = 2_208_988_800
"""Seconds from 1900 to 1970 (RFC 868)."""

NTP_SECONDS: Final = 2.0
LOOK_SECONDS: Final = 10.0
"""For the coordinator to send its state."""

OUTSIDE_SECONDS: Final = 3.0
"""After a relay server has answered, for the answers that tell how others see us."""

MAX_PEERS: Final = 8
"""That are tried. Chosen arbitrarily."""

_TEST_ADDRESSES: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Of documentation (RFC 5737, RFC 3849). Nothing is sent there: only the way out is looked up."""

MAX_HEADER_BYTES: Final = 64 << 20
"""Of a file of weights; as much as safetensors reads, and some."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What ``distro-optim doctor`` was asked for.

    Attributes:
        run: a ticket or ``host:port/run-id``; None looks at this machine alone.
        relay, discovery, external_addr, port: how the endpoint is opened.
        folder: where checkpoints would be.
        device: where the model would be.
        parameters: of a model; None takes those of ``model``.
        model: folder or file with its weights.
        peers: of the run; None counts those that are in it, and us.
        time_server: None asks none.
    """

    run: str | None = None
    relay: str | Sequence[str] = "default"
    discovery: Discovery | None = None
    external_addr: str | Sequence[str] | None = None
    port: int = 0
    folder: Path = Path()
    device: str = "auto"
    parameters: int | None = None
    model: Path | None = None
    peers: int | None = None
    time_server: str | None = TIME_SERVER


def look_into(options: DoctorOptions) -> Facts:
    """Everything that can be found out; takes some seconds.

    Raises:
        ConfigurationError: an option cannot be.
    """
    ticket = None if options.run is None else _ticket(options.run)
    device = parse_devices(options.device, 1)[0]
    parameters, element_bytes = options.parameters, 4
    if parameters is None and options.model is not None:
        parameters, element_bytes = count_parameters(options.model)
    dtype = {2: torch.bfloat16, 8: torch.float64}.get(element_bytes, torch.float32)
    node = Node(
        secret_key=generate_secret_key(),
        relay=options.relay,
        discovery=options.discovery,
        external_addr=options.external_addr,
        bind_addr=f"0.0.0.0:{options.port}",
    )
    free = None
    with suppress(OSError):
        free = shutil.disk_usage(_existing(options.folder)).free
    state, network = None, Facts()
    try:
        network, state = node.loop.run(_network(node, options, ticket), 120.0)
    finally:
        node.close()
    needed = None
    if parameters is not None:
        needed = sum(training_memory([torch.empty(parameters, dtype=dtype, device="meta")]).values())
    return Facts(
        bind_error=network.bind_error,
        port=network.port,
        own=network.own,
        seen=network.seen,
        relay=network.relay,
        relays_wanted=network.relays_wanted,
        clock_offset=network.clock_offset,
        host=network.host,
        arithmetic=machine_facts(DisTrO([torch.nn.Parameter(torch.zeros(2, 2))], 1e-3))[MERGE],
        arithmetic_expected=EXPECTED_HASH,
        disk_path=str(options.folder),
        disk_free=free,
        device=str(device),
        memory_free=available_memory(device),
        memory_needed=needed,
        round=None if parameters is None else _round(parameters, element_bytes, state, options.peers),
    )


def _round(parameters: int, element_bytes: int, state: Coordinator | None, peers: int | None) -> RoundFacts:
    settings = state.model.optimizer if state is not None else None
    if peers is None:
        peers = max(2, len(state.epoch_state.clients) + 1) if state is not None else 2
    if not isinstance(settings, Distro):
        return RoundFacts(parameters=parameters, element_bytes=element_bytes, peers=peers)
    return RoundFacts(
        parameters=parameters,
        element_bytes=element_bytes,
        chunk=max(1, settings.compression_chunk),
        topk=max(1, settings.compression_topk),
        quantized=settings.quantize_1bit,
        peers=peers,
    )


def _ticket(run: str) -> RunTicket:
    from ..strategy.network.joining import parse_run

    return parse_run(run)


# -- the network -------------------------------------------------------------------------------------------------------


async def _network(node: Node, options: DoctorOptions, ticket: RunTicket | None) -> tuple[Facts, Coordinator | None]:
    relays_wanted = parse_relays(options.relay) != "none"
    clock = asyncio.create_task(_clock_offset(options.time_server))
    try:
        await node.bind()
    except DistroError as error:
        return Facts(bind_error=printable(str(error)), clock_offset=await clock), None
    if relays_wanted:
        with suppress(TimeoutError):
            async with asyncio.timeout(RELAY_SECONDS):
                await node.online()
                async with asyncio.timeout(OUTSIDE_SECONDS):
                    while not any(address.ip.is_global for address in node.addr().direct):
                        await asyncio.sleep(0.1)
    host, state = (None, None) if ticket is None else await _host(node, ticket)
    address = node.addr()
    return (
        Facts(
            port=next((one.port for one in node.sockets() if one.ip.version == 4), 0),
            own=_own_addresses(),
            seen=address.direct,
            relay=address.relays[0] if address.relays else None,
            relays_wanted=relays_wanted,
            clock_offset=await clock,
            host=host,
        ),
        state,
    )


async def _host(node: Node, ticket: RunTicket) -> tuple[HostFacts, Coordinator | None]:
    ways = [*ticket.tcp, *([ticket.endpoint.id.hex()[:10]] if ticket.endpoint is not None else [])]
    name = f"the coordinator of run {ticket.run_id!r} at {' or '.join(ways)}"
    coordinator = RemoteCoordinator(
        connector(ticket, node), node.secret_key, ticket.run_id, name=name, timeout=LOOK_SECONDS
    )
    try:
        state = await coordinator.look()
    except DistroError as error:
        return HostFacts(name=name, error=printable(str(error))), None
    finally:
        await coordinator.close()
    line, why_not, path, rtt = None, "it is known by its TCP address only", "over TCP", None
    if ticket.endpoint is not None:
        try:
            measured = await measure_line(node, ticket.endpoint)
            line, path, rtt = Line(measured.up, measured.down), measured.path, measured.rtt
        except DistroError as problem:
            why_not = printable(str(problem))
    host = ticket.endpoint.id if ticket.endpoint is not None else None
    keys = [client.id.p2p_identity for client in state.epoch_state.clients]
    others = [key for key in keys if key != host][:MAX_PEERS]
    facts = HostFacts(
        name=name,
        run_id=printable(state.run_id),
        phase=state.run_state.name,
        num_clients=len(keys),
        clock_ahead=state.run_state_start_unix_timestamp - time.time(),
        path=path,
        rtt=rtt,
        line=line,
        line_error=why_not,
        peers=tuple(await asyncio.gather(*(_peer(node, key) for key in others))),
    )
    return facts, state


async def _peer(node: Node, key: bytes) -> PeerFacts:
    """Dials a peer, which turns us away, since we are not in the run: but it was reached."""
    try:
        connection = await node.connect(EndpointAddr(key), GOSSIP_ALPN)
    except DistroError as error:
        return PeerFacts(key=key, error=printable(str(error)))
    try:
        way = connection.stats().way
        return PeerFacts(key=key, rtt=way.rtt, path=way.path if way.path != "none" else "at its address")
    finally:
        connection.close()


async def _clock_offset(server: str | None) -> float | None:
    """Seconds by which our clock is ahead of the server's (SNTP, RFC 4330); None if it does not answer."""
    if server is None:
        return None

    def ask() -> float | None:
        cookie = secrets.token_bytes(8)
        question = bytes([0b00_100_011]) + bytes(39) + cookie  # no leap, version 4, client
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
                door.settimeout(NTP_SECONDS)
                door.connect((server, NTP_PORT))
                sent = time.time()
                door.send(question)
                answer = door.recv(512)
                came = time.time()
        except OSError:
            return None
        return offset_in(answer, cookie, sent, came)

    with suppress(TimeoutError):
        async with asyncio.timeout(2 * NTP_SECONDS):  # looking the name up has no limit of its own
            return await asyncio.to_thread(ask)
    return None


def offset_in(answer: bytes, cookie: bytes, sent: float, came: float) -> float | None:
    """The offset that an answer of a time server shows; None if it is no answer to our question.

    Args:
        answer: its bytes.
        cookie: the 8 bytes of our question, where a clock puts its own time.
        sent, came: Unix time of question and answer, by our clock.
    """
    if len(answer) < 48 or answer[0] & 7 != 4 or answer[1] == 0 or answer[24:32] != cookie:
        return None
    received, answered = (int.from_bytes(answer[start : start + 8], "big") / 2**32 - NTP_EPOCH for start in (32, 40))
    return (sent + came) / 2 - (received + answered) / 2


def _own_addresses() -> frozenset[str]:
    found = set()
    for family, address in _TEST_ADDRESSES:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as door:
            door.connect((address, 9))
            found.add(str(door.getsockname()[0]))
    return frozenset(found)


# -- a model -----------------------------------------------------------------------------------------------------------


def count_parameters(path: Path) -> tuple[int, int]:
    """Elements in the files of weights (``*.safetensors``) of a folder, or in one such file, and bytes of the largest.

    Raises:
        ConfigurationError: there are none, or they cannot be read.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    count, element = 0, 0
    for file in files:
        if file.name.startswith("momentum"):
            continue  # of a checkpoint of ours: not part of the model
        try:
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                if size > MAX_HEADER_BYTES:
                    raise ValueError
                header = json.loads(opened.read(size))
            for name, tensor in header.items():
                if name != "__metadata__":
                    elements = 1
                    for side in tensor["shape"]:
                        elements *= int(side)
                    begin, end = tensor["data_offsets"]
                    count += elements
                    element = max(element, (int(end) - int(begin)) // max(1, elements))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ConfigurationError(f"{file} is not a file of weights (safetensors)", name="model") from None
    if not count:
        raise ConfigurationError(f"{path} holds no weights (*.safetensors): name a model's folder", name="model")
    return count, element


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
