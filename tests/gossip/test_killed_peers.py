"""A peer whose process is killed: it returns with its key while its old connection still hangs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import warm_python
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.net import GossipService
from distro_optim.comm.loop import LoopThread

pytestmark = [pytest.mark.waiting, pytest.mark.slow]

TOPIC = b"k" * 32
KEY = b"\x0b" * 32
#: A process that joins through the peer named by its arguments and prints what it receives.
PEER = """
import asyncio, sys
from distro_optim.comm.addresses import EndpointAddr, SocketAddr
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.net import GossipService

topic_id, key, peer = (bytes.fromhex(text) for text in sys.argv[1:4])
node = Node(secret_key=key, bind_addr="127.0.0.1:0", relay="none", discovery=False).start()

async def main():
    service = GossipService(node)
    topic = await service.join(topic_id, [EndpointAddr(peer, (), tuple(map(SocketAddr.parse, sys.argv[4:])))])
    async for message in topic:
        print(message.content.decode(), flush=True)

node.submit(main()).result()
"""


@contextmanager
def peer_of(node: Node) -> Iterator[subprocess.Popen[str]]:
    """A process with a peer that joins through ``node``; killed at the end."""
    addresses = [str(address) for address in node.addr().direct]
    arguments = [TOPIC.hex(), KEY.hex(), node.endpoint_id.hex(), *addresses]
    with warm_python.Popen([sys.executable, "-c", PEER, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_peer_that_is_killed_and_started_again_receives_the_next_messages(
    make_node: Callable[[], Node], loop_thread: LoopThread
) -> None:
    node = make_node()

    async def scenario() -> None:
        service = GossipService(node)
        topic = await service.join(TOPIC)
        number = 0

        async def received_something(process: subprocess.Popen[str]) -> int:
            """Broadcasts until the process prints one of the messages; its number."""
            nonlocal number
            assert process.stdout is not None
            line = asyncio.ensure_future(asyncio.to_thread(process.stdout.readline))
            while not line.done():
                number += 1
                # Large enough that a dead connection is soon full.
                await topic.broadcast(b"%d %s" % (number, b"x" * 3000))
                await asyncio.wait([line], timeout=0.005)
            return int(line.result().split()[0])

        with peer_of(node) as first:
            await received_something(first)
        killed_at = number
        with peer_of(node) as second:
            async with asyncio.timeout(60):
                assert await received_something(second) > killed_at
            assert len(topic.neighbors) == 1
            assert service.stats.offenders == 0
        await service.aclose()

    loop_thread.run(scenario(), 110)
