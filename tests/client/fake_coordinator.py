"""A coordinator over TCP that sends what a test wants, in bytes of its own making."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

from distro_optim.coordinator.messages import SERVER_TO_CLIENT, CoordinatorMessage
from distro_optim.coordinator.types import Coordinator
from reference import wire_messages as wire

TICK_SECONDS = 0.2
CHALLENGE = bytes(range(32))


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def state_payload(state: Coordinator) -> bytes:
    """As a coordinator sends it."""
    from distro_optim.comm.framing import Else

    return bytes(SERVER_TO_CLIENT.encode(Else(CoordinatorMessage(state))))


class FakeCoordinator:
    """Takes connections, and after the handshake sends one payload again and again, whether it is joined or not.

    Args:
        payload: what is sent; None sends nothing.
        mute: not even a challenge.
        refuse: closes the connection when it is asked for the run.
        then: what is sent in place of ``payload`` from the third tick after a join on.

    Attributes:
        said: what clients said after the handshake.
        lost: set when a client has closed its connection.
    """

    def __init__(
        self, payload: bytes | None = None, *, mute: bool = False, refuse: bool = False, then: bytes | None = None
    ) -> None:
        self._payload = payload
        self._then = then
        self._mute = mute
        self._refuse = refuse
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._links: list[socket.socket] = []
        self._stop = threading.Event()
        self.connected = threading.Event()
        self.lost = threading.Event()
        self.said: list[Any] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for each in (self._listener, *self._links):
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self._links.append(link)
            self.connected.set()
            if not self._mute:
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with suppress(OSError):
            link.sendall(frame(b"\0" + CHALLENGE))
            name, proof = self._receive(link)
            assert name == "ChallengeResponse"
            if wire.SIGNED.decode(proof)["data"] != CHALLENGE:  # a question to our own servers, which others refuse
                link.shutdown(socket.SHUT_RDWR)
                return
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()
            ticks = 0
            while self._payload is not None:
                ticks += bool(self.said)
                link.sendall(frame(self._payload if self._then is None or ticks < 4 else self._then))
                if self._stop.wait(TICK_SECONDS):
                    return

    def _listen(self, link: socket.socket) -> None:
        with suppress(OSError):
            try:
                while not self._stop.is_set():
                    self.said.append(self._receive(link))
                    if self._refuse:
                        link.shutdown(socket.SHUT_RDWR)
            finally:
                self.lost.set()

    @staticmethod
    def _receive(link: socket.socket) -> Any:
        data = b""
        while not wire.frames(data):
            # Byte by byte: the next message is not ours to take.
            more = link.recv(1)
            if not more:
                raise ConnectionError
            data += more
        return wire.TO_SERVER.decode(wire.frames(data)[0])


@contextmanager
def coordinator_of(state: Coordinator, *, then: Coordinator | None = None) -> Iterator[FakeCoordinator]:
    """One that never leaves its state, or does once, some ticks after the first client has joined."""
    with FakeCoordinator(state_payload(state), then=None if then is None else state_payload(then)) as fake:
        yield fake
