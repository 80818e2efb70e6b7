"""The ledger of a run on the host's disk, beside the saved states: ``<run_id>-<host>.ledger.jsonl``.

``host`` are the first 8 digits of the key that signs it: a host that comes back with another key begins another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

from ...comm.signing import SecretKey
from ...errors import ConfigurationError, ProtocolError
from ..ledger import GENESIS, MAX_LINE_BYTES, Entry, LedgerTotals, check_ledger, line_hash, write_line
from ..rules.points import EpochAccount

__all__ = ["LedgerFile", "read_ledger"]

SUFFIX: Final = ".ledger.jsonl"


class LedgerFile:
    """Appends to a ledger, after what is there was checked.

    Args:
        directory: folder of the run's saved states.
        run_id: the run.
        key: the host's.
        follows: hash of the last line of the ledger of the host before, 64 hexadecimal digits, for a new file; None if
            there is none, or nobody knows it.

    Raises:
        ConfigurationError: what is there is damaged, or was signed by another key.
    """

    def __init__(self, directory: Path, run_id: str, key: SecretKey, *, follows: str | None = None) -> None:
        self.path = directory / f"{quote(run_id, safe='')}-{key.public.hex()[:8]}{SUFFIX}"
        self._run_id = run_id
        self._key = key
        advice = "move it away to begin a new one"
        totals = check_ledger(()) if not self.path.exists() else read_ledger(self.path, advice=advice)
        if totals.lines and (totals.host, totals.run) != (key.public, run_id):
            raise ConfigurationError(
                f"{self.path} is signed by {totals.host.hex()[:8]}, the key of this host is {key.public.hex()[:8]}: "
                f"give the key of before, or {advice}",
                name="save_dir",
                value=self.path,
            )
        self._number, self._last = totals.lines, totals.last
        if not totals.lines and follows is not None:
            self._last = follows

    @property
    def last(self) -> str | None:
        """Hash of the last line, 64 hexadecimal digits; None if there is none yet, here or before."""
        return None if self._last == GENESIS else self._last

    def append(self, account: EpochAccount, now: int) -> None:
        """Writes down an epoch.

        Raises:
            OSError: it cannot be written.
        """
        line = write_line(Entry(self._number, self._last, self._run_id, self._key.public, now, account), self._key)
        with self.path.open("ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._number, self._last = self._number + 1, line_hash(line)


def read_ledger(path: Path, *, advice: str = "", host: str | None = None, holding: str | None = None) -> LedgerTotals:
    """Checks a ledger.

    Args:
        path: of the file.
        advice: what to do about a damaged one; goes into the message.
        host: public key that has to have signed it, in hexadecimal; None takes any.
        holding: hash of a line that has to be in it.

    Raises:
        ConfigurationError: it cannot be read, or is not in order.
    """
    try:
        with path.open("rb") as file:
            totals = check_ledger(_lines(file))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}", name="file", value=path) from None
    except ProtocolError as error:
        more = f"; {advice}" if advice else ""
        raise ConfigurationError(f"{path} is not in order: {error}{more}", name="file", value=path) from error
    if host is not None and totals.host.hex() != host.lower():
        raise ConfigurationError(f"{path} is signed by {totals.host.hex()}, not by {host}", name="host", value=host)
    if holding is not None and holding.lower() not in totals.hashes:
        raise ConfigurationError(
            f"{path} does not hold the line {holding}: it was cut off, or written anew", name="last", value=holding
        )
    return totals


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 2):
        if not line.endswith(b"\n"):
            raise ProtocolError("the last line is cut, or is longer than any")
        yield line[:-1]
