"""Nodes of one machine find each other by files, as Psyche's clients do with ``--iroh-discovery local``.

In one folder, ``/tmp/iroh_local_discovery``, each node keeps a file called by its endpoint id in hexadecimal::

    {"relay_urls": [], "direct_addresses": ["127.0.0.1:40231"]}

It is written when the node's addresses change, and read whenever the node is dialled. Source: PsycheFoundation/psyche
``shared/network/src/local_discovery.rs``; there files are never removed, here at the node's end.

Everybody on the machine can write there, so a file is a stranger's word: it is read only if it is a plain, small file,
and what it says is used to dial and nothing else; the handshake proves who answers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from ...errors import ConfigurationError, ProtocolError
from ..addresses import MAX_ADDRESSES, MAX_RELAY_URL_BYTES, EndpointAddr, SocketAddr
from .reach import is_relay_url

__all__ = ["MAX_FILE_BYTES", "LocalDiscovery", "decode_local_file", "encode_local_file", "local_addresses"]

_log = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 2 * MAX_ADDRESSES * (MAX_RELAY_URL_BYTES + 64)
"""Room for the most addresses that are kept of a peer."""

FOLDER: Final = Path("/tmp" if os.name == "posix" else tempfile.gettempdir(), "iroh_local_discovery")
"""Psyche's path, which no variable changes: a ``TMPDIR`` of one's own would part us from the others."""

REPUBLISH_SECONDS: Final = 2.0
"""Between two looks whether a node's file still says where it is. Chosen arbitrarily."""

_SHARED: Final = 0o1777
"""Mode of the folder, as of ``/tmp`` itself: all users of the machine may add files, and remove only their own."""

_READABLE: Final = 0o644

_LOOPBACK: Final = IPv4Address("127.0.0.1")


def encode_local_file(address: EndpointAddr) -> bytes:
    """What a node's file holds."""
    found = {"relay_urls": list(address.relays), "direct_addresses": [str(place) for place in address.direct]}
    return json.dumps(found, separators=(",", ":")).encode()


def decode_local_file(peer: bytes, data: bytes) -> EndpointAddr:
    """What the file of ``peer`` says.

    As in Psyche's reader, further keys and URLs that are none are passed over. Addresses where nobody can live are,
    too.

    Raises:
        ProtocolError: it is larger or otherwise formed than such a file is.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ProtocolError(f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError("it is not JSON") from None
    if not isinstance(found, dict):
        raise ProtocolError("it is not a JSON object")
    relays = [url for url in _texts(found, "relay_urls") if is_relay_url(url)]
    try:
        places = [SocketAddr.parse(text) for text in _texts(found, "direct_addresses")]
    except ConfigurationError as error:
        raise ProtocolError(str(error)) from None
    direct = [place for place in places if place.is_dialable and "%" not in str(place)]  # a scope is ours alone
    return EndpointAddr(peer, tuple(relays[:MAX_ADDRESSES]), tuple(direct[:MAX_ADDRESSES]))


def local_addresses(sockets: Iterable[SocketAddr]) -> tuple[SocketAddr, ...]:
    """Where an endpoint with these sockets is reached from its own machine over IPv4: through loopback, if it can."""
    return tuple(
        SocketAddr(_LOOPBACK, socket.port) if socket.ip.is_unspecified else socket
        for socket in sockets
        if socket.ip.version == 4
    )


class LocalDiscovery:
    """The folder, as one node sees it: its own file, and those of others.

    Args:
        own: our endpoint id.
        folder: another folder than Psyche's, for tests.
    """

    def __init__(self, own: bytes, folder: Path | None = None) -> None:
        self._folder = FOLDER if folder is None else folder
        self._own = own
        self._written: bytes | None = None

    def publish(self, address: EndpointAddr) -> None:
        """Writes our file, if it does not say so already. A reader finds all of it or what it said before.

        Raises:
            ConfigurationError: it cannot be written.
        """
        path, data = self._path(self._own), encode_local_file(address)
        if data == self._written and path.exists():  # a machine that runs for weeks clears its temporary folder
            return
        partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
        try:
            self._make_folder()
            try:
                # Never through a link that somebody has put there.
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _READABLE)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"local discovery cannot write its file in {self._folder}: {error.strerror or error}; "
                "let its owner make the folder writable for all (chmod 1777), or use another discovery",
                name="discovery",
                value=str(self._folder),
            ) from None
        self._written = data

    async def keep_published(self, address: Callable[[], EndpointAddr]) -> None:
        """Writes our file again whenever ``address`` has changed: a relay server is known only after a while."""
        while True:
            await asyncio.sleep(REPUBLISH_SECONDS)
            try:
                self.publish(address())
            except ConfigurationError as error:
                _log.warning("%s", error)

    def look_up(self, peer: bytes) -> EndpointAddr:
        """Where ``peer`` says that it is; without any address if it says nothing that can be used."""
        try:
            return decode_local_file(peer, _read(self._path(peer)))
        except FileNotFoundError:
            return EndpointAddr(peer)
        except (OSError, ProtocolError) as error:
            _log.warning("the file of %s in %s is not used: %s", peer.hex()[:10], self._folder, error)
            return EndpointAddr(peer)

    def withdraw(self) -> None:
        """Removes our file, unless another process with our identity has written it since."""
        path = self._path(self._own)
        try:
            if self._written is not None and _read(path) == self._written:
                path.unlink()
        except FileNotFoundError:
            pass
        except (OSError, ProtocolError) as error:
            _log.warning("%s cannot be removed: %s", path, error)
        self._written = None

    def _path(self, peer: bytes) -> Path:
        return self._folder / peer.hex()

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir()
        except FileExistsError:
            return
        self._folder.chmod(_SHARED)  # which mkdir leaves to the umask


def _read(path: Path) -> bytes:
    """A plain file of bounded size; neither a link, nor a pipe, which nobody might ever write to."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ProtocolError("it is not a plain file")
        return file.read(MAX_FILE_BYTES + 1)


def _texts(found: dict[str, object], key: str) -> list[str]:
    texts = found.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ProtocolError(f"{key} is not a list of texts")
    return texts
