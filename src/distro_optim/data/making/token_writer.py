"""A token file that is written over several lives of a process.

While it grows it is ``tokens.bin.partial``, with ``tokens.bin.progress`` beside it, which says how far it can be
trusted. What was written after that is cut off when the next process goes on, which then writes it again: the finished
file has the same bytes however often the work was interrupted. Only a finished file gets its name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Final

from numpy.typing import NDArray

from ...comm.postcard import U64, Limit
from ...coordinator.formats.text import from_json, to_json
from ...coordinator.server.store import lock_file, write_whole
from ...errors import ConfigurationError, InvalidDataError, ProtocolError
from ..sequences import TOKEN_TYPES
from ..sidecar import Sidecar, read_sidecar, sidecar_path

__all__ = ["Progress", "TokenWriter", "files_beside"]

MAX_PROGRESS_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
        work: what is being done, as a digest: another tokenizer or other texts are other work.
        file: the text that was worked on last; None at the start.
        offset: the byte of it that comes next; None if it is complete.
        done: bytes of text that are done.
        tokens: written.
        documents: texts that are complete.
    """

    work: str
    file: Annotated[str, Limit(1 << 15)] | None = None
    offset: U64 | None = None
    done: U64 = 0
    tokens: U64 = 0
    documents: U64 = 0


class TokenWriter:
    """Writes a token file, from where the last process was.

    Args:
        path: the file to be.
        goal: what it will be, but for what is not known yet: ``tokens`` and ``documents`` are filled in at the end.
        restart: begin again, whatever is there.

    Attributes:
        progress: where to go on.
        is_done: whether the file is there already, made of the same texts by the same tokenizer.

    Raises:
        ConfigurationError: another process writes it, something else has its name, or half of other work is there.
    """

    def __init__(self, path: str | os.PathLike[str], goal: Sidecar, *, restart: bool = False) -> None:
        self.path = Path(path)
        self._goal = goal
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._progress_path = self.path.with_name(self.path.name + ".progress")
        self._dtype = TOKEN_TYPES[goal.token_size]
        work = f"{goal.tokenizer_digest} {goal.corpus_digest} {goal.token_size.value}"
        self.progress = Progress(work)
        self.is_done = False
        self._file: IO[bytes] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_file(self._partial)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write {path}: {error.strerror or error}", name="out", value=path
            ) from None
        if self._lock is None:
            raise ConfigurationError(f"another process is making {path}: wait for it", name="out", value=path)
        try:
            self._begin(restart)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, tokens: NDArray[Any]) -> None:
        """Appends ``(n,)`` tokens, which count once :meth:`keep` was called.

        Raises:
            ConfigurationError: the file is done already.
        """
        self._output().write(tokens.astype(self._dtype).tobytes())

    def keep(self, progress: Progress) -> None:
        """From now on an interrupted work goes on here. What was written is on the disk first."""
        file = self._output()
        file.flush()
        os.fsync(file.fileno())
        write_whole(self._progress_path, to_json(progress).encode())
        self.progress = progress

    def _output(self) -> IO[bytes]:
        if self._file is None:
            raise ConfigurationError(f"{self.path} is done already: there is nothing to write", name="out")
        return self._file

    def finish(self, progress: Progress) -> Sidecar:
        """Gives the file its name, with its sidecar."""
        self.keep(progress)
        self._output().close()
        goal = self._goal
        sidecar = Sidecar(
            progress.tokens,
            goal.token_size,
            goal.vocab_size,
            progress.documents,
            goal.tokenizer,
            goal.tokenizer_digest,
            goal.corpus_digest,
        )
        # In this order: where the file is, so is what says what it should be.
        write_whole(sidecar_path(self.path), sidecar.to_text().encode())
        if os.name == "nt" and self._lock is not None:
            self._lock.close()  # there a file that is open cannot be moved
        os.replace(self._partial, self.path)
        self._progress_path.unlink(missing_ok=True)
        self.is_done = True
        return sidecar

    def close(self) -> None:
        """Lets other processes go on. Calling it again does nothing."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _begin(self, restart: bool) -> None:
        if self.path.exists() and not restart:
            sidecar = read_sidecar(self.path)
            if sidecar is None or not self._is_goal(sidecar):
                raise ConfigurationError(
                    f"{self.path} is there already, and not of these texts and this tokenizer: name another file, "
                    "or pass --restart to replace it",
                    name="out",
                    value=self.path,
                )
            self.is_done = True
            self.progress = Progress(self.progress.work, tokens=sidecar.tokens, documents=sidecar.documents)
            # The first was made for its lock, the second is of a process that was killed between its last two steps.
            self._partial.unlink(missing_ok=True)
            self._progress_path.unlink(missing_ok=True)
            return
        saved = None if restart else self._saved()
        if saved is not None:
            self.progress = saved
        self._file = open(self._partial, "r+b" if saved is not None else "wb")  # noqa: SIM115 - closed by close()
        kept = self.progress.tokens * self._dtype.itemsize
        if os.fstat(self._file.fileno()).st_size < kept:
            raise ConfigurationError(
                f"{self._partial} is shorter than {self._progress_path} says: pass --restart to begin again", name="out"
            )
        self._file.truncate(kept)
        self._file.seek(kept)

    def _saved(self) -> Progress | None:
        try:
            with open(self._progress_path, "rb") as file:
                saved = from_json(Progress, file.read(MAX_PROGRESS_BYTES).decode())
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, ProtocolError) as error:
            raise ConfigurationError(
                f"{self._progress_path} cannot be read: {error}; pass --restart to begin again", name="out"
            ) from None
        if saved.work != self.progress.work:
            raise ConfigurationError(
                f"{self._partial} is half of another work: the texts or the tokenizer have changed since; pass "
                "--restart to begin again",
                name="out",
            )
        return saved

    def _is_goal(self, sidecar: Sidecar) -> bool:
        goal = self._goal
        if self.path.stat().st_size != sidecar.tokens * self._dtype.itemsize:
            raise InvalidDataError(f"{self.path} is cut: pass --restart to make it again")
        return (sidecar.tokenizer_digest, sidecar.corpus_digest, sidecar.token_size) == (
            goal.tokenizer_digest,
            goal.corpus_digest,
            goal.token_size,
        )


def files_beside(path: Path) -> tuple[Path, ...]:
    """A token file and everything that may be beside it."""
    return path, *(path.with_name(path.name + ending) for ending in (".json", ".partial", ".progress"))
