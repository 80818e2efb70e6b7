"""Tokenizers for making token files: from text to numbers, and what stands between two texts."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from ...errors import ConfigurationError, InvalidDataError, MissingDependencyError
from ...words import shown

__all__ = ["BYTES", "ByteTokenizer", "HfTokenizer", "TextTokenizer", "load_tokenizer"]

BYTES: Final = "bytes"
"""The name of the tokenizer that needs nothing."""

END_TOKENS: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end|>", "[SEP]")
"""What ends a text in well-known vocabularies, for tokenizers that put nothing around a text themselves."""


class TextTokenizer(ABC):
    """Turns texts into tokens.

    Attributes:
        name: for people.
        vocab_size: one more than its largest token.
        start: tokens before each text.
        end: tokens after each text.
        digest: SHA-256 of all that decides about the tokens, in hexadecimal.
    """

    name: str
    vocab_size: int
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    digest: str

    @abstractmethod
    def encode(self, pieces: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        """``(n,) uint32`` for each piece of UTF-8 text, without :attr:`start` and :attr:`end`. What is not UTF-8 in a
        piece becomes U+FFFD where the tokenizer knows characters only."""


class ByteTokenizer(TextTokenizer):
    """Every byte is a token, and 0, which is in no text, ends one."""

    def __init__(self) -> None:
        self.name = BYTES
        self.vocab_size = 256
        self.end = (0,)
        self.digest = hashlib.sha256(b"bytes, 0 at the end").hexdigest()

    @override
    def encode(self, pieces: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        return [np.frombuffer(piece, dtype=np.uint8).astype(np.uint32) for piece in pieces]


class HfTokenizer(TextTokenizer):
    """A ``tokenizers.Tokenizer``, as ``tokenizer.json`` holds one.

    The names of special tokens in a text are text: nobody who writes ``</s>`` into a file ends it.

    Args:
        tokenizer: changed so that it neither cuts nor fills texts.
        name: for people.
        end_token: what ends a text; by default what the tokenizer itself puts there, or one of :data:`END_TOKENS`.

    Raises:
        ConfigurationError: it does not know ``end_token``.
    """

    def __init__(self, tokenizer: Any, name: str, *, end_token: str | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.name = name
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise ConfigurationError(f"{name} has no tokens at all", name="tokenizer")
        self.start, self.end = self._surroundings(end_token)
        settled = f"{self.start} {self.end} {tokenizer.to_str()}"
        self.digest = hashlib.sha256(settled.encode("utf-8", "surrogatepass")).hexdigest()

    @override
    def encode(self, pieces: Sequence[bytes]) -> list[NDArray[np.uint32]]:
        texts = [piece.decode("utf-8", "replace") for piece in pieces]
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if not _is_of_the_library(error):
                raise
            raise InvalidDataError(
                f"the tokenizer {self.name} cannot read this text: {shown(str(error), 200)}; use another tokenizer"
            ) from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _surroundings(self, end_token: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the tokenizer puts around a text, found by trying."""
        probe = "a"
        bare = self._tokenizer.encode(probe, add_special_tokens=False).ids
        dressed = self._tokenizer.encode(probe, add_special_tokens=True).ids
        start: tuple[int, ...] = ()
        end: tuple[int, ...] = ()
        for place in range(len(dressed) - len(bare) + 1):
            if dressed[place : place + len(bare)] == bare:
                start, end = tuple(dressed[:place]), tuple(dressed[place + len(bare) :])
                break
        if end_token is not None:
            token = self._tokenizer.token_to_id(end_token)
            if token is None:
                raise ConfigurationError(
                    f"{self.name} has no token {end_token!r} to end texts with", name="end_token", value=end_token
                )
            return start, (token,)
        if not start and not end:
            known = [token for text in END_TOKENS if (token := self._tokenizer.token_to_id(text)) is not None]
            end = tuple(known[:1])
        return start, end


def load_tokenizer(path: str | os.PathLike[str], *, end_token: str | None = None) -> TextTokenizer:
    """The tokenizer ``bytes``, of a ``tokenizer.json``, or of a model's folder.

    Raises:
        ConfigurationError: there is none, or it cannot be read.
        MissingDependencyError: tokenizers or transformers is not installed.
    """
    if os.fspath(path) == BYTES:
        if end_token is not None:
            raise ConfigurationError("the tokenizer bytes ends texts with 0 and knows no other end", name="end_token")
        return ByteTokenizer()
    place = Path(path)
    if place.is_dir() and (place / "tokenizer.json").is_file():
        place = place / "tokenizer.json"
    if not place.exists():
        raise ConfigurationError(
            f"there is not a tokenizer at {path}: name a tokenizer.json, a folder with one, or {BYTES}",
            name="tokenizer",
            value=path,
        )
    try:
        tokenizer = _from_folder(place) if place.is_dir() else _from_file(place)
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs the package {error.name}: pip install {error.name}, or use the tokenizer {BYTES}"
        ) from None
    except ConfigurationError:
        raise
    except BaseException as error:
        raise _not_a_tokenizer(place, path, error) from error
    name = place.parent.name if place.name == "tokenizer.json" else place.name
    try:
        return HfTokenizer(tokenizer, name or str(place), end_token=end_token)
    except ConfigurationError:
        raise
    except BaseException as error:
        raise _not_a_tokenizer(place, path, error) from error


def _not_a_tokenizer(place: Path, given: str | os.PathLike[str], error: BaseException) -> ConfigurationError:
    """What to raise for an error of the library; raises the error itself if it is none of the library's."""
    if not _is_of_the_library(error):
        raise error
    return ConfigurationError(
        f"{place} is not a tokenizer that works: {shown(str(error), 200)}", name="tokenizer", value=given
    )


def _is_of_the_library(error: BaseException) -> bool:
    """Whether ``tokenizers`` raised it: an Exception, nothing more precise, or a panic of Rust, which is not even that.

    The class of panics cannot be imported from anywhere.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigurationError(
            f"the tokenizer in {folder} has no fast form: save it as tokenizer.json first",
            name="tokenizer",
            value=folder,
        )
    return backend
