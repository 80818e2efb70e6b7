"""From the ``data_location`` of a run to the provider of its training data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ..comm.signing import SecretKey
from ..coordinator.model import (
    DummyData,
    HttpLLMTrainingDataLocation,
    LLMTrainingDataLocation,
    LocalData,
    PreprocessedData,
    ServerData,
    TokenSize,
    WeightedHttpData,
)
from ..errors import ConfigurationError
from .data_file import read_data_file
from .dummy import DummyTokens
from .mirrors.places import MAX_MIRRORS, CopyOnDisk, mirror_of, name_of
from .mirrors.source import Closable, Source
from .mirrors.tokens import MirroredTokens
from .mixture import WeightedTokens
from .mixture_file import MAX_FILE_BYTES, read_mixture
from .parquet import ParquetTokens, download_dataset
from .provider import TokenProvider
from .remote.client import DataServerTokens, ServerTimeouts
from .token_files import TokenFiles, token_size_on_disk
from .web.client import WebClient, WebTimeouts
from .web.files import plain_url
from .web.tokens import HttpTokens

__all__ = ["open_mixture", "open_token_data"]

BRIEF_ATTEMPTS: Final = 2
"""At a web server, where there are other places to ask."""

BRIEF_SERVER: Final = ServerTimeouts(attempts=BRIEF_ATTEMPTS, seconds=10.0)
"""The same at a data server."""


def open_token_data(
    location: LLMTrainingDataLocation,
    seq_len: int,
    *,
    vocab_size: int | None = None,
    key: SecretKey | None = None,
    token_size: TokenSize | None = None,
    patience: WebTimeouts | None = None,
    download: Callable[[str], Path] = download_dataset,
    mirrors: Sequence[str] = (),
    tell: Callable[[str], None] | None = None,
) -> TokenProvider:
    """Opens the training data of a run: ``open_token_data(state.model.data_location, state.model.max_seq_len, ...)``.

    Blocks while servers are asked for sizes. Call :meth:`~.provider.TokenProvider.probe` to find out before training
    whether the data can be trained on.

    Args:
        location: where they are.
        seq_len: tokens of a sequence. Dummy data have their own length, as in Psyche.
        vocab_size: tokens the model knows, to refuse data made with another tokenizer.
        key: who we are; a data server wants to know.
        token_size: width of the tokens of a ``Local`` folder, if no file beside them says it.
        patience: with web servers.
        download: gets a data set of the Hugging Face hub and returns its folder.
        mirrors: where else the same data are: URLs, ``host:port``, or files and folders of this machine. What the run's
            own place does not give, or gives wrong, is read there, and what they give is compared.
        tell: told what is wrong with a place, if there are several; by default a warning is logged.

    Raises:
        ConfigurationError: the location makes no sense, or cannot be used here; the message says what can.
        DataUnavailableError: the data cannot be fetched now.
        InvalidDataError: they are wrong.
    """
    open_one = partial(
        _open_one, seq_len=seq_len, vocab_size=vocab_size, key=key, token_size=token_size, download=download
    )
    if not mirrors:
        return open_one(location, server=None, new_client=lambda: WebClient(patience))
    if len(mirrors) > MAX_MIRRORS:
        raise ConfigurationError(
            f"{len(mirrors)} mirrors of the training data are too many, at most {MAX_MIRRORS} can be used",
            name="mirrors",
        )
    places = [location, *(mirror_of(location, mirror) for mirror in mirrors)]
    brief = patience or WebTimeouts(attempts=BRIEF_ATTEMPTS)

    def opened(place: LLMTrainingDataLocation | CopyOnDisk, keep: Callable[[Closable], None]) -> TokenProvider:
        def new_client() -> WebClient:
            client = WebClient(brief)
            keep(client)
            return client

        return open_one(place, server=BRIEF_SERVER, new_client=new_client)

    sources = [Source(name_of(place), partial(opened, place)) for place in places]
    return MirroredTokens(sources, seq_len, vocab_size=vocab_size, tell=tell)


def _open_one(
    location: LLMTrainingDataLocation | CopyOnDisk,
    *,
    seq_len: int,
    vocab_size: int | None,
    key: SecretKey | None,
    token_size: TokenSize | None,
    download: Callable[[str], Path],
    server: ServerTimeouts | None,
    new_client: Callable[[], WebClient],
) -> TokenProvider:
    """One place. Closing the clients that it took ends an opening early."""
    match location:
        case DummyData():
            return DummyTokens()
        case ServerData(address):
            if key is None:
                raise ConfigurationError(
                    f"the run's data are at the data server {address}, which asks who we are: pass key", name="key"
                )
            return DataServerTokens(address, key, seq_len, vocab_size=vocab_size, patience=server)
        case LocalData(path):
            return _local(path, seq_len, vocab_size, token_size)
        case HttpLLMTrainingDataLocation(place, size, shuffle):
            return HttpTokens.open(place, size, seq_len, shuffle, vocab_size=vocab_size, client=new_client())
        case CopyOnDisk(files, size, shuffle):
            return TokenFiles(files, size, seq_len, shuffle, vocab_size=vocab_size, spare_tokens=1)
        case WeightedHttpData(url):
            return _mixture(url, seq_len, vocab_size, new_client)
        case PreprocessedData(place):
            folder = Path(place) if Path(place).is_dir() else download(place)
            return ParquetTokens(folder, seq_len, vocab_size=vocab_size)
        case _:
            raise ConfigurationError(
                f"training data of the kind {type(location).__name__} are not supported: Dummy, Server, Local, Http, "
                "WeightedHttp and Preprocessed are",
                name="data_location",
                value=location,
            )


def open_mixture(
    url: str, seq_len: int, *, vocab_size: int | None = None, patience: WebTimeouts | None = None
) -> WeightedTokens:
    """Opens the mixture whose JSON list is at ``url``.

    Raises:
        ConfigurationError, DataUnavailableError, InvalidDataError: see :func:`open_token_data`.
    """
    return _mixture(url, seq_len, vocab_size, lambda: WebClient(patience))


def _mixture(url: str, seq_len: int, vocab_size: int | None, new_client: Callable[[], WebClient]) -> WeightedTokens:
    with contextlib.closing(new_client()) as client:
        mixture = read_mixture(client.get(plain_url(url), MAX_FILE_BYTES))
    with contextlib.ExitStack() as opened:
        members = [
            opened.enter_context(
                HttpTokens.open(
                    member.location, member.token_size_in_bytes, seq_len, member.shuffle, client=new_client()
                )
            )
            for member in mixture.members
        ]
        provider = WeightedTokens(members, mixture.weights, mixture.shuffle, vocab_size=vocab_size)
        opened.pop_all()
    return provider


def _local(path: str, seq_len: int, vocab_size: int | None, token_size: TokenSize | None) -> TokenProvider:
    """A folder or a file of tokens, or a ``data.toml``, which has an order and a width of its own."""
    if path.endswith(".toml"):
        provider = read_data_file(path, vocab_size=vocab_size)
        if provider.seq_len != seq_len:
            provider.close()
            raise ConfigurationError(
                f"{path} makes sequences of {provider.seq_len} tokens, the run wants {seq_len}: set seq_len there",
                name="seq_len",
                value=provider.seq_len,
            )
        return provider
    size = token_size or token_size_on_disk(path)
    if size is None:
        raise ConfigurationError(
            f"nothing says how wide the tokens in {path} are: pass token_size, name a data.toml instead of the folder, "
            "or make the files with distro-optim tokenize",
            name="token_size",
        )
    return TokenFiles(path, size, seq_len, vocab_size=vocab_size)
