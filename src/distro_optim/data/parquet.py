"""Packed sequences in parquet files, with the labels that finetuning needs.

They need ``pip install 'distro-optim[parquet]'``.

PsycheFoundation/psyche, ``shared/data-provider/src/{preprocessed,dataset}.rs``; its script
``scripts/preprocess-finetuning-data.py`` writes such files. A row is a sequence, its columns are lists of integers:

====================  ==========================================================================
``inputs``            tokens, ``seq_len`` of them
``labels``            if there: as many, -100 where nothing is to be learnt
``position_ids``      if there: as many, from 0 again at the start of each text
``sequence_lengths``  if there: of the texts in the row, padding at the end counted as one
====================  ==========================================================================

Data indices go round: row ``index % rows``. (Where a batch has more sequences than there are rows, Psyche gives fewer;
here each index has its row.) Psyche reads all rows at once; here a few groups of rows are kept.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
from typing_extensions import override

from ..coordinator.model import DontShuffle, Seeded, Shuffle
from ..coordinator.types import BatchId
from ..errors import ConfigurationError, DataUnavailableError, InvalidDataError, MissingDependencyError
from ..words import shown
from .provider import IntArray, TokenProvider, TokenSequence
from .shuffle import ChaCha8, permutation

__all__ = ["ParquetTokens", "download_dataset", "find_parquet_files"]

SPLIT: Final = "train"
"""The part of a data set that Psyche's client trains on."""

REQUIRED: Final = "inputs"
OPTIONAL: Final = ("labels", "position_ids", "sequence_lengths")

GROUPS_KEPT: Final = 4
"""Groups of rows in memory; neighbours are in one, and a batch in one or two."""

MAX_SHUFFLED: Final = 1 << 28
"""Rows that are put in another order, which takes 8 bytes for each before any is read: a file may say that it has more
than it has. Chosen arbitrarily: with 2048 tokens in a row, so many are half a trillion."""


class ParquetTokens(TokenProvider):
    """The rows of a folder of parquet files.

    Args:
        directory: the folder.
        seq_len: tokens of a sequence.
        shuffle: the order; Psyche's client never shuffles these.
        vocab_size: tokens the model knows; None leaves that unchecked.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        ConfigurationError: the folder has no such files.
        InvalidDataError: a file is cut or has other columns.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        seq_len: int,
        shuffle: Shuffle = DontShuffle(),  # noqa: B008 - immutable
        *,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(seq_len, vocab_size=vocab_size)
        parquet = _pyarrow_parquet()
        self._paths = find_parquet_files(directory)
        self._files: list[Any] = []
        self._lock = threading.Lock()
        try:
            for path in self._paths:
                self._files.append(_opened(parquet, path))
            self._columns = _columns(self._paths, self._files)
            # (file, group) of all groups in order, and the first row of each.
            self._groups = [
                (number, group) for number, file in enumerate(self._files) for group in range(file.num_row_groups)
            ]
            rows = [_rows_of(self._paths[number], self._files[number], group) for number, group in self._groups]
            self._starts: list[int] = [0, *accumulate(rows)]
            if not self._starts[-1]:
                raise ConfigurationError(f"the parquet files in {directory} have no rows", name="dir", value=directory)
        except BaseException:
            self.close()
            raise
        if isinstance(shuffle, Seeded) and self._starts[-1] > MAX_SHUFFLED:
            self.close()
            raise InvalidDataError(
                f"the parquet files in {directory} say that they have {self._starts[-1]} rows, and at most "
                f"{MAX_SHUFFLED} are shuffled"
            )
        self._order = permutation(self._starts[-1], ChaCha8(shuffle.seed)) if isinstance(shuffle, Seeded) else None
        self._kept: OrderedDict[int, list[TokenSequence]] = OrderedDict()

    @property
    @override
    def num_sequences(self) -> int:
        return self._starts[-1]

    @override
    def has(self, batch: BatchId) -> bool:
        return True

    @override
    def close(self) -> None:
        super().close()
        with self._lock:
            for file in self._files:
                file.close()

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        with self._lock:
            return [self._row(index % self._starts[-1]) for index in range(batch.start, batch.end + 1)]

    def _row(self, row: int) -> TokenSequence:
        if self._order is not None:
            row = int(self._order[row])
        group = bisect_right(self._starts, row) - 1
        if group not in self._kept:
            self._kept[group] = self._group(group)
            while len(self._kept) > GROUPS_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group][row - self._starts[group]]

    def _group(self, group: int) -> list[TokenSequence]:
        number, inside = self._groups[group]
        try:
            table = self._files[number].read_row_group(inside, columns=self._columns)
            columns: dict[str, Sequence[Any]] = {
                name: _lists(table.column(name), self._paths[number], name) for name in self._columns
            }
        except InvalidDataError:
            raise
        except Exception as error:  # of a damaged file: pyarrow's, but also IndexError and NotImplementedError
            raise InvalidDataError(f"{self._paths[number]} is cut or damaged: {shown(str(error), 200)}") from error
        if table.num_rows != self._starts[group + 1] - self._starts[group]:
            raise InvalidDataError(f"{self._paths[number]} is damaged: it has fewer or more rows than it says")
        absent: list[IntArray | None] = [None] * table.num_rows
        optional = (columns.get(name, absent) for name in OPTIONAL)
        return [TokenSequence(*row) for row in zip(columns[REQUIRED], *optional, strict=True)]


def find_parquet_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The parquet files of a folder that hold the data to train on, sorted by their names without ending.

    All of them if the folder's name up to a ``-`` is :data:`SPLIT`, else those whose names begin with it.

    Raises:
        ConfigurationError: there are none.
    """
    folder = Path(directory).resolve()
    try:
        found = [path for path in folder.iterdir() if path.suffix == ".parquet"]
    except OSError as error:
        raise ConfigurationError(
            f"cannot read training data in {directory}: {error.strerror or error}", name="dir", value=directory
        ) from None
    if folder.name.partition("-")[0].lower() != SPLIT:
        found = [path for path in found if path.name.startswith(SPLIT)]
    if not found:
        raise ConfigurationError(
            f"{directory} has no parquet files to train on: they are called {SPLIT}*.parquet, or lie in a folder "
            f"called {SPLIT}",
            name="dir",
            value=directory,
        )
    return sorted(found, key=lambda path: path.stem)


def download_dataset(repo_id: str, *, hub: Any = None) -> Path:
    """Downloads the parquet files of a data set of the Hugging Face hub and returns the folder of the first one.

    Args:
        repo_id: such as ``someone/something``.
        hub: stands in for ``huggingface_hub``.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        DataUnavailableError: there is no such data set, or it cannot be downloaded.
    """
    if hub is None:
        try:
            import huggingface_hub as hub
        except ImportError:
            raise MissingDependencyError(
                "data sets are downloaded by huggingface_hub: pip install huggingface_hub"
            ) from None
    try:
        names = [
            name for name in hub.HfApi().list_repo_files(repo_id, repo_type="dataset") if name.endswith(".parquet")
        ]
        if not names:
            raise DataUnavailableError(f"data set {repo_id!r} has no parquet files")
        inside = Path(names[0]).parent
        wanted = [name for name in names if Path(name).parent == inside]
        folder = hub.snapshot_download(repo_id, repo_type="dataset", allow_patterns=wanted)
    except (OSError, ValueError, RuntimeError) as error:  # whatever transport it uses, its errors are of these
        raise DataUnavailableError(f"data set {repo_id!r} cannot be downloaded: {error}") from error
    return Path(folder) / inside


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingDependencyError(
            "preprocessed training data are parquet files, which need pyarrow: pip install 'distro-optim[parquet]'"
        ) from None
    return pyarrow.parquet


def _opened(parquet: Any, path: Path) -> Any:
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except Exception as error:  # see ParquetTokens._group
        raise InvalidDataError(f"{path} is cut, or no parquet file: {shown(str(error), 200)}") from error


def _rows_of(path: Path, file: Any, group: int) -> int:
    """Rows of a group, as the file says; whether it has them is seen when they are read."""
    rows = int(file.metadata.row_group(group).num_rows)
    if rows < 0:
        raise InvalidDataError(f"{path} is damaged: it says that a group has {rows} rows")
    return rows


def _columns(paths: Sequence[Path], files: Sequence[Any]) -> list[str]:
    """The columns to read: those of the first file, which all others must have."""
    columns: list[str] = []
    for path, file in zip(paths, files, strict=True):
        try:
            names = set(file.schema_arrow.names)
        except Exception as error:  # see ParquetTokens._group
            raise InvalidDataError(f"{path} has columns that cannot be read: {shown(str(error), 200)}") from error
        if not columns:
            columns = [name for name in (REQUIRED, *OPTIONAL) if name in names]
        absent = {REQUIRED, *columns} - names
        if absent:
            raise InvalidDataError(
                f"{path} has no column {sorted(absent)[0]!r}; it has {', '.join(sorted(names))[:200]}"
            )
    return columns


def _lists(column: Any, path: Path, name: str) -> list[IntArray]:
    """The rows of a column of lists of integers, as ``int32``."""
    import pyarrow

    kind = column.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not is_list or not (pyarrow.types.is_integer(kind.value_type) or pyarrow.types.is_boolean(kind.value_type)):
        raise InvalidDataError(f"column {name!r} of {path} is not a column of lists of integers but of {kind}")
    rows = []
    for row in column:
        values = row.values
        if values is None or values.null_count:
            raise InvalidDataError(f"column {name!r} of {path} has a row or a place with nothing in it")
        numbers = values.to_numpy(zero_copy_only=False)
        narrow = numbers.astype(np.int32)
        if not np.array_equal(narrow, numbers):
            raise InvalidDataError(f"column {name!r} of {path} has numbers above 32 bits")
        narrow.flags.writeable = False  # it is given to everybody who asks for this row
        rows.append(narrow)
    return rows
