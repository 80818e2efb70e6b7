"""Psyche's data fixtures: the order, the sequences, and what they say.

They carry licences of their own and are not part of this project; without them these tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from distro_optim.coordinator.model import Seeded, SingleUrl, TokenSize
from distro_optim.coordinator.types import BatchId
from distro_optim.data.parquet import ParquetTokens
from distro_optim.data.token_files import TokenFiles
from distro_optim.data.web.tokens import HttpTokens
from token_data.web_server import WebServer

VECTORS = Path(os.environ.get("DISTRO_OPTIM_VECTORS", Path(__file__).parents[3] / "shared" / "vectors")) / "data"
SEED = Seeded(bytes(range(1, 33)))

# SHA-256 of the tokens as little-endian int32.
SEQUENCES = {
    "dolma": [
        "a99d90f06e57f6a7791db05ef4b9108985d818de0f98c923038a83868b8f7126",
        "92e3ee61298ddcdf1ba9be01250d9094561eafac03370e847b274032636eb06f",
    ],
    "fineweb": [
        "89b8a40c087d2d961a097fba1b69492e83361391aea5187160f259ebc5025884",
        "a7e8931cf8878b4d11519f27406ad30307fa4d106ddcf105e60ecf671f6213ec",
    ],
}

pytestmark = [
    pytest.mark.waiting,
    pytest.mark.skipif(not VECTORS.is_dir(), reason=f"Psyche's data fixtures are not at {VECTORS}"),
]


def digest(sample: object) -> str:
    return hashlib.sha256(sample.input_ids.astype("<i4").tobytes()).hexdigest()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SEQUENCES)
def test_token_files_have_two_sequences_in_this_order(name: str) -> None:
    with TokenFiles(VECTORS / name / "data", TokenSize.TWO_BYTES, 2048, SEED, vocab_size=32000) as files:
        assert len(files) == 2  # of three: the last one does not count
        assert [digest(sample) for sample in files.get_samples(BatchId(0, 1))] == SEQUENCES[name]


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_same_files_behind_a_web_server_do_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (path,) = [found for found in (VECTORS / name / "data").iterdir() if found.suffix in (".npy", ".ds")]
    with WebServer({"/tokens": path.read_bytes()}) as server:
        location = SingleUrl(server.url + "/tokens")
        with HttpTokens.open(location, TokenSize.TWO_BYTES, 2048, SEED) as tokens:
            assert tokens.num_sequences == 2
            assert [digest(sample) for sample in tokens.get_samples(BatchId(0, 1))] == SEQUENCES[name]


@pytest.mark.skipif("DISTRO_OPTIM_LLAMA2_TOKENIZER" not in os.environ, reason="needs Llama 2's tokenizer.json")
@pytest.mark.parametrize("name", SEQUENCES)
def test_the_sequences_say_what_they_should(name: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(os.environ["DISTRO_OPTIM_LLAMA2_TOKENIZER"])
    with TokenFiles(VECTORS / name / "data", TokenSize.TWO_BYTES, 2048, SEED) as files:
        for number, sample in enumerate(files.get_samples(BatchId(0, 1))):
            expected = (VECTORS / name / "decoded" / f"{number}.txt").read_text(encoding="utf-8")
            assert tokenizer.decode(sample.input_ids.tolist(), skip_special_tokens=True) == expected


def test_packed_conversations_have_all_four_columns() -> None:
    # Psyche's test shuffles these two rows by the same seed, which leaves them in order.
    with ParquetTokens(VECTORS / "hermes3" / "data", 4096, SEED, vocab_size=128256) as rows:
        assert rows.num_sequences == 2
        for number, sample in enumerate(rows.get_samples(BatchId(0, 1))):
            expected = json.loads((VECTORS / "hermes3" / "decoded" / f"{number}.json").read_text())
            given = {
                "inputs": sample.input_ids,
                "labels": sample.labels,
                "position_ids": sample.position_ids,
                "sequence_lengths": sample.sequence_lengths,
            }
            assert {name: None if values is None else values.tolist() for name, values in given.items()} == expected
