"""Token files and parquet files that are cut, of another kind, or made for another model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from distro_optim.coordinator.model import DontShuffle, Seeded, TokenSize
from distro_optim.coordinator.types import BatchId
from distro_optim.data.dummy import DummyTokens
from distro_optim.data.mixture import WeightedTokens
from distro_optim.data.parquet import ParquetTokens, find_parquet_files
from distro_optim.data.sequences import MAX_SHUFFLED, SequenceTable
from distro_optim.data.sidecar import Sidecar, read_sidecar, sidecar_path
from distro_optim.data.token_files import TokenFiles
from distro_optim.errors import ConfigurationError, InvalidDataError, OutOfDataError

pytestmark = pytest.mark.waiting


SEQ_LEN = 4


def opened(path: Path, token_size: TokenSize = TokenSize.TWO_BYTES, vocab_size: int | None = None) -> TokenFiles:
    return TokenFiles(path, token_size, SEQ_LEN, vocab_size=vocab_size)


# -- token files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "token_size"), [(101, TokenSize.TWO_BYTES), (102, TokenSize.FOUR_BYTES)])
def test_a_file_that_ends_within_a_token_is_cut(tmp_path: Path, size: int, token_size: TokenSize) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(size))
    with pytest.raises(InvalidDataError, match=r"a\.bin is cut, or its tokens are not of"):
        opened(tmp_path, token_size)


def sidecar(tokens: int, size: TokenSize = TokenSize.TWO_BYTES) -> Sidecar:
    return Sidecar(tokens, size, 256, 1, "bytes", "", "")


def test_a_file_that_lost_its_end_is_known_by_the_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100))
    sidecar_path(path).write_text(sidecar(50).to_text())
    opened(path).close()
    os.truncate(path, 64)
    with pytest.raises(InvalidDataError, match=r"a\.bin is cut: it has 32 tokens, and 50 as the file beside it says"):
        opened(path)


def test_tokens_of_another_width_are_known_by_it_too(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100))
    sidecar_path(path).write_text(sidecar(25, TokenSize.FOUR_BYTES).to_text())
    with pytest.raises(InvalidDataError, match=r"has tokens of 4 bytes, .* would be read as tokens of 2"):
        opened(path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tokens": -1}', "[" * 60_000, "x" * 100_000])
def test_a_sidecar_that_is_none_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.bin"
    sidecar_path(path).write_text(text)
    with pytest.raises(InvalidDataError, match=r"a\.bin\.json does not describe a token file"):
        read_sidecar(path)


def test_a_file_that_is_cut_while_it_is_in_use_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1 << 20))
    with opened(path) as files:
        files.probe()
        os.truncate(path, 4096)
        last = len(files) - 1
        with pytest.raises(InvalidDataError, match="was cut while it was in use: it has 4096 bytes"):
            files.get_samples(BatchId(last, last))
        files.get_samples(BatchId(0, 0))


def test_files_of_numpy_save_have_a_header_that_is_no_token(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(100, np.uint16))
    with pytest.raises(InvalidDataError, match=r"begins with the header of numpy\.save"):
        opened(tmp_path)


@pytest.mark.parametrize("token", [7, 8, 65535])
def test_tokens_from_the_vocabularys_size_on_are_refused(tmp_path: Path, token: int) -> None:
    (tmp_path / "a.bin").write_bytes(np.array([1, 2, token, 3] * 3, dtype="<u2").tobytes())
    with opened(tmp_path, vocab_size=7) as files:
        with pytest.raises(InvalidDataError, match=rf"sequence 0 has the token {token}, beyond the vocabulary of 7"):
            files.probe()
    with opened(tmp_path, vocab_size=token + 1) as files:
        files.probe()


def test_tokens_of_more_than_31_bits_are_refused_by_every_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.array([2**31] * 9, dtype="<u4").tobytes())
    with opened(tmp_path, TokenSize.FOUR_BYTES) as files, pytest.raises(InvalidDataError, match="token 2147483648"):
        files.get_samples(BatchId(0, 0))


def test_one_file_may_be_named_instead_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.any").write_bytes(np.arange(9, dtype="<u2").tobytes())
    with opened(tmp_path / "a.any") as files:
        assert [sample.input_ids.tolist() for sample in files.get_samples(BatchId(0, 1))] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
        ]


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), lambda path: None, lambda path: (path.mkdir(), (path / "a.bin").touch())]
)
def test_a_folder_without_a_sequence_is_said_to_have_none(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "data")
    with pytest.raises(ConfigurationError, match=r"cannot read token files|has a sequence of 4 tokens"):
        opened(tmp_path / "data")


def test_the_end_of_the_data_is_said_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(18))
    with (
        opened(tmp_path) as files,
        pytest.raises(OutOfDataError, match=r"B\[1, 2\] lies beyond .* 2 sequences") as caught,
    ):
        files.get_samples(BatchId(1, 2))
    assert caught.value.num_sequences == 2


def test_no_shuffle_is_begun_that_would_not_end() -> None:
    sizes = [(MAX_SHUFFLED + 2) * 2]
    assert len(SequenceTable(sizes, 1, TokenSize.TWO_BYTES, DontShuffle(), spare_tokens=0)) == MAX_SHUFFLED + 1
    with pytest.raises(ConfigurationError, match="too many to shuffle"):
        SequenceTable(sizes, 1, TokenSize.TWO_BYTES, Seeded(bytes(32)), spare_tokens=0)


# -- mixtures ------------------------------------------------------------------------------------------------------


def test_members_of_different_lengths_do_not_mix() -> None:
    with pytest.raises(ConfigurationError, match="member 1 of the mixture has sequences of 8 tokens, member 0 of 4"):
        WeightedTokens([DummyTokens(4, 5), DummyTokens(8, 5)])
    with pytest.raises(ConfigurationError, match="member 0 of the mixture has no known end"):
        WeightedTokens([DummyTokens(4)])
    with pytest.raises(ConfigurationError, match="at least one member"):
        WeightedTokens([])


# -- parquet -------------------------------------------------------------------------------------------------------


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


GOOD = [[1, 2, 3, 4], [5, 6, 7, 8]]


def rows(path: Path, **settings: Any) -> list[list[int]]:
    with ParquetTokens(path, SEQ_LEN, **settings) as provider:
        return [sample.input_ids.tolist() for sample in provider.get_samples(BatchId(0, 1))]


@pytest.mark.parametrize("kind", [pyarrow.int8(), pyarrow.uint16(), pyarrow.int32(), pyarrow.int64(), pyarrow.uint64()])
@pytest.mark.parametrize("of", [pyarrow.list_, pyarrow.large_list, lambda kind: pyarrow.list_(kind, 4)])
def test_every_kind_of_integer_lists_is_read(tmp_path: Path, kind: Any, of: Any) -> None:
    write(tmp_path / "train.parquet", inputs=pyarrow.array(GOOD, of(kind)))
    assert rows(tmp_path) == GOOD


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": GOOD}, "has no column 'inputs'; it has tokens"),
        ({"inputs": ["a", "b"]}, "not a column of lists of integers but of string"),
        ({"inputs": [[1.5] * 4] * 2}, "not a column of lists of integers but of list"),
        ({"inputs": [[1, 2, 3, 4], None]}, "has a row or a place with nothing in it"),
        ({"inputs": [[1, 2, 3, 4], [1, 2, 3, None]]}, "has a row or a place with nothing in it"),
        ({"inputs": [[1, 2, 3, 4], [1, 2, 3, 2**40]]}, "has numbers above 32 bits"),
        ({"inputs": [[1, 2, 3, 4], [1, 2, 3]]}, "sequence 1 has 3 tokens, but the run's sequences have 4"),
        ({"inputs": GOOD, "labels": [[1], [2]]}, "sequence 0 has 1 labels"),
        ({"inputs": GOOD, "labels": [[-100, 2, 3, 4], [9, 9, 9, 9]]}, "sequence 1 has the label 9, beyond"),
        ({"inputs": GOOD, "position_ids": [[0, 1, 2, 4]] * 2}, "has the position id 4, outside 0 to 3"),
        ({"inputs": GOOD, "sequence_lengths": [[4], [2, 1]]}, "texts in sequence 1 do not add up to 4"),
    ],
)
def test_columns_that_cannot_be_trained_on_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path / "train.parquet", **columns)
    with pytest.raises(InvalidDataError, match=message):
        rows(tmp_path, vocab_size=9)


def test_files_of_different_columns_do_not_belong_together(tmp_path: Path) -> None:
    write(tmp_path / "train-1.parquet", inputs=GOOD, labels=GOOD)
    write(tmp_path / "train-2.parquet", inputs=GOOD)
    with pytest.raises(InvalidDataError, match=r"train-2\.parquet has no column 'labels'"):
        rows(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(1000)])
def test_what_is_no_parquet_file_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(InvalidDataError, match=r"train\.parquet is cut, or no parquet file"):
        rows(tmp_path)


def test_a_parquet_file_that_is_damaged_inside_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write(path, inputs=GOOD)
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36
    path.write_bytes(data)
    with pytest.raises(InvalidDataError, match=r"train\.parquet is cut or damaged"):
        rows(tmp_path)


def test_a_file_without_rows_has_nothing_to_train_on(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", inputs=pyarrow.array([], pyarrow.list_(pyarrow.int32())))
    with pytest.raises(ConfigurationError, match="have no rows"):
        rows(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train-b.parquet", "train-a.parquet", "test.parquet", "train.txt"], ["train-a.parquet", "train-b.parquet"]),
        (["train/b.parquet", "train/a.parquet"], ["a.parquet", "b.parquet"]),
        (["Train-of-2/x.parquet"], ["x.parquet"]),
    ],
)
def test_files_of_the_training_split_are_chosen_by_name(tmp_path: Path, files: list[str], expected: list[str]) -> None:
    root = tmp_path / "data"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    folder = (root / files[0]).parent
    assert [path.name for path in find_parquet_files(folder)] == expected


@pytest.mark.parametrize("files", [[], ["test.parquet"], ["a.txt"]])
def test_a_folder_without_training_files_says_what_they_are_called(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ConfigurationError, match=r"they are called train\*\.parquet"):
        find_parquet_files(tmp_path)


def test_rows_go_round(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", inputs=[*GOOD, [9, 10, 11, 12]])
    with ParquetTokens(tmp_path, SEQ_LEN) as provider:
        samples = provider.get_samples(BatchId(2**64 - 3, 2**64 - 1))
    # 2**64 - 3 leaves 1 when divided by 3: the tail, then the head, as in Psyche.
    assert [int(sample.input_ids[0]) for sample in samples] == [5, 9, 1]
