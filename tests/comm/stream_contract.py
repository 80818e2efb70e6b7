"""What every :class:`~distro_optim.comm.streams.Stream` promises, as tests that any transport can run.

Subclass :class:`StreamContract` and give it two ends of a stream.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from distro_optim.comm.streams import Stream, StreamListener

T = TypeVar("T")
TIMEOUT_SECONDS = 60  # generous: only a stream that hangs gets there


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Runs ``work`` in an event loop of its own, not for ever."""

    async def bounded() -> T:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await work()

    return asyncio.run(bounded())


async def read_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.read(size - len(data))
        assert piece, "the stream ended early"
        data += piece
    return data


class StreamContract(ABC):
    """The contract. :meth:`listen` and :meth:`dial` are all that a transport adds."""

    @abstractmethod
    async def listen(self) -> StreamListener: ...

    @abstractmethod
    async def dial(self, listener: StreamListener) -> Stream: ...

    def with_streams(self, work: Callable[[Stream, Stream], Awaitable[T]]) -> T:
        async def connected() -> T:
            listener = await self.listen()
            near = await self.dial(listener)
            far = await listener.accept()
            try:
                return await work(near, far)
            finally:
                await near.close()
                await far.close()
                await listener.close()

        return run(connected)

    def test_bytes_arrive_in_order_in_both_directions(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            await near.write(b"hel")
            await near.write(b"lo")
            await far.write(b"world")
            assert await read_exactly(far, 5) == b"hello"
            assert await read_exactly(near, 5) == b"world"

        self.with_streams(work)

    def test_a_read_takes_no_more_than_it_asked_for(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            await near.write(b"0123456789")
            assert len(await far.read(4)) <= 4

        self.with_streams(work)

    def test_megabytes_arrive_whole(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            data = bytes(range(256)) * 8192
            writing = asyncio.create_task(near.write(data))
            assert await read_exactly(far, len(data)) == data
            await writing

        self.with_streams(work)

    def test_what_was_written_before_closing_arrives_and_then_the_end(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            await near.write(b"last words")
            await near.close()
            assert await read_exactly(far, 10) == b"last words"
            assert await far.read(10) == b""
            assert await far.read(10) == b""

        self.with_streams(work)

    def test_writing_after_closing_is_an_error_and_closing_twice_is_none(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            await near.close()
            await near.close()
            with pytest.raises(ConnectionError):
                await near.write(b"x")

        self.with_streams(work)

    def test_a_reader_that_does_not_read_stops_its_writer(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            async def flood() -> None:
                while True:
                    await near.write(bytes(256 * 1024))

            writing = asyncio.create_task(flood())
            _, pending = await asyncio.wait({writing}, timeout=0.5)
            assert pending, "the writer was told that everything went out"
            writing.cancel()
            await asyncio.wait({writing})

        self.with_streams(work)

    def test_a_writer_learns_that_its_reader_has_gone(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            async def flood() -> None:
                while True:
                    await near.write(bytes(64 * 1024))

            await far.close()
            with pytest.raises(ConnectionError):
                await flood()

        self.with_streams(work)

    def test_closing_waits_only_a_moment_for_a_reader_that_does_not_read(self) -> None:
        async def work(near: Stream, far: Stream) -> None:
            writing = asyncio.create_task(near.write(bytes(32 * 1024 * 1024)))
            await asyncio.wait({writing}, timeout=0.1)
            async with asyncio.timeout(10):
                await near.close()
            await asyncio.wait({writing})
            if not writing.cancelled():
                assert isinstance(writing.exception(), ConnectionError | None)

        self.with_streams(work)

    def test_streams_outlive_the_listener_that_accepted_them(self) -> None:
        async def connected() -> None:
            listener = await self.listen()
            near = await self.dial(listener)
            far = await listener.accept()
            await listener.close()
            await listener.close()
            with pytest.raises(ConnectionError):
                await listener.accept()
            await near.write(b"x")
            assert await read_exactly(far, 1) == b"x"
            await near.close()
            await far.close()

        run(connected)

    def test_peers_and_addresses_have_names(self) -> None:
        async def connected() -> None:
            listener = await self.listen()
            assert listener.address
            near = await self.dial(listener)
            far = await listener.accept()
            assert near.peer
            assert far.peer
            await near.close()
            await far.close()
            await listener.close()

        run(connected)
