"""Makes a token file of a folder of texts: ``distro-optim tokenize``.

Memory does not grow with the texts, and the work can be interrupted at any time: done again, it goes on where it was,
and the file has the same bytes as if it had been made at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ...console import narrated
from ...coordinator.model import TokenSize
from ...errors import InvalidDataError
from ..sidecar import Sidecar
from .corpus import Corpus, Piece
from .token_writer import Progress as Done
from .token_writer import TokenWriter, files_beside
from .vocabulary import TextTokenizer, load_tokenizer

__all__ = ["TokenizeOptions", "run_tokenize", "tokenize"]

BATCH_BYTES: Final = 2 * 1024 * 1024
"""Text that is tokenized at once, so that several cores have work."""

KEPT_EVERY: Final = 4 * 1024 * 1024
"""Bytes of text after which the work is made sure of; some seconds' worth for a slow tokenizer on one core."""


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """What the command was asked for.

    Attributes:
        folder: with the texts.
        tokenizer: ``bytes``, a ``tokenizer.json``, or a folder with one.
        out: the token file to be made.
        include: patterns of the names of the texts; all of them if empty.
        end_token: what ends a text, if not what the tokenizer says.
        restart: begin again, whatever is there.
    """

    folder: Path
    tokenizer: str
    out: Path
    include: Sequence[str] = ()
    end_token: str | None = None
    restart: bool = False


def tokenize(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    out: Path,
    *,
    restart: bool = False,
    kept_every: int = KEPT_EVERY,
    on_progress: Callable[[Done], None] | None = None,
) -> Sidecar:
    """Makes the file ``out``, or what is missing of it.

    Args:
        corpus: the texts.
        tokenizer: makes tokens of them.
        out: the file.
        restart: begin again, whatever is there.
        kept_every: bytes of text between two places to go on from.
        on_progress: told after every batch.

    Raises:
        ConfigurationError: the file cannot be made here; the message says what to do.
        InvalidDataError: the tokenizer gives tokens that it says it does not have.
    """
    small = tokenizer.vocab_size <= 1 << 16
    size = TokenSize.TWO_BYTES if small else TokenSize.FOUR_BYTES
    goal = Sidecar(0, size, tokenizer.vocab_size, 0, tokenizer.name, tokenizer.digest, corpus.digest)
    with TokenWriter(out, goal, restart=restart) as writer:
        done = writer.progress
        if writer.is_done:
            return replace(goal, tokens=done.tokens, documents=done.documents)
        kept = done.done
        for batch in _batches(corpus.pieces(done.file, done.offset)):
            done = _write(writer, tokenizer, batch, done)
            if done.done - kept >= kept_every:
                writer.keep(done)
                kept = done.done
            if on_progress is not None:
                on_progress(done)
        return writer.finish(done)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of :data:`BATCH_BYTES` together, or one that is longer."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.text) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text)
    if batch:
        yield batch


def _write(writer: TokenWriter, tokenizer: TextTokenizer, batch: Sequence[Piece], done: Done) -> Done:
    start, end = np.array(tokenizer.start, np.uint32), np.array(tokenizer.end, np.uint32)
    tokens, documents = done.tokens, done.documents
    for piece, encoded in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
        parts = [start] if piece.start == 0 else []
        parts += [encoded, end] if piece.is_last else [encoded]
        for part in parts:
            if part.size and int(part.max()) >= tokenizer.vocab_size:
                raise InvalidDataError(
                    f"{tokenizer.name} makes the token {part.max()} of {piece.file}, beyond its vocabulary of "
                    f"{tokenizer.vocab_size}"
                )
            writer.write(part)
            tokens += part.size
        documents += piece.is_last
    last = batch[-1]
    return Done(
        done.work,
        last.file,
        None if last.is_last else last.start + len(last.text),
        done.done + sum(len(piece.text) for piece in batch),
        tokens,
        documents,
    )


def run_tokenize(options: TokenizeOptions, console: Console | None = None) -> Sidecar:
    """The command: a bar while it works, a line when it is done.

    Raises:
        DistroError: see :func:`tokenize`.
    """
    console = console or Console(file=sys.stderr)
    with narrated("reading the tokenizer"):
        tokenizer = load_tokenizer(options.tokenizer, end_token=options.end_token)
    with narrated(f"looking through {options.folder}"):
        corpus = Corpus(options.folder, options.include, exclude=files_beside(options.out))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    so_far = ["tokenizing"]
    with bar:
        task = bar.add_task(f"{corpus.num_files} texts", total=corpus.num_bytes, tokens="")

        def show(done: Done) -> None:
            bar.update(task, completed=done.done, tokens=f"{done.tokens:,} tokens")
            so_far[:] = [f"{done.done:,} of {corpus.num_bytes:,} bytes of text, {done.tokens:,} tokens"]

        def line(text: str) -> None:
            if not console.is_terminal:  # which has the bar
                console.print(text, highlight=False, markup=False, soft_wrap=True)

        with narrated(lambda: so_far[0], line):
            made = tokenize(corpus, tokenizer, options.out, restart=options.restart, on_progress=show)
        bar.update(task, completed=corpus.num_bytes)
    skipped = f"; {corpus.num_skipped} files are not text" if corpus.num_skipped else ""
    apart = "" if tokenizer.start or tokenizer.end else "; nothing stands between two texts (--end-token)"
    width = os.stat(options.out).st_size // max(made.tokens, 1)
    console.print(
        f"{options.out}: {made.tokens:,} tokens of {width} bytes from {made.documents:,} texts, vocabulary of "
        f"{made.vocab_size:,} ({made.tokenizer}){skipped}{apart}",
        highlight=False,
        soft_wrap=True,
    )
    return made
