"""Training data from a TCP data server: the socket around :mod:`.requests`."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from typing_extensions import override

from ...comm.backoff import BackoffPolicy
from ...comm.signing import SecretKey
from ...comm.streams import split_address
from ...coordinator.types import BatchId
from ...errors import ConfigurationError, DataUnavailableError, InvalidDataError
from ..provider import TokenProvider, TokenSequence
from .requests import DataRequests, RequestRefusedError, cut_batch

__all__ = ["DataServerTokens", "ServerTimeouts", "split_address"]

CONNECT_SECONDS: Final = 5.0
"""Until a connection must be there; a server that takes longer counts as down."""

_CLOSED: Final = "this provider of training data is closed"

READ_BYTES: Final = 256 * 1024
"""Taken from the socket at once."""


@dataclass(frozen=True, kw_only=True)
class ServerTimeouts:
    """How long a data server is waited for.

    Attributes:
        attempts: in all, at each batch; as many as Psyche's client makes (``shared/client/src/fetch_data.rs``).
        seconds: until an answer must be complete, connecting included.
        waits: between attempts.
    """

    attempts: int = 8
    seconds: float = 30.0
    waits: BackoffPolicy = field(default_factory=lambda: BackoffPolicy(first=0.5, longest=10.0))

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.seconds > 0:
            raise ConfigurationError(f"attempts and seconds must be above 0, got {self}", name="patience")


class DataServerTokens(TokenProvider):
    """What a data server gives. It does not say how much there is; what it does not have it refuses.

    The connection is opened when it is first needed, and again after it broke.

    Args:
        address: ``host:port``.
        key: who we are; the server serves members of the run's present epoch.
        seq_len: tokens of a sequence.
        vocab_size: tokens the model knows; None leaves that unchecked.
        patience: how long, and how often.
        draw: uniform numbers in [0, 1), for the waits.
        wait: waits for some seconds, or less; by default until :meth:`close` at most.
    """

    def __init__(
        self,
        address: str,
        key: SecretKey,
        seq_len: int,
        *,
        vocab_size: int | None = None,
        patience: ServerTimeouts | None = None,
        draw: Callable[[], float] = random.random,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        super().__init__(seq_len, vocab_size=vocab_size)
        self._address = split_address(address)
        self._name = f"data server {address}"
        self._key = key
        self._patience = patience or ServerTimeouts()
        self._draw = draw
        self._ended = threading.Event()
        self._wait = wait or self._ended.wait
        self._lock = threading.Lock()
        self._switching = threading.Lock()
        self._link: tuple[socket.socket, DataRequests] | None = None

    @property
    @override
    def num_sequences(self) -> None:
        return None

    @override
    def get_samples(self, batch: BatchId) -> list[TokenSequence]:
        """Its errors name the server."""
        try:
            return super().get_samples(batch)
        except InvalidDataError as error:
            if str(error).startswith(self._name):
                raise
            raise InvalidDataError(f"{self._name}: {error}") from error

    @override
    def probe(self) -> None:
        """Whether a data server answers there. It serves members of the epoch only, and nobody is one before the first.

        Raises:
            DataUnavailableError: nobody does.
            InvalidDataError: it serves us, and what it gives cannot be trained on.
        """
        first = BatchId(0, 0)
        with self._lock:
            try:
                self._check(0, *self._ask(first))
            except InvalidDataError as error:
                self._hang_up()
                raise InvalidDataError(f"{self._name}: {error}") from error
            except RequestRefusedError:
                return
            except OSError as error:
                self._hang_up()
                raise DataUnavailableError(f"{self._name}: {str(error) or type(error).__name__}") from error

    @override
    def close(self) -> None:
        super().close()
        with self._switching:
            self._ended.set()
            if self._link is not None:
                with contextlib.suppress(OSError):
                    self._link[0].shutdown(socket.SHUT_RDWR)  # wakes the thread that reads there
        with self._lock:
            self._hang_up()

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        with self._lock:
            return [sample for piece in cut_batch(batch, self.seq_len) for sample in self._patiently(piece)]

    def _patiently(self, batch: BatchId) -> list[TokenSequence]:
        for failures in range(1, self._patience.attempts + 1):
            if self._ended.is_set():
                raise DataUnavailableError(_CLOSED)
            try:
                return self._ask(batch)
            except InvalidDataError as error:
                self._hang_up()
                raise InvalidDataError(f"{self._name}: {error}") from error
            except (RequestRefusedError, OSError) as error:
                # A refusal leaves the connection as good as it was.
                if not isinstance(error, RequestRefusedError):
                    self._hang_up()
                if failures == self._patience.attempts:
                    raise DataUnavailableError(
                        f"{self._name} gave nothing in {failures} attempts: {str(error) or type(error).__name__}"
                    ) from error
                self._wait(self._patience.waits.delay(failures, self._draw()))
        raise AssertionError("unreachable")

    def _ask(self, batch: BatchId) -> list[TokenSequence]:
        deadline = time.monotonic() + self._patience.seconds
        sock, requests = self._link or self._dial()
        while not requests.is_open:
            requests.receive(_received(sock, deadline))
            _send(sock, requests.data_to_send(), deadline)
        _send(sock, requests.request(batch), deadline)
        while True:
            answer = requests.receive(_received(sock, deadline))
            if answer is not None:
                return answer

    def _dial(self) -> tuple[socket.socket, DataRequests]:
        sock = socket.create_connection(self._address, timeout=min(CONNECT_SECONDS, self._patience.seconds))
        # close() ends the connection that it finds here, so none may come after it.
        with self._switching:
            if self._ended.is_set():
                sock.close()
                raise DataUnavailableError(_CLOSED)
            self._link = sock, DataRequests(self._key, self.seq_len)
            return self._link

    def _hang_up(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link[0].close()


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    if data:
        sock.settimeout(_left(deadline))
        sock.sendall(data)


def _received(sock: socket.socket, deadline: float) -> bytes:
    sock.settimeout(_left(deadline))
    data = sock.recv(READ_BYTES)
    if not data:
        raise ConnectionResetError("it closed the connection")
    return data


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("its answer takes too long")
    return seconds
