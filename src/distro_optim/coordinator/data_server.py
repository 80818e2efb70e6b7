"""Training data over the network: Psyche's data server, on any kind of stream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..comm.framing import Else, encode_frame
from ..comm.streams import StreamListener
from .data_service import DataService
from .messages import DATA_SERVER_TO_CLIENT, TokenizedData, TrainingData
from .session import Session
from .stream_server import TICK_SECONDS, StreamServer
from .token_files import TokenFiles
from .types import BatchId

__all__ = ["DataServer"]

READERS: Final = 2
"""Requests read from disk and encoded at a time, so that the coordinator beside us keeps its processor."""

_log = logging.getLogger(__name__)


class DataServer(StreamServer):
    """Serves token files until it is closed.

    Args:
        service: whom it serves with what.
        files: the data.
        listeners: where clients come from.
        on_event: told of everything that happens.
        clock: monotonic seconds.
        tick_seconds: between two looks at the limits.
    """

    def __init__(
        self,
        service: DataService,
        files: TokenFiles,
        listeners: Sequence[StreamListener],
        *,
        on_event: Callable[[Any], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        super().__init__(service, listeners, on_event=on_event, clock=clock, tick_seconds=tick_seconds)
        self.service = service
        self._files = files
        self._free = asyncio.Semaphore(READERS)
        self._jobs: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Lets everybody go. Calling it again does nothing."""
        await super().close()
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)

    def _handle(self, output: Any) -> None:
        super()._handle(output)
        for session, batch in output.requests:
            job = asyncio.create_task(self._answer(session, batch))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)

    async def _answer(self, session: Session, batch: BatchId) -> None:
        async with self._free:
            if not self.service.has(session):
                return
            try:
                frame = await asyncio.to_thread(_frame_of, self._files, batch)
            except (OSError, ValueError, IndexError) as error:
                _log.error("the data of %s could not be read: %s", batch, error)
                self.service.disconnect(session, "its data could not be read")
            else:
                self.service.answer(session, frame, self._clock())
        self._dispatch()


def _frame_of(files: TokenFiles, batch: BatchId) -> bytes:
    sequences = tuple(TokenizedData(tuple(tokens.tolist())) for tokens in files.read(batch))
    return encode_frame(DATA_SERVER_TO_CLIENT.encode(Else(TrainingData(batch, sequences))))
