"""What the live tests share: waiting for something, counting messages, a peer that speaks bytes of its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from distro_optim.comm.iroh.connection import Connection
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.gossip.frames import encode_frame, encode_header
from distro_optim.comm.iroh.gossip.messages import Message, encode_message
from distro_optim.comm.iroh.gossip.net import GOSSIP_ALPN, Topic

CALL_SECONDS = 15.0
RUN_SECONDS = 60.0


async def until(condition: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
    """Waits until ``condition`` holds; TimeoutError if it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def count_messages(topic: Topic, received: Counter[bytes]) -> None:
    async for message in topic:
        received[message.content] += 1


class RawPeer:
    """A peer that sends whatever a test says, and reads nothing unless told to."""

    def __init__(self, node: Node, topic: bytes) -> None:
        self.node = node
        self.topic = topic
        self.connection: Connection

    async def connect(self, victim: Node) -> None:
        self.connection = await self.node.connect(victim.addr(), GOSSIP_ALPN)

    async def send(self, *messages: Message) -> None:
        stream = await self.connection.open_uni(timeout=CALL_SECONDS)
        frames = b"".join(encode_frame(encode_message(message)) for message in messages)
        await stream.write(encode_header(self.topic) + frames, timeout=CALL_SECONDS)
        self._kept = stream

    async def cut_off(self, seconds: float = RUN_SECONDS) -> int | None:
        """Waits for the victim to close the connection; its code."""
        async with asyncio.timeout(seconds):
            await self.connection.closed()
        return self.connection.close_code
