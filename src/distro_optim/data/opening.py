"""From the ``data_location`` of a run to the provider of its training data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

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
from .mixture import WeightedTokens
from .mixture_file import MAX_FILE_BYTES, read_mixture
from .parquet import ParquetTokens, download_dataset
from .provider import TokenProvider
from .remote.client import DataServerTokens
from .token_files import TokenFiles, token_size_on_disk
from .web.client import WebClient, WebTimeouts
from .web.files import plain_url
from .web.tokens import HttpTokens

__all__ = ["open_mixture", "open_token_data"]


def open_token_data(
    location: LLMTrainingDataLocation,
    seq_len: int,
    *,
    vocab_size: int | None = None,
    key: SecretKey | None = None,
    token_size: TokenSize | None = None,
    patience: WebTimeouts | None = None,
    download: Callable[[str], Path] = download_dataset,
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

    Raises:
        ConfigurationError: the location makes no sense, or cannot be used here; the message says what can.
        DataUnavailableError: the data cannot be fetched now.
        InvalidDataError: they are wrong.
    """
    match location:
        case DummyData():
            return DummyTokens()
        case ServerData(address):
            if key is None:
                raise ConfigurationError(
                    f"the run's data are at the data server {address}, which asks who we are: pass key", name="key"
                )
            return DataServerTokens(address, key, seq_len, vocab_size=vocab_size)
        case LocalData(path):
            return _local(path, seq_len, vocab_size, token_size)
        case HttpLLMTrainingDataLocation(place, size, shuffle):
            client = WebClient(patience)
            return HttpTokens.open(place, size, seq_len, shuffle, vocab_size=vocab_size, client=client)
        case WeightedHttpData(url):
            return open_mixture(url, seq_len, vocab_size=vocab_size, patience=patience)
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
    with contextlib.closing(WebClient(patience)) as client:
        mixture = read_mixture(client.get(plain_url(url), MAX_FILE_BYTES))
    with contextlib.ExitStack() as opened:
        members = [
            opened.enter_context(
                HttpTokens.open(
                    member.location, member.token_size_in_bytes, seq_len, member.shuffle, client=WebClient(patience)
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
