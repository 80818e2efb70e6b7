"""TCP and memory keep the contract of streams."""

from __future__ import annotations

import pytest
from typing_extensions import override

from comm.stream_contract import StreamContract, run
from distro_optim.comm.streams import MemoryListener, Stream, StreamListener, TcpListener, open_tcp
from distro_optim.errors import ConfigurationError


class TestTcp(StreamContract):
    @override
    async def listen(self) -> StreamListener:
        return await TcpListener.bind("127.0.0.1", 0)

    @override
    async def dial(self, listener: StreamListener) -> Stream:
        host, _, port = listener.address.rpartition(":")
        return await open_tcp(host, int(port))


class TestMemory(StreamContract):
    @override
    async def listen(self) -> StreamListener:
        return MemoryListener()

    @override
    async def dial(self, listener: StreamListener) -> Stream:
        assert isinstance(listener, MemoryListener)
        return await listener.connect()


def test_a_port_that_is_taken_is_named() -> None:
    async def work() -> None:
        first = await TcpListener.bind("127.0.0.1", 0)
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(ConfigurationError, match=rf"cannot listen on 127.0.0.1:{port}"):
            await TcpListener.bind("127.0.0.1", port)
        await first.close()

    run(work)


def test_nobody_there_is_a_connection_error() -> None:
    async def work() -> None:
        listener = await TcpListener.bind("127.0.0.1", 0)
        port = int(listener.address.rpartition(":")[2])
        await listener.close()
        with pytest.raises(ConnectionError):
            await open_tcp("127.0.0.1", port)
        memory = MemoryListener()
        await memory.close()
        with pytest.raises(ConnectionError, match="nobody accepts"):
            await memory.connect()

    run(work)
