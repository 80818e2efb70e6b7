"""Known data behind every kind of provider, for the checks that all of them pass."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from typing_extensions import override

from coordinator.coordinator_swarm import key
from distro_optim.comm.streams import TcpListener
from distro_optim.coordinator.model import DontShuffle, NumberedFiles, Seeded, Shuffle, TokenSize
from distro_optim.coordinator.types import Client, Coordinator, NodeIdentity
from distro_optim.data.dummy import DummyTokens
from distro_optim.data.mirrors.source import Closable, Source
from distro_optim.data.mirrors.tokens import MirroredTokens
from distro_optim.data.mixture import WeightedTokens
from distro_optim.data.mixture_index import MixtureIndex
from distro_optim.data.parquet import ParquetTokens
from distro_optim.data.provider import TokenProvider
from distro_optim.data.remote.client import DataServerTokens, ServerTimeouts
from distro_optim.data.remote.server import DataServer
from distro_optim.data.remote.service import DataService
from distro_optim.data.shuffle import ChaCha8, slice_shuffle
from distro_optim.data.token_files import TokenFiles
from distro_optim.data.web.client import WebClient, WebTimeouts
from distro_optim.data.web.tokens import HttpTokens
from distro_optim.testing.token_data import TokenDataArena
from runs import waiting_run
from token_data.web_server import WebServer

SEED = bytes(range(1, 33))
SEQ_LEN = 8


def never_wait(seconds: float) -> None:
    """In place of the waits between attempts."""


def member_state() -> Coordinator:
    """A run whose only member is client 1."""
    state = waiting_run("run")
    member = Client(NodeIdentity.from_single_key(key(1).public))
    return replace(state, epoch_state=replace(state.epoch_state, clients=(member,)))


def token_files(spare: int) -> list[np.ndarray[Any, np.dtype[np.uint16]]]:
    """Three files of 5, 3 and 2 sequences that count, whose tokens tell where they are from."""
    return [
        np.arange(first, first + count * SEQ_LEN + spare + 1, dtype=np.uint16)
        for first, count in ((1000, 5), (2000, 3), (3000, 2))
    ]


def shuffled(sequences: list[list[int]], shuffle: Shuffle) -> list[list[int]]:
    if isinstance(shuffle, Seeded):
        slice_shuffle(sequences, ChaCha8(shuffle.seed))
    return sequences


def sequences_of(files: list[np.ndarray[Any, np.dtype[np.uint16]]], shuffle: Shuffle) -> list[list[int]]:
    counts = (5, 3, 2)
    found = [
        file[place * SEQ_LEN : (place + 1) * SEQ_LEN].tolist()
        for file, count in zip(files, counts, strict=True)
        for place in range(count)
    ]
    return shuffled(found, shuffle)


class _ListArena(TokenDataArena):
    """Whose content is a list."""

    seq_len = SEQ_LEN
    shuffle: Shuffle = DontShuffle()

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.content: list[list[int]] = []

    @property
    @override
    def count(self) -> int:  # type: ignore[override]
        return len(self.content)

    @override
    def expected(self, index: int) -> list[int]:
        return self.content[index]

    @override
    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


class FilesArena(_ListArena):
    token_size = TokenSize.TWO_BYTES

    def __init__(self) -> None:
        super().__init__()
        files = token_files(0)
        width = "<u2" if self.token_size is TokenSize.TWO_BYTES else "<u4"
        for name, file in zip(("a.bin", "b.ds", "c.npy"), files, strict=True):
            (self.path / name).write_bytes(file.astype(width).tobytes())
        self.content = sequences_of(files, self.shuffle)

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        return TokenFiles(self.path, self.token_size, SEQ_LEN, self.shuffle, vocab_size=vocab_size)


class ShuffledFilesArena(FilesArena):
    shuffle = Seeded(SEED)
    token_size = TokenSize.FOUR_BYTES


class HttpArena(_ListArena):
    def __init__(self) -> None:
        super().__init__()
        files = token_files(1)
        self.server = WebServer({f"/{number:03}.ds": file.tobytes() for number, file in enumerate(files, start=7)})
        self.server.__enter__()
        self.content = sequences_of(files, self.shuffle)

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        location = NumberedFiles(self.server.url + "/{}.ds", start_index=7, n_left_pad_zeros=3, num_files=3)
        client = WebClient(WebTimeouts(seconds=20), wait=never_wait)
        return HttpTokens.open(
            location, TokenSize.TWO_BYTES, SEQ_LEN, self.shuffle, vocab_size=vocab_size, client=client
        )

    @override
    def __exit__(self, *_: object) -> None:
        self.server.__exit__()
        super().__exit__()


class ShuffledHttpArena(HttpArena):
    shuffle = Seeded(SEED)


class MixtureArena(_ListArena):
    ends = False
    weights = (1.0, 3.0)

    def __init__(self) -> None:
        super().__init__()
        self.parts = [
            [[first + place * SEQ_LEN + token for token in range(SEQ_LEN)] for place in range(count)]
            for first, count in ((1000, 4), (2000, 7))
        ]
        for number, part in enumerate(self.parts):
            (self.path / str(number)).mkdir()
            tokens = np.array([*part, [0] * SEQ_LEN], dtype="<u2")  # the last sequence of a file does not count
            (self.path / str(number) / "a.bin").write_bytes(tokens.tobytes())
        index = MixtureIndex([4, 7], self.weights, self.shuffle)
        places = [index.locate(place) for place in range(len(index))]
        self.content = [self.parts[member][sample] for member, sample in places]

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        members = [TokenFiles(self.path / str(number), TokenSize.TWO_BYTES, SEQ_LEN) for number in range(2)]
        return WeightedTokens(members, self.weights, self.shuffle, vocab_size=vocab_size)


class ShuffledMixtureArena(MixtureArena):
    shuffle = Seeded(SEED)


class ParquetArena(_ListArena):
    ends = False

    def __init__(self) -> None:
        super().__init__()
        rows = [[1000 + row * SEQ_LEN + token for token in range(SEQ_LEN)] for row in range(12)]
        for name, part in (("train-00000.parquet", rows[:7]), ("train-00001.parquet", rows[7:])):
            table = pyarrow.table({"inputs": pyarrow.array(part, pyarrow.list_(pyarrow.int64()))})
            pyarrow.parquet.write_table(table, self.path / name, row_group_size=2)
        self.content = shuffled(rows, self.shuffle)

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        return ParquetTokens(self.path, SEQ_LEN, self.shuffle, vocab_size=vocab_size)


class ShuffledParquetArena(ParquetArena):
    shuffle = Seeded(SEED)


class DummyArena(_ListArena):
    def __init__(self) -> None:
        super().__init__()
        self.content = [[0] * SEQ_LEN] * 5

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        return DummyTokens(SEQ_LEN, num_sequences=5)


class EndlessDummyArena(DummyArena):
    ends = False

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        return DummyTokens(SEQ_LEN)


class RunningDataServer:
    """A data server on a TCP port, in a thread of its own."""

    def __init__(self, tokens: TokenProvider, state: Callable[[], Coordinator] = member_state) -> None:
        self._tokens = tokens
        self._state = state
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))
        self.address = ""

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        listener = await TcpListener.bind("127.0.0.1", 0)
        self.address = listener.address
        service = DataService(self._tokens, self._state, draw=os.urandom)
        async with DataServer(service, self._tokens, [listener]):
            self._ready.set()
            await self._stop.wait()

    def __enter__(self) -> RunningDataServer:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


class ServerArena(FilesArena):
    shuffle = Seeded(SEED)

    def __init__(self) -> None:
        super().__init__()
        self.tokens = super().open()
        self.server = RunningDataServer(self.tokens)
        self.server.__enter__()

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        patience = ServerTimeouts(attempts=2)
        return DataServerTokens(
            self.server.address, key(1), SEQ_LEN, vocab_size=vocab_size, patience=patience, wait=never_wait
        )

    @override
    def __exit__(self, *_: object) -> None:
        self.server.__exit__()
        self.tokens.close()
        super().__exit__()


class MirrorArena(ShuffledFilesArena):
    """The run's own place gives sequences that are too short, and two others have the data."""

    @override
    def open(self, *, vocab_size: int | None = None) -> TokenProvider:
        def files(keep: Callable[[Closable], None]) -> TokenProvider:
            return TokenFiles(self.path, self.token_size, SEQ_LEN, self.shuffle, vocab_size=vocab_size)

        def short(keep: Callable[[Closable], None]) -> TokenProvider:
            return DummyTokens(SEQ_LEN - 1, num_sequences=self.count)

        sources = [Source(opener.__name__, opener) for opener in (short, files, files)]
        return MirroredTokens(sources, SEQ_LEN, vocab_size=vocab_size, pause=never_wait)


ARENAS: list[type[TokenDataArena]] = [
    MirrorArena,
    FilesArena,
    ShuffledFilesArena,
    HttpArena,
    ShuffledHttpArena,
    MixtureArena,
    ShuffledMixtureArena,
    ParquetArena,
    ShuffledParquetArena,
    DummyArena,
    EndlessDummyArena,
    ServerArena,
]
