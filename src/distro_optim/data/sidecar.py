"""What is known of a token file: a small JSON file beside it, ``tokens.bin.json`` for ``tokens.bin``.

Token files have no header, so that nothing in them tells their tokens' width, their vocabulary, or that they were cut.
``distro-optim tokenize`` writes this file, and :class:`~.token_files.TokenFiles` holds the tokens to it. Psyche ignores
it: its name ends otherwise than a token file's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..comm.postcard import U64
from ..coordinator.formats.text import from_json, to_json
from ..coordinator.model import TokenSize
from ..errors import InvalidDataError, ProtocolError

__all__ = ["Sidecar", "read_sidecar", "sidecar_path"]

MAX_BYTES: Final = 64 * 1024
"""A sidecar has a few hundred bytes."""


@dataclass(frozen=True)
class Sidecar:
    """The facts.

    Attributes:
        tokens: in the file.
        token_size: width of each.
        vocab_size: tokens that the tokenizer knows.
        documents: texts that were tokenized.
        tokenizer: its name, for people.
        tokenizer_digest: SHA-256 of what defines it, in hexadecimal.
        corpus_digest: SHA-256 of the names, sizes and times of the texts, in hexadecimal.
    """

    tokens: U64
    token_size: TokenSize
    vocab_size: U64
    documents: U64
    tokenizer: str
    tokenizer_digest: str
    corpus_digest: str

    def to_text(self) -> str:
        """JSON, as it stands in the file."""
        return to_json(self, indent=2) + "\n"


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of a token file is."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of the token file ``path``, None if it has none.

    Raises:
        InvalidDataError: there is one, and it cannot be understood.
    """
    beside = sidecar_path(path)
    try:
        with open(beside, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ProtocolError(f"more than {MAX_BYTES} bytes")
        return from_json(Sidecar, data.decode())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ProtocolError) as error:
        raise InvalidDataError(f"{beside} does not describe a token file: {error}") from None
