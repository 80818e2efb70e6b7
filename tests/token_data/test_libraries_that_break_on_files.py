"""Files of strangers on which libraries break: only errors of ours come out, also of a panic of Rust."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from distro_optim.coordinator.model import Seeded
from distro_optim.coordinator.types import BatchId
from distro_optim.data import parquet as parquet_module
from distro_optim.data.making.vocabulary import HfTokenizer, load_tokenizer
from distro_optim.data.parquet import ParquetTokens
from distro_optim.errors import ConfigurationError, DistroError, InvalidDataError

WORDS = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
MERGES = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "#" * 10}
NAMELESS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": []}


def written(folder: Path, **parts: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": WORDS} | parts), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
        {"post_processor": {**NAMELESS, "special_tokens": {}}},
        {"model": {**MERGES, "fuse_unk": False, "byte_fallback": False}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["b", -1.0]]}},
        {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "<unk>"}},
    ],
)
def test_a_tokenizer_on_which_its_library_breaks_is_no_tokenizer(tmp_path: Path, parts: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="is not a tokenizer that works"):
        load_tokenizer(written(tmp_path, **parts))


def test_a_text_on_which_a_tokenizer_breaks_is_told(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    tokenizer = load_tokenizer(written(tmp_path, model=model))
    with pytest.raises(InvalidDataError, match="cannot read this text"):
        tokenizer.encode([b"something else"])


class Stopped:
    """A tokenizer whose user presses Ctrl-C."""

    def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        raise KeyboardInterrupt


def test_ctrl_c_stays_what_it_is(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path))
    assert isinstance(tokenizer, HfTokenizer)
    tokenizer._tokenizer = Stopped()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode([b"a"])


@pytest.mark.slow
def test_damaged_parquet_raises_errors_of_ours_alone(tmp_path: Path) -> None:
    rows = pyarrow.array([[1, 2, 3, 4]] * 8, pyarrow.list_(pyarrow.int32()))
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"inputs": rows, "labels": rows}), path, row_group_size=4)
    whole = path.read_bytes()
    draw = random.Random(5)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 5))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            with ParquetTokens(tmp_path, 4) as tokens:
                tokens.get_samples(BatchId(0, 7))
        except DistroError:
            refused += 1
    assert refused > 100


def test_a_file_that_has_fewer_rows_than_it_says_is_damaged(tmp_path: Path) -> None:
    """The numbers of rows lie in the last bytes, some of which count for a group alone."""
    path = tmp_path / "train.parquet"
    rows = pyarrow.array([[1, 2, 3, 4]] * 3, pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"inputs": rows}), path, row_group_size=2)
    whole = path.read_bytes()
    told = []
    for place in range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole) - 8):
        # One more, as integers are written there; or, of a negative one, one less.
        path.write_bytes(whole[:place] + bytes([(whole[place] + 2) % 256]) + whole[place + 1 :])
        try:
            with ParquetTokens(tmp_path, 4) as tokens:
                tokens.get_samples(BatchId(0, tokens.num_sequences - 1))
        except DistroError as error:
            told.append(str(error))
    assert any("it has fewer or more rows than it says" in text for text in told)


def test_rows_that_are_only_said_to_be_there_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "MAX_SHUFFLED", 7)
    path = tmp_path / "train.parquet"
    rows = pyarrow.array([[1, 2, 3, 4]] * 8, pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({"inputs": rows}), path)
    assert ParquetTokens(tmp_path, 4).num_sequences == 8
    with pytest.raises(InvalidDataError, match="say that they have 8 rows, and at most 7 are shuffled"):
        ParquetTokens(tmp_path, 4, Seeded(bytes(32)))
