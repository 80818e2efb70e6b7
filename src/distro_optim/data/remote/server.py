"""Training data over the network: Psyche's data server, on any kind of stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from typing_extensions import override

from ...comm.framing import Else, encode_frame
from ...comm.serving.connection import Connection
from ...comm.serving.stream_server import TICK_SECONDS, StreamServer
from ...comm.streams import StreamListener
from ...coordinator.messages import DATA_SERVER_TO_CLIENT, TokenizedData, TrainingData
from ...coordinator.types import BatchId
from ...errors import DataError
from ..provider import IntArray, TokenProvider
from .service import DataService

__all__ = ["DataServer"]

READERS: Final = 2
"""Requests read from disk and encoded at a time, so that the coordinator beside us keeps its processor."""

_log = logging.getLogger(__name__)


class DataServer(StreamServer):
    """Serves token sequences until it is closed.

    Args:
        service: whom it serves with what.
        tokens: the data; not closed with the server.
        listeners: where clients come from.
        on_event: told of everything that happens.
        clock: monotonic seconds.
        tick_seconds: between two looks at the limits.
    """

    def __init__(
        self,
        service: DataService,
        tokens: TokenProvider,
        listeners: Sequence[StreamListener],
        *,
        on_event: Callable[[Any], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        super().__init__(service, listeners, on_event=on_event, clock=clock, tick_seconds=tick_seconds)
        self.service = service
        self._tokens = tokens
        self._free = asyncio.Semaphore(READERS)
        self._jobs: set[asyncio.Task[None]] = set()

    @override
    async def close(self) -> None:
        """Lets everybody go. Calling it again does nothing."""
        await super().close()
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    @override
    def _handle(self, output: Any) -> None:
        super()._handle(output)
        for session, batch in output.requests:
            job = asyncio.create_task(self._answer(session, batch))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)

    async def _answer(self, session: Connection, batch: BatchId) -> None:
        async with self._free:
            if not self.service.has(session):
                return
            try:
                frame = await asyncio.to_thread(_frame_of, self._tokens, batch)
            except (DataError, OSError, ValueError) as error:
                _log.error("the data of %s could not be read: %s", batch, error)
                self.service.disconnect(session, "its data could not be read")
            else:
                self.service.answer(session, frame, self._clock())
        self._dispatch()


def _frame_of(tokens: TokenProvider, batch: BatchId) -> bytes:
    sequences = tuple(
        TokenizedData(
            tuple(sample.input_ids.tolist()),
            _numbers(sample.labels),
            _numbers(sample.position_ids),
            _numbers(sample.sequence_lengths),
        )
        for sample in tokens.get_samples(batch)
    )
    return encode_frame(DATA_SERVER_TO_CLIENT.encode(Else(TrainingData(batch, sequences))))


def _numbers(values: IntArray | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values.tolist())
