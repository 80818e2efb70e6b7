"""A ``get`` that was cut, by its provider or by Ctrl-C, goes on where it stopped when it is called again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typing_extensions import override

from distro_optim.comm.iroh.blobs.net import BlobService
from distro_optim.comm.iroh.blobs.store import Blob, MemoryStore
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.tickets import BlobTicket
from examples.test_p2p_blob import SECONDS, terminal

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


MIB = 2**20
SIZE = 12 * MIB + 5
CUT_AT = 6 * MIB
KEPT = 2 * MIB
"""Waited for before a cut, so that there is something to go on from."""


class CutBlob(Blob):
    """A blob whose second half is out of reach as long as ``store.is_cut``; notes what is read of it."""

    def __init__(self, blob: Blob, store: CutStore) -> None:
        super().__init__(blob.data, blob.outboard)
        self._store = store

    @override
    def read(self, offset: int, length: int) -> memoryview:
        store = self._store
        if store.is_cut and offset >= CUT_AT:
            # What was sent is lost with the stream, unless the other side has taken it.
            store.wait_until_kept()
            store.is_reached.set()
            assert store.may_fail.wait(SECONDS)
            raise OSError("the disk is gone")
        store.read_from.append(offset)
        return super().read(offset, length)


class CutStore(MemoryStore):
    """Serves :class:`CutBlob`."""

    def __init__(self, partial: Path) -> None:
        super().__init__()
        self.partial = partial
        self.is_cut = True
        self.is_reached = threading.Event()
        self.may_fail = threading.Event()
        self.read_from: list[int] = []

    @override
    def get(self, root: bytes) -> Blob | None:
        blob = super().get(root)
        return blob and CutBlob(blob, self)

    def kept(self) -> int:
        return sum(file.stat().st_size for file in self.partial.rglob("*.data"))

    def wait_until_kept(self) -> None:
        deadline = time.monotonic() + SECONDS
        while self.kept() < KEPT:
            assert time.monotonic() < deadline, "nothing arrives"
            time.sleep(0.01)


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[tuple[CutStore, bytes, str]]:
    """A store with one file, the file, and its ticket."""
    store = CutStore(tmp_path / "copy.partial")
    data = os.urandom(SIZE)
    with Node(bind_addr="127.0.0.1:0", relay="none") as node:
        BlobService(node, store)
        yield store, data, str(BlobTicket.raw(node.addr(), store.add(data, tag="file")))
        store.may_fail.set()


def finishes_from_where_it_stopped(store: CutStore, data: bytes, ticket: str, copy: Path) -> None:
    assert store.kept() >= KEPT
    assert not copy.exists()
    store.is_cut = False
    store.read_from.clear()
    getting = terminal("get", ticket, copy)
    _, told = getting.communicate(timeout=SECONDS)
    assert getting.returncode == 0, told
    assert copy.read_bytes() == data
    assert KEPT <= min(store.read_from) <= CUT_AT
    assert not store.partial.exists()


@pytest.mark.timeout(3 * SECONDS)
def test_after_the_provider_failed(tmp_path: Path, provider: tuple[CutStore, bytes, str]) -> None:
    store, data, ticket = provider
    store.may_fail.set()
    getting = terminal("get", ticket, tmp_path / "copy")
    _, told = getting.communicate(timeout=SECONDS)
    assert getting.returncode == 1
    told = " ".join(told.split())
    assert "could not be fetched" in told
    assert BlobTicket.parse(ticket).addr.id.hex() in told.replace(" ", "")
    finishes_from_where_it_stopped(store, data, ticket, tmp_path / "copy")


@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_after_the_getter_was_stopped(
    tmp_path: Path, provider: tuple[CutStore, bytes, str], how: signal.Signals
) -> None:
    store, data, ticket = provider
    getting = terminal("get", ticket, tmp_path / "copy")
    assert store.is_reached.wait(SECONDS)
    getting.send_signal(how)
    _, told = getting.communicate(timeout=SECONDS)
    store.may_fail.set()
    if how is signal.SIGINT:
        assert getting.returncode == 130
        assert "What arrived is kept." in told
    finishes_from_where_it_stopped(store, data, ticket, tmp_path / "copy")
