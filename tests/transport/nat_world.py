"""Two networks behind routers that translate addresses, and an internet between them, made of network namespaces.

::

    $ unshare -Urn python nat_world.py probe            0 if the machine allows it
    $ unshare -Urn python nat_world.py meet             two nodes try to meet; prints a JSON object

Each node is in a namespace of its own, whose only way out is a TUN device. The other ends of both devices are in this
process, which is the two routers: what leaves a network gets the router's public address, what comes back to it is
let in only from where something was sent to before, or if its port is forwarded. Only UDP over IPv4 gets through.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import selectors
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

CLONE_NEWNET: Final = 0x40000000
TUNSETIFF: Final = 0x400454CA
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000
UDP: Final = 17
MAX_PACKET: Final = 1 << 16

PRIVATE: Final = IPv4Address("10.0.0.2")
PUBLIC: Final = (IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2"))

FORWARDED: Final = 4433
TOO: Final = 4434
"""Ports that a router forwards: the node on the first is told its address, the one on the second is not."""


@dataclass
class Router:
    """One router: ports stay as they are, addresses change. Its table of who was sent to never forgets."""

    public: IPv4Address
    device: int
    forwarded: frozenset[int]
    sent_to: set[tuple[int, bytes, int]] = field(default_factory=set)

    def outbound(self, packet: bytes) -> bytes | None:
        """A packet of the network as it leaves the router; None if it goes nowhere."""
        if packet[0] >> 4 != 4 or packet[9] != UDP or packet[12:16] != PRIVATE.packed:
            return None
        source, target = ports(packet)
        self.sent_to.add((source, packet[16:20], target))
        return rewritten(packet, self.public.packed, packet[16:20])

    def inbound(self, packet: bytes) -> bytes | None:
        """A packet for the router as it enters the network; None if it does not."""
        source, target = ports(packet)
        if target not in self.forwarded and (target, packet[12:16], source) not in self.sent_to:
            return None
        return rewritten(packet, packet[12:16], PRIVATE.packed)


def ports(packet: bytes) -> tuple[int, int]:
    source, target = struct.unpack_from("!HH", packet, 4 * (packet[0] & 15))
    return source, target


def rewritten(packet: bytes, source: bytes, target: bytes) -> bytes:
    size = 4 * (packet[0] & 15)
    header = packet[:10] + b"\0\0" + source + target + packet[20:size]
    total = sum(struct.unpack(f"!{size // 2}H", header))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    # A UDP checksum of 0 says that there is none.
    payload = packet[size : size + 6] + b"\0\0" + packet[size + 8 :]
    return header[:10] + struct.pack("!H", ~total & 0xFFFF) + header[12:] + payload


def new_network() -> int:
    """Moves this thread into a fresh namespace that has nothing but loopback and a device; returns its other end."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "a network namespace")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"wan", IFF_TUN | IFF_NO_PI))
    for command in (
        "ip link set lo up",
        f"ip addr add {PRIVATE}/24 dev wan",
        "ip link set wan up",
        "ip route add default dev wan",
    ):
        subprocess.run(command.split(), check=True)
    return device


def node(*arguments: str) -> subprocess.Popen[bytes]:
    """A process in the namespace that this thread is in."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def meet() -> int:
    """Puts the packets of two nodes through two routers until the second has said how it went."""
    routers, nodes = [], []
    for index, role in enumerate(("served", "dialling")):
        device = new_network()
        routers.append(Router(PUBLIC[index], device, frozenset({FORWARDED, TOO})))
        nodes.append(node(role, f"{PUBLIC[index]}:{FORWARDED}"))
    served, dialling = nodes
    if served.stdout is None or dialling.stdin is None or dialling.stdout is None:
        raise RuntimeError("both were started with pipes")
    selector = selectors.DefaultSelector()
    for router in routers:
        selector.register(router.device, selectors.EVENT_READ, router)
    selector.register(served.stdout, selectors.EVENT_READ)
    selector.register(dialling.stdout, selectors.EVENT_READ)
    where = {router.public.packed: router for router in routers}
    try:
        while True:
            for key, _ in selector.select():
                if isinstance(key.data, Router):
                    packet = key.data.outbound(os.read(key.fd, MAX_PACKET))
                    to = where.get(packet[16:20]) if packet is not None else None
                    entering = to.inbound(packet) if to is not None and packet is not None else None
                    if to is not None and entering is not None:
                        os.write(to.device, entering)
                elif key.fileobj is served.stdout:
                    line = served.stdout.readline()
                    if not line:
                        return 1
                    dialling.stdin.write(line)
                    dialling.stdin.flush()
                else:
                    sys.stdout.write(dialling.stdout.read().decode())
                    return dialling.wait()
    finally:
        for process in nodes:
            process.kill()
            process.wait()


# -- the nodes ---------------------------------------------------------------------------------------------------------

ALPN: Final = b"nat-world/0"
DIAL_SECONDS: Final = 10.0
"""For a dial that should succeed."""
VAIN_SECONDS: Final = 1.5
"""For one that should not."""


def serve(external: str) -> int:
    """Two nodes, of which one is told where others reach it; prints their tickets and waits to be killed."""
    from distro_optim.comm.iroh.connection import Connection
    from distro_optim.comm.iroh.endpoint import Node
    from distro_optim.comm.tickets import EndpointTicket

    async def greet(connection: Connection) -> None:
        send, _ = await connection.accept_bi()
        await send.write(b"hello")
        await send.finish()
        await connection.closed()

    told = Node(relay="none", bind_addr=f"0.0.0.0:{FORWARDED}", external_addr=external)
    untold = Node(relay="none", bind_addr=f"0.0.0.0:{TOO}")
    for one in (told, untold):
        one.accept(ALPN, greet)
        one.start()
    print(json.dumps([str(EndpointTicket(one.addr())) for one in (told, untold)]), flush=True)
    sys.stdin.read()
    return 0


def dial(external: str) -> int:
    """Dials both of the other side; prints how it went."""
    from distro_optim.comm.iroh.endpoint import Node
    from distro_optim.comm.tickets import EndpointTicket
    from distro_optim.errors import PeerUnreachableError

    tickets = [EndpointTicket.parse(text).addr for text in json.loads(sys.stdin.readline())]
    ours = Node(relay="none", bind_addr=f"0.0.0.0:{FORWARDED}", external_addr=external)

    async def reach() -> dict[str, str]:
        connection = await ours.connect(tickets[0], ALPN, timeout=DIAL_SECONDS)
        send, recv = await connection.open_bi()
        await send.write(b"?")
        said = await recv.read_to_end(100, timeout=DIAL_SECONDS)
        way = connection.stats().way
        found = {"said": said.decode(), "path": way.path, "at": way.remote_addr, "untold": "reached"}
        try:
            await ours.connect(tickets[1], ALPN, timeout=VAIN_SECONDS)
        except PeerUnreachableError:
            found["untold"] = "unreachable"
        return found

    with ours:
        print(json.dumps(ours.submit(reach()).result(4 * DIAL_SECONDS)))
    return 0


def main(role: str, *arguments: str) -> int:
    match role:
        case "probe":
            os.close(new_network())
            return 0
        case "meet":
            return meet()
        case "served":
            return serve(*arguments)
        case "dialling":
            return dial(*arguments)
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
